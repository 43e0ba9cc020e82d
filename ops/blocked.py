"""Exact attention in blocks of queries and keys, without the scores of all pairs.

For each block of queries, a loop goes over the blocks of keys that any of them may see, with the
softmax kept up online: a larger score scales down what was summed before (Milakov and Gimelshein,
2018, https://arxiv.org/abs/1805.02867). The backward pass computes the scores anew from the saved
logarithms of the sums (Dao et al., 2022, FlashAttention, https://arxiv.org/abs/2205.14135). Memory
is O(T + S) for each head instead of O(T * S), and blocks outside of the causal triangle or of the
window cost nothing: causal attention takes half of the products, and a window as many as are in it.

Which blocks are visited follows from the smallest and the largest position in each, so any mask is
exact, and masks whose positions are sorted are fast. All sums are in float32.

Parts of the keys can be attended to one by one, in any layout: `partial` gives what is found in a
part, with the logarithms of its sums, and `merged` puts the parts together. `gradients` is the
backward pass of a part, for callers whose own backward pass visits the parts again.

On CPUs the forward pass can be the native one (`ops.kernels.cpu.attend.prefill`), which saves the
same for the backward pass.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange

from ops.kernels.cpu import attend
from ops.masks import AttentionMask
from ops.patterns import Pattern

# Up to so many keys that a query sees -> queries and keys of a block.
SIZES = {1024: (128, 128), 4096: (256, 256)}
LARGEST = (256, 512)
MASKED = -1e30  # far below any score, but finite
BEFORE_ALL = -1  # the position of a query that sees no key
AFTER_ALL = jnp.iinfo(jnp.int32).max  # the position of a key that no query sees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """What is the same for all blocks, and how many queries and keys one has."""

  scale: float
  softcap: float | None
  pattern: Pattern | None
  queries: int
  keys: int
  native: bool


def partial(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: AttentionMask,
  sinks_N: jax.Array | None,
  *,
  scale: float,
  softcap: float | None,
  sizes: tuple[int, int] | None = None,
  native: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """`ops.attention.attention` to some of the keys: (y_BTNH, logs_BTN).

  `logs_BTN` are the logarithms of the sums over these keys that normalise the softmax, float32;
  below -1e29 for a query that sees none of them. `sizes` are the queries and keys of a block (None:
  what was fastest on a CPU). With `native`, the forward pass on CPUs is the native kernel, which
  must have no `obstacle`.
  """
  scores = _described(mask, k_BSKH.shape[1], sizes, scale=scale, softcap=softcap, native=native)
  kv_heads = k_BSKH.shape[2]
  sinks_KG = None if sinks_N is None else rearrange(sinks_N, '(K G) -> K G', K=kv_heads)
  found = _attend(scores, _by_head(q_BTNH, kv_heads), k_BSKH, v_BSKH, sinks_KG, _marks(mask))
  y_BKGTH, logs_BKGT = found
  y_BTNH = rearrange(y_BKGTH, 'B K G T H -> B T (K G) H')
  return y_BTNH, rearrange(logs_BKGT, 'B K G T -> B T (K G)')


def merged(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
  """Attention to all keys from that to disjoint parts of them, as `partial` gives it."""
  (y_BTNH, logs_BTN), *others = parts
  dtype, y_BTNH = y_BTNH.dtype, y_BTNH.astype(jnp.float32)
  for new_BTNH, new_BTN in others:
    both_BTN = jnp.logaddexp(logs_BTN, new_BTN)
    shares = (jnp.exp(one - both_BTN)[..., None] for one in (logs_BTN, new_BTN))
    y_BTNH = sum(share * one for share, one in zip(shares, (y_BTNH, new_BTNH)))
    logs_BTN = both_BTN
  return y_BTNH.astype(dtype), logs_BTN


def gradients(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: AttentionMask,
  found: tuple[jax.Array, jax.Array],
  y_bar_BTNH: jax.Array,
  *,
  scale: float,
  softcap: float | None,
  sizes: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of q, k and v through some of the keys, from that of the attention to all of them.

  `found` is what `merged` gave of all parts. The gradients of q of all parts add up. In float32.
  """
  scores = _described(mask, k_BSKH.shape[1], sizes, scale=scale, softcap=softcap, native=False)
  by_head = functools.partial(_by_head, kv_heads=k_BSKH.shape[2])
  saved = (by_head(q_BTNH), k_BSKH, v_BSKH, _marks(mask), *map(by_head, found))
  y_bar = by_head(y_bar_BTNH).astype(jnp.float32)
  q_bar, k_bar, v_bar = _bars(scores, saved, y_bar, _delta(saved, y_bar))
  return rearrange(q_bar, 'B K G T H -> B T (K G) H'), k_bar, v_bar


