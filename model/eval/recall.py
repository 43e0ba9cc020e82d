"""Whether a model finds in its cache what it has read: questions about a context, by two protocols.

  query_aware      the question is within the text that is read in one call, so a cache that gives
                   tokens up can choose by it
  query_agnostic   the question comes after that, as a second question to the same text does

They are different measurements and are reported apart: SnapKV, for example, answers the question
that it was compressed for. In both, what comes after the compressed text is fed token by token, so
every counted token is predicted from the cache alone. The call that reads the text sees all of it,
so a token that it predicts says nothing of the cache and is not counted.

`placed` puts a needle into a context at some depth; a grid of depths should include the first
twentieth, because the first tokens are kept by most policies.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import kv_cache
from model.cache_spec import CacheSpec
from model.compiled import peak_bytes
from model.transformer import Transformer
from ops import axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Tokens of some rows: what is read in one call, what is fed after it, and what then follows."""

  read_BT: np.ndarray
  fed_BT: np.ndarray
  expected_BT: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
  """What was found, and what the cache took.

  right_BT: of each expected token, whether it is the most likely one.
  cache_bytes: of all rows, as allocated.
  peak_bytes: of the call that reads the text, weights included, as compiled.
  """

  right_BT: np.ndarray
  cache_bytes: int
  peak_bytes: int

  @property
  def answers_B(self) -> np.ndarray:
    """Of each row, whether all expected tokens are the most likely ones."""
    return self.right_BT.all(1)

  @property
  def answers(self) -> float:
    """The share of such rows."""
    return float(self.answers_B.mean())

  @property
  def tokens(self) -> float:
    """The share of expected tokens that are the most likely ones."""
    return float(self.right_BT.mean())


def query_aware(contexts_BT, questions_BT, answers_BT, *, given: int = 0) -> Case:
  """The question is read with the context, and then asked again.

  With `given`, so many tokens of the answer are fed in its place, and the others are expected.
  """
  _check(contexts_BT, questions_BT, answers_BT, given)
  return Case(
    read_BT=np.concatenate([contexts_BT, questions_BT], 1),
    fed_BT=answers_BT[:, :given] if given else questions_BT,
    expected_BT=answers_BT[:, given:],
  )


def query_agnostic(contexts_BT, questions_BT, answers_BT, *, given: int = 0) -> Case:
  """The question is asked after the context, with the first `given` tokens of the answer."""
  _check(contexts_BT, questions_BT, answers_BT, given)
  return Case(
    read_BT=contexts_BT,
    fed_BT=np.concatenate([questions_BT, answers_BT[:, :given]], 1),
    expected_BT=answers_BT[:, given:],
  )


PROTOCOLS = {'query-aware': query_aware, 'query-agnostic': query_agnostic}


def placed(fillers_BT: np.ndarray, needles_BT: np.ndarray, depth: float) -> np.ndarray:
  """Contexts of filler with a needle at a depth: 0 is the begin and 1 the end.

  Raises ValueError for another depth.
  """
  if not 0 <= depth <= 1:
    raise ValueError(f'a depth is between 0, the begin, and 1, the end, not {depth}')
  at = round(depth * fillers_BT.shape[1])
  return np.concatenate([fillers_BT[:, :at], needles_BT, fillers_BT[:, at:]], 1)


def measure(model: Transformer, case: Case, cache_format: CacheSpec | str) -> Recall:
  """Reads, feeds and compares, through caches of this format.

  Raises ValueError if there is no such format, or the model has learned fewer positions.
  """
  (batch, start), fed = case.read_BT.shape, case.fed_BT.shape[1]
  length = start + fed + case.expected_BT.shape[1] - 1
  if model.positions is not None and length > model.config.max_positions:
    raise ValueError(
      f'{length} positions are needed, but the model has learned {model.config.max_positions}'
    )
  caches = kv_cache.init(model.config, batch, length, model.dtype, cache_format)
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
  graphdef, state = nnx.split(model)
  arguments = state, jnp.asarray(case.read_BT, jnp.int32), caches
  reading = _read.lower(graphdef, *arguments).compile()
  caches = reading(*arguments)
  tokens_BT = np.concatenate([case.fed_BT, case.expected_BT[:, :-1]], 1)
  found_TB = _feed(graphdef, state, jnp.asarray(tokens_BT.T, jnp.int32), caches, start)
  right_BT = case.expected_BT == np.asarray(found_TB)[fed - 1 :].T
  return Recall(
    right_BT=right_BT,
    cache_bytes=held,
    peak_bytes=peak_bytes(reading),
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _read(graphdef, state, tokens_BT, caches):
  positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
  positions_BT = jnp.broadcast_to(positions_BT, tokens_BT.shape)
  return nnx.merge(graphdef, state).hidden(tokens_BT, positions_BT=positions_BT, cache=caches)[1]


@functools.partial(jax.jit, static_argnums=0)
def _feed(graphdef, state, tokens_TB, caches, start):
  """The most likely token after each of these."""
  model = nnx.merge(graphdef, state)

  def one(carry, tokens_B):
    position, caches = carry
    positions_BT = jnp.full((len(tokens_B), 1), position, jnp.int32)
    x_BTD, caches = model.hidden(tokens_B[:, None], positions_BT=positions_BT, cache=caches)
    return (position + 1, caches), model.logits(x_BTD[:, 0]).argmax(-1)

  return jax.lax.scan(one, (jnp.int32(start), caches), tokens_TB)[1]


def _check(contexts_BT, questions_BT, answers_BT, given):
  axes.check('B_,B_,B_', contexts_BT, questions_BT, answers_BT)
  if not 0 <= given < answers_BT.shape[1]:
    raise ValueError(
      f'of {answers_BT.shape[1]} tokens of an answer, {given} cannot be given; one is expected'
    )
