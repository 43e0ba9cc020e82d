"""Attention to a window and to summaries of all chunks before it: the mixer of kind 'linformer'.

The causal form of Linformer (see ops/linformer.py): R summaries stand for each chunk of tokens, so
the cost of a query grows with context * R / chunk, and a cache holds the window and the summaries.
The published form sees all tokens of a text and is refused in a decoder.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from model.layers import cache as caches
from model.layers.basic import Linear, StreamConfig
from model.layers.cache import Cache
from model.layers.checks import check_choice, check_count
from model.layers.mixers.attention import Attention, AttentionConfig
from model.layers.mixers.sides import Floats
from model.layers.mixers.slots import RollingCache
from model.layers.wiring import Normed
from ops import linformer, rows
from ops.linformer import Sums
from ops.masks import AttentionMask

Weights = Literal['static', 'dynamic']


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinformerConfig(AttentionConfig):
  """The heads of a layer, and the chunks that are summed up.

  The window is at least a chunk, so that a query sees all of its own chunk.
  """

  chunk: int  # tokens
  summaries: int  # of each chunk
  weights: Weights = 'static'  # of the sums: by the place in the chunk, or by the token
  causal: bool = True
  packs = separates = False  # chunks begin with the row

  def __post_init__(self):
    super().__post_init__()
    check_count('chunk', self.chunk)
    check_count('summaries', self.summaries)
    check_choice('weights', self.weights, get_args(Weights))
    if self.lends:
      raise ValueError('the summaries of a Linformer are its own; it lends nothing to later layers')
    if not self.causal:
      raise ValueError(
        'Linformer as published sums up all tokens of a text, those to come too, which a decoder '
        'must not see; leave causal at True, or use ops.linformer.published'
      )
    if self.window is None or self.window < self.chunk:
      raise ValueError(
        f'window must be at least the chunk of {self.chunk} tokens, not {self.window}: '
        'a query sees its own chunk through the window alone'
      )

  def build(self, stream, *, rngs, dtype):
    return Linformer(self, stream, rngs=rngs, dtype=dtype)

  def edges(self, name):
    first, *others = super().edges(name)
    if self.weights == 'static' or not isinstance(first.through, Normed):
      return (first, *others)
    readers = (*first.consumers, f'{name}.weigh')
    return (dataclasses.replace(first, consumers=readers), *others)

  def cache(self, batch, capacity, dtype, format):
    """Float formats only: sums grow with each token, and codes would round them at each step."""
    if format not in ('float', 'bf16'):
      raise ValueError(
        f"summaries of a Linformer are added up in the cache, so it has no {format!r}; use 'float' "
        "or 'bf16'"
      )
    return SummaryCache.empty(self, batch, capacity, jnp.bfloat16 if format == 'bf16' else dtype)

  @property
  def cached(self):
    """Numbers per token beyond the window."""
    return -(-2 * self.kv_heads * self.head_width * self.summaries // self.chunk)

  def seen(self, context):
    return min(context, self.window) + context // self.chunk * self.summaries

  def prefill_flops(self, length):
    window = super().prefill_flops(length)
    return window + self._flops(self.summaries * (length / self.chunk - 1) / 2)


@caches.register
@dataclasses.dataclass(frozen=True)
class SummaryCache(Cache):
  """The tokens of the window, and the sums of all chunks, the last of which may be incomplete.

  A row goes on from its length or begins anew at position 0. It cannot be set back, because sums
  are not kept token by token.
  """

  window: RollingCache
  k_BPRKH: jax.Array = caches.array('BP_KH')
  v_BPRKH: jax.Array = caches.array('BP_KH')
  peak_BPR: jax.Array = caches.array('BP_')
  total_BPR: jax.Array = caches.array('BP_')
  chunk: int = caches.static(default=1)

  @classmethod
  def empty(cls, config: LinformerConfig, batch: int, capacity: int, dtype) -> 'SummaryCache':
    heads = config.kv_heads, config.head_width
    held = min(config.window, capacity)
    sides = [Floats.empty((batch, held, *heads), dtype) for _ in range(2)]
    flat = (batch, -(-capacity // config.chunk), config.summaries)
    sums = [jnp.zeros((*flat, *heads)) for _ in range(2)]
    return cls(RollingCache.of(*sides), *sums, *(jnp.zeros(flat) for _ in range(2)), config.chunk)

  @property
  def capacity(self):
    return self.peak_BPR.shape[1] * self.chunk

  @property
  def sums(self) -> Sums:
    return Sums(self.k_BPRKH, self.v_BPRKH, self.peak_BPR, self.total_BPR)

  def added(self, new: Sums, positions_BT: jax.Array) -> 'SummaryCache':
    """Adds the sums over new tokens, from the chunk of the first of them on."""
    begin_B1 = positions_BT[:, :1]
    place_BP = jnp.arange(self.peak_BPR.shape[1], dtype=jnp.int32)[None] - begin_B1 // self.chunk
    here_BP = (place_BP >= 0) & (place_BP < new.peak_BPR.shape[1])
    # The first chunk goes on, unless it begins with the new tokens; the others are new.
    goes_on_BP = ((place_BP == 0) & (begin_B1 % self.chunk > 0)) | ~here_BP
    at_BP = jnp.clip(place_BP, 0, new.peak_BPR.shape[1] - 1)
    there = lambda mask_BP, x: mask_BP.reshape(*mask_BP.shape, *(1,) * (x.ndim - 2))
    take = lambda x: jnp.take_along_axis(x, there(at_BP, x), 1) * there(here_BP, x)
    old = jax.tree.map(lambda x: x * there(goes_on_BP, x), self.sums)
    taken = jax.tree.map(take, new)
    # An empty side must not raise the peak of the other one.
    either = lambda a, b, empty: jnp.where(there(empty, a), b, a)
    old = dataclasses.replace(old, peak_BPR=either(old.peak_BPR, taken.peak_BPR, ~goes_on_BP))
    taken = dataclasses.replace(taken, peak_BPR=either(taken.peak_BPR, old.peak_BPR, ~here_BP))
    sums = linformer.joined(old, taken)
    return dataclasses.replace(
      self, **{field.name: getattr(sums, field.name) for field in dataclasses.fields(Sums)}
    )


class Chunks(nnx.Module):
  """Weights of the sums by the place in the chunk, [S, R] for keys and for values."""

  def __init__(self, config: LinformerConfig, *, rngs, dtype):
    shape = (config.chunk, config.summaries)
    draw = lambda: nnx.Param(jax.random.normal(rngs.params(), shape, dtype) / config.chunk**0.5)
    self.keys, self.values = draw(), draw()
    self.axes = ('_', '_')


class Linformer(Attention):
  """Multi-head attention to a window of tokens and to summaries of the chunks before."""

  def __init__(self, config: LinformerConfig, stream: StreamConfig, *, rngs, dtype):
    super().__init__(config, stream, rngs=rngs, dtype=dtype)
    static = config.weights == 'static'
    self.chunks = Chunks(config, rngs=rngs, dtype=dtype) if static else None
    shape, make = (stream.width, config.summaries), {'bias': False, 'rngs': rngs, 'dtype': dtype}
    self.weigh = None if static else Linear(shape, axes=('D', '_'), **make)

  def attend(self, x_BTD, q_BTNH, k_BTKH, v_BTKH, mask: AttentionMask, cache, **scores):
    if mask.q_segments_BT is not None:
      raise ValueError(
        'chunks of a Linformer begin with the row, so documents in it cannot be told apart; give '
        'it a row for each, or join them (PackedDataset.joined)'
      )
    chunk, sinks_N = self.config.chunk, scores.pop('sinks_N')
    if cache is None:
      new = self._sums(x_BTD, k_BTKH, v_BTKH, mask.q_positions_BT, _from_start)
      return None, linformer.attend(q_BTNH, k_BTKH, v_BTKH, mask, new, chunk, sinks_N, **scores)
    new = self._sums(x_BTD, k_BTKH, v_BTKH, mask.q_positions_BT, _from_anywhere)
    cache = cache.added(new, mask.q_positions_BT)
    window, source = cache.window.taken(k_BTKH, v_BTKH, mask.q_positions_BT)
    seen = AttentionMask(mask.q_positions_BT, source.positions_BS, pattern=mask.pattern)
    near = source.keys.x_BSKH, source.values.x_BSKH, seen
    y_BTNH = linformer.attend(q_BTNH, *near, cache.sums, chunk, sinks_N, **scores)
    return dataclasses.replace(cache, window=window), y_BTNH

  def _sums(self, x_BTD, k_BTKH, v_BTKH, positions_BT, in_chunks) -> Sums:
    """The sums over new tokens, from the chunk of the first of them on."""
    size = self.config.chunk
    cut = lambda new: in_chunks(new, size, positions_BT[:, 0] % size)
    real_BPS = cut(caches.is_token(positions_BT).astype(jnp.int8)) > 0
    keys, values = cut(k_BTKH), cut(v_BTKH)
    if self.chunks is not None:
      weights = self.chunks.keys.get_value(), self.chunks.values.get_value()
      return linformer.static_sums(keys, values, real_BPS, *weights)
    return linformer.dynamic_sums(keys, values, real_BPS, cut(self.weigh(x_BTD)))


def _from_start(new: jax.Array, size: int, first_B: jax.Array) -> jax.Array:
  """Cuts tokens into chunks [B, P, S, ...], the first of which begins with the first token."""
  del first_B
  rest = [(0, 0)] * (new.ndim - 2)
  filled = jnp.pad(new, [(0, 0), (0, -new.shape[1] % size), *rest])
  return filled.reshape(len(new), -1, size, *new.shape[2:])


def _from_anywhere(new: jax.Array, size: int, first_B: jax.Array) -> jax.Array:
  """Cuts tokens into chunks, with zeros in the first one for places before the first token."""
  chunks = (new.shape[1] + size - 2) // size + 1
  all_ = jnp.zeros((len(new), chunks * size, *new.shape[2:]), new.dtype)
  return rows.write(all_, new, first_B).reshape(len(new), chunks, size, *new.shape[2:])
