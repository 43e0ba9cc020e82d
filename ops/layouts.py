"""Attention by sparse patterns, in layouts in which the keys of each part lie side by side.

`ops.blocked` visits the blocks of keys that a pattern touches. A dilated window touches all of its
span, and single columns touch everything. Of whole sequences, the parts of a pattern are therefore
computed one by one, each without what the parts before it see, and then merged:

  Window(size, step)   the tokens of each residue modulo `step` are rows of their own
  First, Every         their keys are taken out
  Rows                 its queries are taken out
  others               as they lie, together

The cost is that of the keys that are seen, in work and in memory. Masks of other positions (packed
documents, a cache) are computed as they lie, which is exact too, but costs what is touched.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from einops import rearrange

from ops import blocked, patterns
from ops.kernels.cpu import attend
from ops.masks import AttentionMask
from ops.patterns import Pattern

SMALLEST_BLOCK = 32
SHORT = 128  # queries of a block, unless there are fewer
Partial = Callable[..., tuple[jax.Array, jax.Array]]  # (q, k, v, mask) -> (y_BTNH, logs_BTN)


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: AttentionMask,
  sinks_N: jax.Array | None,
  *,
  scale: float,
  softcap: float | None,
  native: bool = False,
) -> jax.Array:
  """Computes `ops.attention.attention`; see there.

  With `native`, the parts that have a native kernel are computed by it on CPUs.
  """
  arrays, rest = (q_BTNH, k_BSKH, v_BSKH), sinks_N
  found = []
  for pattern, layout in _parts(mask):
    part = AttentionMask(
      mask.q_positions_BT,
      mask.k_positions_BS,
      mask.q_segments_BT,
      mask.k_segments_BS,
      pattern=pattern,
    )
    compute = functools.partial(
      blocked.partial, scale=scale, softcap=softcap, sizes=_sizes(pattern)
    )
    found.append(layout(functools.partial(_in_blocks, compute, rest, native), *arrays, part))
    rest = None  # the sinks count once
  return blocked.merged(found)[0]


def to_first(
  queries: tuple[jax.Array, jax.Array],
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: AttentionMask,
  sinks_N: jax.Array | None,
  *,
  scale: float,
  softcap: float | None,
) -> jax.Array:
  """Attention by a window with first tokens, for which there are other queries: y_BTNH.

  `queries` are (q_BTNH, those for the first tokens). Raises ValueError for other patterns.
  """
  window, count = mask.recent or (None, 0)
  if not count:
    raise ValueError(f'queries of their own are for a window with first tokens, not {mask.pattern}')
  first = patterns.First(count)
  near = patterns.Without(patterns.Window(window), first)
  length = queries[0].shape[1]
  sizes = (length, SHORT) if length < SHORT else None
  found = []
  for q_BTNH, pattern, own in zip(queries, (near, first), (sinks_N, None)):
    part = dataclasses.replace(mask, pattern=pattern, contiguous=False)
    compute = functools.partial(blocked.partial, scale=scale, softcap=softcap, sizes=sizes)
    found.append(compute(q_BTNH, k_BSKH, v_BSKH, part, own))
  return blocked.merged(found)[0]


def _in_blocks(compute, sinks_N, native, q, k, v, mask):
  native = native and attend.obstacle(q, k, v, mask) is None
  return compute(q, k, v, mask, sinks_N, native=native)


def _parts(mask: AttentionMask) -> Iterator[tuple[Pattern | None, Callable]]:
  """Disjoint parts of the pattern, with the layout of each."""
  parts = () if mask.pattern is None else mask.pattern.parts
  layouts = {part: _layout(part) if mask.contiguous else None for part in parts}
  straight = [part for part, layout in layouts.items() if layout is None]
  own = [(part, layout) for part, layout in layouts.items() if layout is not None]
  if straight or not parts:
    own = [(_union(straight), _straight), *own]
  before = []
  for pattern, layout in own:
    yield (patterns.Without(pattern, _union(before)) if before else pattern), layout
    before.append(pattern)


def _layout(part: Pattern) -> Callable | None:
  """The layout of a part; None: as it lies."""
  if isinstance(part, patterns.Window) and part.step > 1:
    return functools.partial(_folded, part.step)
  if isinstance(part, patterns.First):
    return functools.partial(_keys, slice(0, part.count))
  if isinstance(part, patterns.Every):
    return functools.partial(_keys, slice(part.start, None, part.stride))
  if isinstance(part, patterns.Rows):
    return functools.partial(_queries, slice(None, None, part.stride))
  return None


def _union(parts: list[Pattern]) -> Pattern | None:
  return functools.reduce(lambda a, b: a | b, parts) if parts else None


def _sizes(pattern: Pattern | None) -> tuple[int, int] | None:
  """Blocks as small as those of the pattern, if it has any."""
  parts = () if pattern is None else pattern.parts
  sizes = [part.size for part in parts if isinstance(part, patterns.RandomBlocks)]
  return (max(min(sizes), SMALLEST_BLOCK),) * 2 if sizes else None


def _straight(partial: Partial, q, k, v, mask):
  return partial(q, k, v, mask)


def _folded(step: int, partial: Partial, q, k, v, mask):
  """The tokens of each residue modulo `step` as rows of their own."""
  length = q.shape[1]

  def fold(x, value=0):
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, -length % step)
    x = jnp.pad(x, pad, constant_values=value)
    return rearrange(x, 'B (T step) ... -> (B step) T ...', step=step)

  pattern = mask.pattern
  if isinstance(pattern, patterns.Window):  # all tokens of a row have one residue
    pattern = patterns.Window(pattern.size * step)
  inner = AttentionMask(
    fold(mask.q_positions_BT, blocked.BEFORE_ALL),
    fold(mask.k_positions_BS, blocked.AFTER_ALL),
    pattern=pattern,
  )
  found = partial(fold(q), fold(k), fold(v), inner)
  unfold = lambda x: rearrange(x, '(B step) T ... -> B (T step) ...', step=step)[:, :length]
  return tuple(map(unfold, found))


def _keys(some: slice, partial: Partial, q, k, v, mask):
  """Attention to some keys alone."""
  inner = AttentionMask(mask.q_positions_BT, mask.k_positions_BS[:, some], pattern=mask.pattern)
  return partial(q, k[:, some], v[:, some], inner)


def _queries(some: slice, partial: Partial, q, k, v, mask):
  """Attention of some queries alone; the others see nothing."""
  inner = AttentionMask(mask.q_positions_BT[:, some], mask.k_positions_BS, pattern=mask.pattern)
  y_BTNH, logs_BTN = partial(q[:, some], k, v, inner)
  nothing = jnp.zeros(q.shape, y_BTNH.dtype), jnp.full(q.shape[:-1], blocked.MASKED, jnp.float32)
  return nothing[0].at[:, some].set(y_BTNH), nothing[1].at[:, some].set(logs_BTN)
