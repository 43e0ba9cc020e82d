"""Perplexity by position: how well the tokens of a long text are predicted, near its start and far.

The text is read in one pass from position 0 on, so a token has all that comes before it as its
context, as far as the layers see. Beyond the positions that a model was trained on, this shows
whether it still predicts at all. The blocks run one after another: one program for each kind of
block is compiled, and the hidden states of one layer are held.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.eval import perplexity
from model.eval.perplexity import Windows
from model.layers.lending import Lenders
from model.transformer import Context, Transformer
from ops import losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
  """The tokens at the positions begin, ..., end - 1 of some texts: their mean loss in nats."""

  begin: int
  end: int
  nll: float
  tokens: int

  @property
  def ppl(self) -> float:
    return math.exp(self.nll) if self.nll < 700 else math.inf

  def __str__(self):
    return f'{self.begin}-{self.end}'


def nll(
  model: Transformer, tokens_BT: np.ndarray, *, progress: Callable[[list], Iterator] = iter
) -> np.ndarray:
  """The negative log likelihood of every token but the first of each row: float32 [B, T - 1].

  A row is a text from position 0 on. Raises ValueError if it is longer than the positions that the
  model has learned, or has a token outside of its vocabulary.
  """
  x_BTD = hidden(model, tokens_BT, progress=progress)
  with jax.default_matmul_precision('highest'):
    return np.asarray(_nll(*nnx.split(model), tokens_BT, x_BTD))


def hidden(
  model: Transformer, tokens_BT: np.ndarray, *, progress: Callable[[list], Iterator] = iter
) -> jax.Array:
  """The hidden states after the last block, before the final norm: x_BTD. Raises as `nll` does."""
  tokens_BT = np.asarray(tokens_BT, np.int32)
  if tokens_BT.ndim != 2 or tokens_BT.shape[1] < 2:
    raise ValueError(f'texts are rows [B, T] of at least 2 tokens, not {tokens_BT.shape}')
  perplexity.check(model, Windows(tokens_BT=tokens_BT, predicted_bytes=0))
  graphdef, state = nnx.split(model)
  with jax.default_matmul_precision('highest'):
    x_BTD = _embed(graphdef, state, tokens_BT)
    lenders = Lenders(model.config.layers)
    for block in progress(list(model.layers)):
      mixer = block.layer.mixer
      given = lenders.given(mixer, None)
      x_BTD, found = _run(model.config, *nnx.split(block), tokens_BT, x_BTD, given)
      lenders.taken(mixer, found)
  return x_BTD


def spans(nll_BT: np.ndarray, edges: Sequence[int]) -> list[Span]:
  """The mean loss between consecutive positions, such as 0, 512 and 2048, of what `nll` returns.

  The first token of a text has no prediction. The last edge may lie after the text; spans without
  tokens are left out. Raises ValueError if the edges do not increase from 0 or more.
  """
  if len(edges) < 2 or edges[0] < 0 or any(a >= b for a, b in zip(edges, edges[1:])):
    raise ValueError(f'positions must increase from 0 or more, not {", ".join(map(str, edges))}')
  found = []
  for begin, end in zip(edges, edges[1:]):
    part = np.asarray(nll_BT, np.float64)[:, max(begin - 1, 0) : end - 1]
    if part.size:
      found.append(Span(begin=begin, end=end, nll=float(part.mean()), tokens=part.size))
  return found


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef, state, tokens_BT):
  return nnx.merge(graphdef, state).embed(tokens_BT)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _run(config, graphdef, state, tokens_BT, x_BTD, given):
  return Context.of(config, tokens_BT).run(nnx.merge(graphdef, state), x_BTD, given)


@functools.partial(jax.jit, static_argnums=0)
def _nll(graphdef, state, tokens_BT, x_BTD):
  model = nnx.merge(graphdef, state)
  x_BTD = model.final_norm(x_BTD)[:, :-1]
  return losses.cross_entropy(x_BTD, jnp.asarray(tokens_BT)[:, 1:], model.logits)
