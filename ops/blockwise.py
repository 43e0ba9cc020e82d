"""Eight-bit codes for arrays of any range: dynamic tree quantization in blocks.

Dettmers et al. (2022), "8-bit Optimizers via Block-wise Quantization",
https://arxiv.org/abs/2110.02861. A code is a sign, a decimal exponent in unary and a linear
fraction in the bits that are left, so small numbers have few digits and large ones many. Blocks of
256 neighbours along the last axis share one float32 scale, their largest magnitude; the last block
of a row may be shorter. A code costs one byte, and a scale 4 / 256 of one.

The tables are those of bitsandbytes. Its blocks run over the flat array. Here they stay within a
row, so codes keep the shape of the array and its sharding, and a shard whose part of the last axis
is a multiple of 256 has its blocks to itself. The largest magnitude does not depend on the order of
the comparisons, so a sharded array has the same codes as a whole one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256
DECADES = 7
_LEAST = 1e-38  # a block of zeros is divided by it


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['codes', 'scales'], meta_fields=['signed']
)
@dataclasses.dataclass(frozen=True)
class Blockwise:
  """An array as codes of the same shape and one scale per block of the last axis.

  Without signs, all 256 codes are for numbers from 0 on.
  """

  codes: jax.Array  # uint8 [..., O]
  scales: jax.Array  # float32 [..., blocks]
  signed: bool

  def dense(self) -> jax.Array:
    """The array that the codes stand for, float32 [..., O]."""
    values = jnp.asarray(table(self.signed))[self.codes.astype(jnp.int32)]
    return values * _to_elements(self.scales, self.codes.shape[-1])


@functools.cache
def table(signed: bool) -> np.ndarray:
  """The numbers that the 256 codes stand for, in increasing order, float32.

  Each of seven decades has equal intervals, twice as many as the decade below it, and a code stands
  for the middle of an interval. Zero and one are added.
  """
  found = [np.zeros(1, np.float32), np.ones(1, np.float32)]
  for decade in range(DECADES):
    intervals = 2**decade if signed else 2 ** (decade + 1)
    edges = _linspace(intervals)
    middles = (edges[:-1] + edges[1:]) / np.float32(2)
    values = np.float32(10.0 ** (decade - DECADES + 1)) * middles
    found += [values, -values] if signed else [values]
  return np.sort(np.concatenate(found))


def quantize(x: jax.Array, *, signed: bool) -> Blockwise:
  """Rounds an array [..., O] to the nearest codes.

  Without signs, x must not be negative, and a positive number never becomes zero: a second moment
  of zero under a first moment that is not would make an update of any size.
  """
  scales = _largest(x)
  scaled = x * _to_elements(1.0 / jnp.maximum(scales, _LEAST), x.shape[-1])
  codes = _nearest(jnp.clip(scaled, -1.0, 1.0), signed)
  if not signed:
    codes = jnp.where((x > 0) & (codes == 0), jnp.uint8(1), codes)
  return Blockwise(codes, scales, signed)


def blocks(length: int) -> int:
  """The number of blocks of a last axis."""
  return -(-length // BLOCK)


def _nearest(x: jax.Array, signed: bool) -> jax.Array:
  """The codes of the nearest values of the table, for x within -1 and 1; ties go down.

  The leading bits of a float32 name a short interval, in which at most one bound between two codes
  lies. So a code is looked up by these bits and corrected by one comparison, which XLA:CPU does
  several times faster than the eight steps of a binary search.
  """
  first, bounds = _search_tables(signed)
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  magnitude = (bits & 0x7FFFFFFF) >> _DROPPED
  slot = jnp.maximum(magnitude - _LEAST_SLOT, 0) + jnp.where(bits < 0, _SLOTS, 0)
  code = jnp.asarray(first)[slot]
  return code + (x > jnp.asarray(bounds)[code.astype(jnp.int32)]).astype(jnp.uint8)


_DROPPED = 23 - 7  # of the bits of a float32: its exponent and 7 bits of its fraction are kept
_LEAST_SLOT = (127 - 24) << 7  # slot 0 holds all magnitudes below 2 ** -24, less than any bound
_SLOTS = (24 << 7) + 1  # the last one holds 1


@functools.cache
def _search_tables(signed: bool) -> tuple[np.ndarray, np.ndarray]:
  """The number of bounds below each slot, uint8 [2 * slots], and the bounds between codes."""
  values = table(signed)
  bounds = (values[:-1] + values[1:]) / np.float32(2)
  edges = ((np.arange(_SLOTS + 1) + _LEAST_SLOT) << _DROPPED).astype(np.int32).view(np.float32)
  edges[0] = 0
  positive = np.searchsorted(bounds, edges[:-1], side='left')
  # The lower edge of a negative slot is not in it, so a bound there is below all of the slot.
  negative = np.searchsorted(bounds, -edges[1:], side='right')
  below = np.concatenate([positive, negative]).astype(np.uint8)
  return below, np.append(bounds, np.float32(np.inf))


def _largest(x: jax.Array) -> jax.Array:
  """The largest magnitude in each block, [..., blocks]."""
  *lead, length = x.shape
  short = [(0, 0)] * len(lead) + [(0, -length % BLOCK)]
  return jnp.max(jnp.abs(jnp.pad(x, short)).reshape(*lead, blocks(length), BLOCK), axis=-1)


def _to_elements(scales: jax.Array, length: int) -> jax.Array:
  """Repeats each block's scale for its elements, [..., length]."""
  shape = (*scales.shape, BLOCK)
  repeated = jnp.broadcast_to(scales[..., None], shape).reshape(*scales.shape[:-1], -1)
  return repeated[..., :length]


def _linspace(intervals: int) -> np.ndarray:
  """Equal steps from 0.1 to 1, from either end, each value rounded once to float32."""
  low, high = np.float32(0.1), np.float32(1.0)
  step = np.float64((high - low) / np.float32(intervals))
  up = np.arange(intervals + 1)
  lower, upper = np.float64(low) + step * up, np.float64(high) - step * up[::-1]
  return np.where(2 * up < intervals + 1, lower, upper).astype(np.float32)
