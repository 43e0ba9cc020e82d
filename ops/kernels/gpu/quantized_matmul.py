"""Multiplies by 4-bit weights on an NVIDIA GPU, decoding the codes in registers.

XLA:GPU does not fuse group-wise scales into a product: it writes the widened weight to memory
first. This kernel loads bytes of two codes as they are stored (ops/packing.py), decodes the even
and the odd inputs in registers, multiplies each by its half of the activations on the tensor cores,
and scales the sum of a group in float32. Integer codes become the last bits of a bfloat16 number,
which takes one operation; its constant part is subtracted from the sum of the group. The values of
a codebook (NF4) are chosen by four levels of selections, one per bit of the code.

Grid: rows by outputs by splits of the inputs. A block is 16 rows (64 if there are more than 16) by
128 outputs by 16 to 64 bytes of a column. Splitting the inputs occupies more processors where there
are few outputs; each split writes its own float32 sums, and XLA adds them. Rows and outputs past
the end are masked. Activations in float32 are multiplied in float32.

The kernel uses Pallas for Triton, which JAX plans to remove; only this file depends on it. On an
H200 its products of one matrix were right (experiments/LOG.md); it has not been tuned there.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

BLOCK_OUTPUTS = 128
WARPS = 4
BLOCK_ROWS = (16, 64)  # tensor cores need at least 16
PIECES = (64, 32, 16)  # bytes of a column, all of one group
BFLOAT16_BASE, BFLOAT16_BASE_BITS = 128.0, 0x4300  # one unit in its last place is 1
PROGRAMS = 512  # about four per processor of a large GPU
LARGEST_SPLIT = 16


def piece(group_size: int) -> int | None:
  """Returns how many bytes of a group are multiplied at a time, or None if no size divides it."""
  return next((size for size in PIECES if group_size % (2 * size) == 0), None)


class Codes(NamedTuple):
  """A matrix of 4-bit codes, and the scales and zero points of its J groups of inputs."""

  packed: jax.Array  # uint8 [I / 2, O], the code of an even input in the low bits
  scales_JO: jax.Array
  zeros_JO: jax.Array | None


@functools.partial(jax.jit, static_argnames=('codebook', 'interpret'))
def products(
  x_TI: jax.Array,
  weights: tuple[Codes, ...],
  codebook: tuple[float, ...] | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, ...]:
  """Multiplies x by each of some matrices in one kernel: [T, O] in the dtype of x.

  A weight is its scale times codebook[code] if there is a codebook, times code - zero if there are
  zeros, else times code - 8. All matrices have groups of one size, whose `piece` must not be None.
  """
  rows, inputs = x_TI.shape
  groups = len(weights[0].scales_JO)
  size = piece(inputs // groups)
  block_rows = BLOCK_ROWS[rows > BLOCK_ROWS[0]]
  columns = [pl.cdiv(w.packed.shape[1], BLOCK_OUTPUTS) for w in weights]
  blocks = pl.cdiv(rows, block_rows), sum(columns)
  steps = inputs // (2 * size)
  splits = _splits(steps, PROGRAMS // (blocks[0] * blocks[1]))
  block = functools.partial(
    _block, size=size, count=steps // splits, pieces=steps // groups, codebook=codebook
  )
  sums = pl.pallas_call(
    functools.partial(_each, block, columns),
    grid=(*blocks, splits),
    out_shape=[
      jax.ShapeDtypeStruct((splits, rows, w.packed.shape[1]), jnp.float32) for w in weights
    ],
    compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=3),
    interpret=interpret,
    name='quantized_products',
  )(
    jnp.moveaxis(x_TI.reshape(rows, -1, 2), -1, 0),  # even inputs, odd inputs
    *(array for w in weights for array in w if array is not None),
  )
  return tuple(y__TO.sum(0).astype(x_TI.dtype) for y__TO in sums)


def _each(block, columns, x_ref, *refs):
  """Runs the kernel for the matrix that this program's block of outputs belongs to."""
  inputs, outputs = refs[: -len(columns)], refs[-len(columns) :]
  arrays, first = len(inputs) // len(columns), 0
  row, split = pl.program_id(0), pl.program_id(2)
  for k, (count, y_ref) in enumerate(zip(columns, outputs)):
    column = pl.program_id(1) - first
    own = functools.partial(
      block, (row, column, split), x_ref, *inputs[k * arrays : (k + 1) * arrays], y_ref
    )
    if len(columns) == 1:
      own()
    else:
      pl.when((column >= 0) & (column < count))(own)
    first += count