def _described(mask: AttentionMask, keys: int, sizes: tuple[int, int] | None, **score) -> Scores:
  seen = keys if mask.pattern is None else mask.pattern.seen(keys)
  of_block = sizes or next((size for most, size in SIZES.items() if seen <= most), LARGEST)
  keys = min(of_block[1], keys)
  return Scores(pattern=mask.pattern, queries=of_block[0], keys=keys, **score)


def _by_head(x_BTN, kv_heads: int):
  return jnp.moveaxis(rearrange(x_BTN, 'B T (K G) ... -> B T K G ...', K=kv_heads), 1, 3)


def _marks(mask: AttentionMask):
  """Positions and segments of the queries and of the keys: ((BT, BT or None), (BS, BS or None))."""
  queries = mask.q_positions_BT, mask.q_segments_BT
  return queries, (mask.k_positions_BS, mask.k_segments_BS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scores: Scores, q_BKGTH, k_BSKH, v_BSKH, sinks_KG, marks):
  return _forward(scores, q_BKGTH, k_BSKH, v_BSKH, sinks_KG, marks)[0]


def _forward(scores, *arrays):
  in_blocks = functools.partial(_in_blocks, scores)
  if scores.native:
    native = functools.partial(_native, scores)
    y_BKGTH, logs_BKGT = jax.lax.platform_dependent(*arrays, cpu=native, default=in_blocks)
  else:
    y_BKGTH, logs_BKGT = in_blocks(*arrays)
  found = y_BKGTH, logs_BKGT
  return found, (*arrays, *found)


def _native(scores, q_BKGTH, k_BSKH, v_BSKH, sinks_KG, marks):
  kv_heads = q_BKGTH.shape[1]
  (q_positions_BT, q_segments_BT), (k_positions_BS, k_segments_BS) = marks
  mask = AttentionMask(
    q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, pattern=scores.pattern
  )
  y_BTNH, logs_BNT = attend.prefill(
    rearrange(q_BKGTH, 'B K G T H -> B T (K G) H'),
    k_BSKH,
    v_BSKH,
    mask,
    None if sinks_KG is None else sinks_KG.reshape(-1),
    scale=scores.scale,
    softcap=scores.softcap,
  )
  y_BKGTH = rearrange(y_BTNH, 'B T (K G) H -> B K G T H', K=kv_heads)
  return y_BKGTH, rearrange(logs_BNT, 'B (K G) T -> B K G T', K=kv_heads)


def _in_blocks(scores, q_BKGTH, k_BSKH, v_BSKH, sinks_KG, marks):
  length = q_BKGTH.shape[3]
  queries = _query_blocks(q_BKGTH, marks[0], scores.queries)
  keys = _Keys.of(k_BSKH, v_BSKH, marks[1], scores.keys)

  def one(_, block):
    q, q_marks = block

    def add(j, sums):
      k, v, k_marks = keys.block(j)
      return _add(sums, _scores(scores, q, k, q_marks, k_marks), v)

    start = MASKED / 2  # above what is masked, so that its weight is exactly zero
    shape = q.shape[:-1]
    sums = jnp.full(shape, start), jnp.zeros(shape), jnp.zeros(q.shape, jnp.float32)
    blocks, count = keys.seen(scores.pattern, q_marks)
    peak, total, out = jax.lax.fori_loop(0, count, lambda i, sums: add(blocks[i], sums), sums)
    if sinks_KG is not None:
      sink = jnp.broadcast_to(sinks_KG.astype(jnp.float32)[None, :, :, None], shape)
      top = jnp.maximum(peak, sink)
      out = out * jnp.exp(peak - top)[..., None]
      peak, total = top, total * jnp.exp(peak - top) + jnp.exp(sink - top)
    total = jnp.where(total == 0, 1.0, total)
    return None, ((out / total[..., None]).astype(q_BKGTH.dtype), peak + jnp.log(total))

  _, (y, logs) = jax.lax.scan(one, None, queries)
  logs_BKGT = rearrange(logs, 'i B K G T -> B K G (i T)')
  return _joined(y)[..., :length, :], logs_BKGT[..., :length]


