"""Perplexity, bits per byte, and how far a model has moved from its base.

Protocol: the text is tokenized once and cut into consecutive windows of `seq_len` tokens; the last,
shorter one is dropped. In each window every token but the first is predicted. With a BOS (`bos` is
'window') the first token of each window is the BOS, and `seq_len - 1` tokens of text follow; all of
these are predicted. Without one (`bos` is 'none') all tokens are text. ppl = exp(sum NLL / tokens).
Bits per byte = sum NLL / ln 2 / bytes of the predicted tokens' text. KL(base || model) in nats per
token and the share of tokens whose most likely prediction differs from the base's are measured on
the same windows. With a cache format, the model's keys and values go through such a cache
(`model.eval.cached`); the base always runs without one. Sums are in float64. Float32 products are
float32 on GPU and TPU as well, which round them further by default.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import kv_cache
from model.cache_spec import CacheSpec
from model.eval import cached
from model.transformer import Transformer
from ops import losses

Bos = Literal['none', 'window']
TOKENS_A_BATCH = 4096
CHUNK = 512  # tokens whose logits exist at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
  """Evaluation text: tokens_BT int32 [windows, seq_len], and the bytes of the predicted tokens."""

  tokens_BT: np.ndarray
  predicted_bytes: int
  bos: Bos = 'none'

  @property
  def seq_len(self) -> int:
    return self.tokens_BT.shape[1]

  @property
  def predicted(self) -> int:
    return self.tokens_BT.shape[0] * (self.seq_len - 1)

  @property
  def text_len(self) -> int:
    """Tokens of text in each window."""
    return self.seq_len - (self.bos == 'window')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
  """Sums over all predicted tokens. KL and flips are None where there was no base.

  nll_B and kl_B: the sums of each window, of which standard errors are made (to first order, over
  windows as independent samples; NaN of one window).
  """

  nll_sum: float
  tokens: int
  predicted_bytes: int
  seq_len: int
  bos: Bos = 'none'
  kl_sum: float | None = None
  flips: int | None = None
  nll_B: tuple[float, ...] = ()
  kl_B: tuple[float, ...] = ()

  @property
  def ppl(self) -> float:
    mean = self.nll_sum / self.tokens
    return math.exp(mean) if mean < 700 else math.inf

  @property
  def bits_per_byte(self) -> float:
    return self.nll_sum / math.log(2) / self.predicted_bytes

  @property
  def kl_to_base(self) -> float | None:
    return None if self.kl_sum is None else self.kl_sum / self.tokens

  @property
  def flip_rate(self) -> float | None:
    return None if self.flips is None else self.flips / self.tokens

  @property
  def ppl_error(self) -> float:
    return self.ppl * _error(self.nll_B, self.tokens)

  @property
  def kl_error(self) -> float:
    return _error(self.kl_B, self.tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratio:
  """A ratio of two perplexities on the same windows, and its standard error; NaN of one window."""

  value: float
  standard_error: float


def ratio(quality: Quality, other: Quality) -> Ratio:
  """Divides two perplexities of the same windows, which are compared pair by pair.

  The logarithm of the ratio is the mean over windows of the difference in NLL per token. Its
  standard error comes from the spread of these differences; that of the ratio follows to first
  order. Raises ValueError if the two have other windows.
  """
  own, others = len(quality.nll_B), len(other.nll_B)
  if own != others or quality.tokens != other.tokens:
    raise ValueError(
      f'{own} windows of {quality.tokens} tokens are no pairs with {others} of {other.tokens}'
    )
  difference_B = np.subtract(quality.nll_B, other.nll_B) / (quality.tokens / own)
  value = quality.ppl / other.ppl
  error = difference_B.std(ddof=1) / math.sqrt(own) if own > 1 else math.nan
  return Ratio(value=value, standard_error=float(value * error))


def windows(
  tokens_T, ends_T, seq_len: int, max_windows: int | None = None, bos_id: int | None = None
) -> Windows:
  """Cuts a tokenized text into windows, each with `bos_id` in front if that is given.

  `ends_T`: the UTF-8 bytes of the text up to the end of each token. `model.tokenizer.window_bos`
  gives the `bos_id` that a model needs. Raises ValueError if the text is shorter than one window.
  """
  if seq_len < 2:
    raise ValueError(f'a window needs at least 2 tokens to predict one, not {seq_len}')
  text_len = seq_len if bos_id is None else seq_len - 1
  count = len(tokens_T) // text_len
  if count == 0:
    raise ValueError(
      f'the text has {len(tokens_T)} tokens, fewer than one window of {text_len}; '
      'give a longer text or a smaller seq_len'
    )
  count = min(count, max_windows or count)
  tokens_BT = np.asarray(tokens_T[: count * text_len], np.int32).reshape(count, text_len)
  ends_T = np.asarray(ends_T[: count * text_len])
  ends_BT = ends_T.reshape(count, text_len)
  if bos_id is None:
    starts_B = ends_BT[:, 0]  # the first token of a window is not predicted
  else:
    starts_B = np.concatenate([[0], ends_BT[:-1, -1]])
    tokens_BT = np.pad(tokens_BT, ((0, 0), (1, 0)), constant_values=bos_id)
  return Windows(
    tokens_BT=tokens_BT,
    predicted_bytes=int((ends_BT[:, -1] - starts_B).sum()),
    bos='none' if bos_id is None else 'window',
  )


def evaluate(
  model: Transformer,
  text: Windows,
  *,
  base: Transformer | None = None,
  base_hidden: Sequence[np.ndarray] | None = None,
  cache_format: CacheSpec | str | None = None,
  progress: Callable[[list], Iterator] = iter,
) -> Quality:
  """Measures a model on the windows, and against `base` if there is one.

  `base_hidden` is what `hidden_states` returned for the base and this text; without it, they are
  computed again. With `cache_format`, the model reads keys and values from a cache of that format.
  Raises ValueError if a window is longer than the positions that a model has learned, a token is
  outside its vocabulary, or there is no such format.
  """
  if cache_format is not None:
    kv_cache.check_format(cache_format)
  for one in (model, base):
    if one is not None:
      check(one, text)
  parts, totals, nll_B, kl_B = batches(text), np.zeros(3), [], []
  for i in progress(list(range(len(parts)))):
    with jax.default_matmul_precision('highest'):
      hidden = None if base_hidden is None else base_hidden[i]
      sums = _window_sums(model, base, parts[i], cache_format, hidden)
    sums = np.asarray(jax.device_get(sums), np.float64)
    totals += sums.sum((1, 2))
    nll_B += _of_windows(sums[0], parts[i])
    kl_B += _of_windows(sums[1], parts[i])
  return Quality(
    nll_sum=float(totals[0]),
    tokens=text.predicted,
    predicted_bytes=text.predicted_bytes,
    seq_len=text.seq_len,
    bos=text.bos,
    kl_sum=None if base is None else float(totals[1]),
    flips=None if base is None else round(totals[2]),
    nll_B=tuple(nll_B),
    kl_B=() if base is None else tuple(kl_B),
  )


def hidden_states(model: Transformer, text: Windows) -> list[np.ndarray]:
  """The last hidden states [B, T, D] of each batch of windows, for `evaluate`'s `base_hidden`."""
  graphdef, state = nnx.split(model)
  with jax.default_matmul_precision('highest'):
    return [np.asarray(_hidden(graphdef, state, tokens_BT)) for tokens_BT in batches(text)]