def _splits(steps: int, wanted: int) -> int:
  """Returns the largest power of two up to min(wanted, LARGEST_SPLIT) that divides `steps`."""
  splits = 1
  while 2 * splits <= min(wanted, LARGEST_SPLIT) and steps % (2 * splits) == 0:
    splits *= 2
  return splits


def _block(program, x_ref, packed_ref, scales_ref, *refs, size, count, pieces, codebook):
  *zeros_refs, y_ref = refs
  existing = x_ref.shape[1]
  block_rows = BLOCK_ROWS[existing > BLOCK_ROWS[0]]
  row, column, split = program
  row, column = row * block_rows, column * BLOCK_OUTPUTS
  rows, columns = pl.ds(row, block_rows), pl.ds(column, BLOCK_OUTPUTS)
  has_row = row + jnp.arange(block_rows) < existing
  has_column = column + jnp.arange(BLOCK_OUTPUTS) < packed_ref.shape[1]
  spread = lambda mask, axis, shape: jnp.broadcast_to(jnp.expand_dims(mask, axis), shape)
  decode = _decoder(codebook, x_ref.dtype, bool(zeros_refs))

  def row_of(ref, group):
    values = triton.load(ref.at[group, columns], mask=has_column, other=0)
    return spread(values.astype(jnp.float32), 0, (block_rows, BLOCK_OUTPUTS))

  def half(odd, step, codes):
    at = x_ref.at[jnp.int32(odd), rows, pl.ds(step * size, size)]
    x = triton.load(at, mask=spread(has_row, 1, (block_rows, size)), other=0)
    precision = 'highest' if x.dtype == jnp.float32 else None
    values = decode.levels(codes).astype(x.dtype)
    y = jnp.dot(x, values, preferred_element_type=jnp.float32, precision=precision)
    return y, x.astype(jnp.float32).sum(1)

  def add(i, sums):
    step = split * count + i
    at = packed_ref.at[pl.ds(step * size, size), columns]
    packed = triton.load(at, mask=spread(has_column, 0, (size, BLOCK_OUTPUTS)), other=0)
    packed, group = packed.astype(decode.dtype), step // pieces
    y_low, sum_low = half(0, step, packed & 15)
    y_high, sum_high = half(1, step, packed >> 4)
    y = y_low + y_high
    offset = jnp.full(y.shape, decode.offset, jnp.float32)
    for zeros_ref in zeros_refs:
      offset += row_of(zeros_ref, group)
    if decode.offset or zeros_refs:
      y -= spread(sum_low + sum_high, 1, y.shape) * offset
    return sums + y * row_of(scales_ref, group)

  start = jnp.zeros((block_rows, BLOCK_OUTPUTS), jnp.float32)
  sums = jax.lax.fori_loop(0, count, add, start)
  exists = spread(has_row, 1, sums.shape) & spread(has_column, 0, sums.shape)
  triton.store(y_ref.at[split, rows, columns], sums, mask=exists)


class _Decoder(NamedTuple):
  """Codes of this dtype in [0, 16) -> what they stand for before scaling, with an offset added."""

  dtype: jnp.dtype
  offset: float
  levels: Callable[[jax.Array], jax.Array]


def _decoder(codebook, dtype, has_zeros) -> _Decoder:
  if codebook is not None:
    return _Decoder(jnp.int32, 0.0, functools.partial(_chosen, codebook=codebook))
  middle = 0.0 if has_zeros else 8.0
  if dtype != jnp.bfloat16:
    return _Decoder(jnp.int32, 0.0, lambda codes: (codes - int(middle)).astype(jnp.float32))
  return _Decoder(jnp.int16, BFLOAT16_BASE + middle, _in_the_fraction)


def _in_the_fraction(codes):
  """Returns BFLOAT16_BASE + code without a conversion: the last four bits of 128 are the code's."""
  base = jnp.int16(BFLOAT16_BASE_BITS)
  return jax.lax.bitcast_convert_type(codes | base, jnp.bfloat16)


def _chosen(codes, codebook):
  values = [jnp.full(codes.shape, value, jnp.float32) for value in codebook]
  while len(values) > 1:
    odd = codes & 1 == 1
    values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2])]
    codes = codes >> 1
  return values[0]