def _backward(scores, saved, bars):
  q_BKGTH, k_BSKH, v_BSKH, sinks_KG, marks, *found = saved
  y_bar, logs_bar = (bar.astype(jnp.float32) for bar in bars)
  saved = (q_BKGTH, k_BSKH, v_BSKH, marks, *found)
  delta_BKGT = _delta(saved, y_bar) - logs_bar
  found_bars = _bars(scores, saved, y_bar, delta_BKGT)
  cast = (bar.astype(x.dtype) for bar, x in zip(found_bars, (q_BKGTH, k_BSKH, v_BSKH)))
  return *cast, _sinks_bar(sinks_KG, found[1], delta_BKGT), None


def _delta(saved, y_bar):
  return jnp.sum(y_bar * saved[4].astype(jnp.float32), -1)


def _bars(scores, saved, y_bar, delta_BKGT):
  """Gradients of q, k and v in float32."""
  q_BKGTH, k_BSKH, v_BSKH, marks, _, logs_BKGT = saved
  queries = _query_blocks(q_BKGTH, marks[0], scores.queries)
  filled = lambda x: _filled(x, scores.queries, 3)
  cut = lambda x: rearrange(filled(x), 'B K G (i T) ... -> i B K G T ...', T=scores.queries)
  keys = _Keys.of(k_BSKH, v_BSKH, marks[1], scores.keys)

  def one(sums, block):
    (q, q_marks), bar, logs, delta = block

    def add(j, sums):
      q_bar, k_bar, v_bar = sums
      k, v, k_marks = keys.block(j)
      found = _scores(scores, q, k, q_marks, k_marks)
      weights = jnp.exp(found - logs[..., None])
      new_v = _product('BKGTS,BKGTH->BSKH', weights, bar)
      found_bar = weights * (_product('BKGTH,BSKH->BKGTS', bar, v) - delta[..., None])
      if scores.softcap is not None:
        found_bar = found_bar * (1 - jnp.square(jnp.clip(found / scores.softcap, -1, 1)))
      found_bar = found_bar * scores.scale
      new_k = _product('BKGTS,BKGTH->BSKH', found_bar, q)
      q_bar = q_bar + _product('BKGTS,BSKH->BKGTH', found_bar, k)
      return q_bar, _added(k_bar, new_k, j), _added(v_bar, new_v, j)

    start = jnp.zeros(q.shape, jnp.float32), *sums
    blocks, count = keys.seen(scores.pattern, q_marks)
    q_bar, *sums = jax.lax.fori_loop(0, count, lambda i, sums: add(blocks[i], sums), start)
    return tuple(sums), q_bar

  nothing = jnp.zeros(keys.k_BSKH.shape, jnp.float32)
  blocks = (queries, cut(y_bar), cut(logs_BKGT), cut(delta_BKGT))
  (k_bar, v_bar), q_bar = jax.lax.scan(one, (nothing, nothing), blocks)
  q_bar = _joined(q_bar)[..., : q_BKGTH.shape[3], :]
  k_bar, v_bar = (bar[:, : k_BSKH.shape[1]] for bar in (k_bar, v_bar))
  return q_bar, k_bar, v_bar


_attend.defvjp(_forward, _backward)


def _sinks_bar(sinks_KG, logs_BKGT, delta_BKGT):
  if sinks_KG is None:
    return None
  weights = jnp.exp(sinks_KG.astype(jnp.float32)[None, :, :, None] - logs_BKGT)
  return -jnp.sum(weights * delta_BKGT, (0, 3)).astype(sinks_KG.dtype)