def _error(sums_B: Sequence[float], tokens: int) -> float:
  """The standard error of the mean per token, from the sums of windows of equal length."""
  count = len(sums_B)
  if count < 2:
    return math.nan
  return float(np.std(sums_B, ddof=1) / (tokens / count) / math.sqrt(count))


def _of_windows(chunks, tokens_BT) -> list[float]:
  """The sum of each window, from values per predicted token in padded chunks."""
  rows, predicted = tokens_BT.shape[0], tokens_BT.shape[1] - 1
  return chunks.reshape(-1)[: rows * predicted].reshape(rows, predicted).sum(1).tolist()


def batches(text: Windows) -> list[np.ndarray]:
  """The windows that are read at once, [windows, seq_len] each."""
  size = max(1, TOKENS_A_BATCH // text.seq_len)
  return [text.tokens_BT[i : i + size] for i in range(0, len(text.tokens_BT), size)]


def check(model: Transformer, text: Windows) -> None:
  """Raises ValueError if the model has not learned a window's positions, or lacks its tokens."""
  highest = int(text.tokens_BT.max())
  if highest >= model.config.vocab_size:
    raise ValueError(
      f'the text has token {highest}, but the model has a vocabulary of {model.config.vocab_size}'
    )
  if model.positions is not None and text.seq_len > model.config.max_positions:
    raise ValueError(
      f'windows of {text.seq_len} tokens are longer than the {model.config.max_positions} learned '
      'positions; use a smaller seq_len'
    )


def _window_sums(model, base, tokens_BT, cache_format, base_hidden):
  graphdef, state = nnx.split(model)
  if base is None:
    return _sums(graphdef, None, cache_format, state, None, tokens_BT, None)
  base_graphdef, base_state = nnx.split(base)
  base_x_BTD = base_hidden
  if base_x_BTD is None:
    base_x_BTD = _hidden(base_graphdef, base_state, tokens_BT)
  return _sums(graphdef, base_graphdef, cache_format, state, base_state, tokens_BT, base_x_BTD)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graphdef, state, tokens_BT):
  return nnx.merge(graphdef, state).hidden(tokens_BT)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(graphdef, base_graphdef, cache_format, state, base_state, tokens_BT, base_x_BTD):
  """Per token [3, chunks, CHUNK]: NLL, KL to the base, top-1 changed (0 without a base)."""
  model = nnx.merge(graphdef, state)
  base = None if base_graphdef is None else nnx.merge(base_graphdef, base_state)
  flat = lambda x: x[:, :-1].reshape(-1, x.shape[-1])
  x_BTD = (
    cached.hidden(model, tokens_BT, cache_format) if cache_format else model.hidden(tokens_BT)[0]
  )
  x_TD, labels_T = flat(x_BTD), tokens_BT[:, 1:].reshape(-1)
  base_x_TD = x_TD if base is None else flat(base_x_BTD)

  def measure(chunk):
    x_TD, base_x_TD, labels_T = chunk
    logits_TV = model.logits(x_TD)
    base_logits_TV = logits_TV if base is None else base.logits(base_x_TD)
    nll_T = -jnp.take_along_axis(jax.nn.log_softmax(logits_TV), labels_T[:, None], 1)[:, 0]
    kl_T = losses.kl_divergence(base_logits_TV, logits_TV)
    flips_T = (logits_TV.argmax(-1) != base_logits_TV.argmax(-1)).astype(jnp.float32)
    return jnp.stack([nll_T, kl_T, flips_T])

  count = labels_T.shape[0]
  padding = -count % CHUNK
  pad = lambda a: jnp.pad(a, ((0, padding),) + ((0, 0),) * (a.ndim - 1))
  chunks = [pad(a).reshape(-1, CHUNK, *a.shape[1:]) for a in (x_TD, base_x_TD, labels_T)]
  sums = jax.lax.map(measure, tuple(chunks))
  kept = (jnp.arange(count + padding) < count).reshape(-1, 1, CHUNK)
  return jnp.where(kept, sums, 0).transpose(1, 0, 2)