def _product(form: str, a, b):
  return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _scores(scores: Scores, q, k, q_marks, k_marks):
  """Masked scores of a block, float32 [B, K, G, T, S]."""
  dtype = jnp.promote_types(q.dtype, k.dtype)
  found = scores.scale * _product('BKGTH,BSKH->BKGTS', q.astype(dtype), k.astype(dtype))
  if scores.softcap is not None:
    found = scores.softcap * jnp.tanh(found / scores.softcap)
  (q_positions_BT, q_segments_BT), (k_positions_BS, k_segments_BS) = q_marks, k_marks
  mask = AttentionMask(
    q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, pattern=scores.pattern
  )
  return jnp.where(mask.dense()[:, None, None], found, MASKED)


def _add(sums, found, v):
  """Adds the values of a block to what the blocks before have given."""
  peak, total, out = sums
  top = jnp.maximum(peak, found.max(-1))
  weights, factor = jnp.exp(found - top[..., None]), jnp.exp(peak - top)
  new = _product('BKGTS,BSKH->BKGTH', weights.astype(v.dtype), v)
  return top, total * factor + weights.sum(-1), out * factor[..., None] + new


@dataclasses.dataclass(frozen=True)
class _Keys:
  """Keys and values, filled up to whole blocks, with the positions that each block spans."""

  k_BSKH: jax.Array
  v_BSKH: jax.Array
  marks: tuple
  size: int

  @classmethod
  def of(cls, k_BSKH, v_BSKH, marks, size) -> '_Keys':
    positions_BS, segments_BS = marks
    marks = _filled(positions_BS, size, 1, AFTER_ALL), _filled(segments_BS, size, 1)
    return cls(_filled(k_BSKH, size, 1), _filled(v_BSKH, size, 1), marks, size)

  def block(self, j):
    cut = lambda a: jax.lax.dynamic_slice_in_dim(a, j * self.size, self.size, axis=1)
    return cut(self.k_BSKH), cut(self.v_BSKH), jax.tree.map(cut, self.marks)

  def seen(self, pattern: Pattern | None, q_marks) -> tuple[jax.Array, jax.Array]:
    """The blocks that some query of a block may see, in order, and how many there are."""
    q_positions_BT, k_positions_BS = q_marks[0], self.marks[0]
    k_positions = rearrange(k_positions_BS, 'B (j S) -> j (B S)', S=self.size)
    # A padded query sees nothing, so it has no say in the first block.
    real_BT = q_positions_BT != BEFORE_ALL
    last, first = q_positions_BT.max(), jnp.where(real_BT, q_positions_BT, AFTER_ALL).min()
    within = k_positions.min(1) <= last
    if pattern is not None:
      # Slots that hold no key lie after all; they do not make a block reach into the pattern.
      held = jnp.where(k_positions == AFTER_ALL, BEFORE_ALL, k_positions)
      within &= pattern.touches((first, last), (k_positions.min(1), held.max(1)))
    return jnp.nonzero(within, size=len(within))[0], within.sum()


def _query_blocks(q_BKGTH, marks, size):
  """Blocks of queries with their positions and segments, on a leading axis."""
  positions_BT, segments_BT = marks
  q = rearrange(_filled(q_BKGTH, size, 3), 'B K G (i T) H -> i B K G T H', T=size)
  cut = lambda a: a if a is None else rearrange(a, 'B (i T) -> i B T', T=size)
  positions = cut(_filled(positions_BT, size, 1, BEFORE_ALL))
  return q, (positions, cut(_filled(segments_BT, size, 1)))


def _joined(blocks):
  return rearrange(blocks, 'i B K G T H -> B K G (i T) H')


def _filled(a, size: int, axis: int, value=0):
  if a is None:
    return None
  pad = [(0, 0)] * a.ndim
  pad[axis] = (0, -a.shape[axis] % size)
  return jnp.pad(a, pad, constant_values=value)


def _added(sums, new, j):
  """Adds the gradients of block j to those of all blocks."""
  size = new.shape[1]
  part = jax.lax.dynamic_slice_in_dim(sums, j * size, size, axis=1) + new
  return jax.lax.dynamic_update_slice_in_dim(sums, part, j * size, axis=1)
