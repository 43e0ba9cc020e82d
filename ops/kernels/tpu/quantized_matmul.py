"""Multiplies by 4-bit codes on a TPU, decoding them by a table lookup in VMEM.

XLA:TPU fuses the conversion of integers into a product, so uniform formats with large groups need
no kernel (ops/quantized.py). But it writes the values of a codebook (NF4) to memory first, four
times the bytes, and it copies integers whose groups are smaller than its tiles. This kernel loads a
block of 4-bit codes into VMEM, looks up the value of each code in a row of 128 lanes that holds the
codebook, passes the values to the matrix unit, and scales the sum of a group in float32.

Grid: rows by outputs by inputs, the inputs innermost. A block is at most 128 rows by 512 outputs by
about 1,024 inputs (256 KiB of codes). The sums stay in VMEM until the last inputs are added.
Activations in bfloat16 are multiplied in bfloat16; all others in float32, at JAX's default
precision.

The parts of blocks past the last input or output hold arbitrary codes. The activations and scales
there are zero, and outputs past the end are not written. With many rows the kernel is slower than a
product with bfloat16 weights, because it decodes the weights once per 128 rows.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
BLOCK_OUTPUTS = 512
BLOCK_INPUTS = 1024
BLOCK_ROWS = 128
PIECES = (256, 128, 64, 32)  # inputs that are multiplied at a time, all of one group


def piece(group_size: int) -> int | None:
  """Returns how many inputs of a group are multiplied at a time, or None if no size divides it."""
  return next((size for size in PIECES if group_size % size == 0), None)


@functools.partial(jax.jit, static_argnames=('codebook', 'interpret'))
def product(
  x_TI: jax.Array,
  codes_IO: jax.Array,
  scales_JO: jax.Array,
  codebook: tuple[float, ...],
  interpret: bool = False,
) -> jax.Array:
  """Multiplies x by codebook[codes] * scales: float32 [T, O].

  codes: uint4, or int4 with the code c < 0 at index c + 16 of the codebook. scales: bfloat16 or
  float32. `piece` of the group size must not be None.
  """
  (rows, inputs), outputs = x_TI.shape, codes_IO.shape[1]
  size = piece(inputs // len(scales_JO))
  scales_JO = jnp.repeat(scales_JO, inputs // size // len(scales_JO), axis=0)
  wide = x_TI.dtype if x_TI.dtype == jnp.bfloat16 else jnp.float32
  pieces = len(scales_JO)
  at_once = min(pieces, max(SUBLANES, BLOCK_INPUTS // size))
  block_rows = min(BLOCK_ROWS, -(-rows // SUBLANES) * SUBLANES)
  width = min(BLOCK_OUTPUTS, -(-outputs // LANES) * LANES)
  table = jnp.zeros((1, LANES), jnp.float32).at[0, : len(codebook)].set(jnp.asarray(codebook))
  filled = ((0, -pieces % at_once), (0, -rows % block_rows), (0, 0))
  x_JTg = jnp.pad(x_TI.astype(wide).reshape(rows, pieces, size).transpose(1, 0, 2), filled)
  y_TO = pl.pallas_call(
    functools.partial(_kernel, size, pieces),
    grid=(x_JTg.shape[1] // block_rows, pl.cdiv(outputs, width), x_JTg.shape[0] // at_once),
    in_specs=[
      pl.BlockSpec((at_once, block_rows, size), lambda t, o, j: (j, t, 0)),
      pl.BlockSpec((at_once * size, width), lambda t, o, j: (j, o)),
      pl.BlockSpec((at_once, width), lambda t, o, j: (j, o)),
      pl.BlockSpec((1, LANES), lambda t, o, j: (0, 0)),
    ],
    out_specs=pl.BlockSpec((block_rows, width), lambda t, o, j: (t, o)),
    out_shape=jax.ShapeDtypeStruct((x_JTg.shape[1], outputs), jnp.float32),
    scratch_shapes=[pltpu.VMEM((block_rows, width), jnp.float32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
    cost_estimate=_cost(x_JTg, codes_IO, scales_JO),
    interpret=interpret,
    name='codebook_product',
  )(x_JTg, codes_IO, scales_JO, table)
  return y_TO[:rows]


def _kernel(size, pieces, x_ref, codes_ref, scales_ref, table_ref, y_ref, sum_ref):
  block = pl.program_id(2)

  @pl.when(block == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  for j in range(x_ref.shape[0]):
    codes = codes_ref[j * size : (j + 1) * size, :].astype(jnp.int32) & 15
    values = _look_up(table_ref[...], codes).astype(x_ref.dtype)
    y = jnp.dot(x_ref[j], values, preferred_element_type=jnp.float32)
    scale = scales_ref[j : j + 1, :].astype(jnp.float32)
    exists = block * x_ref.shape[0] + j < pieces
    sum_ref[...] += y * jnp.broadcast_to(jnp.where(exists, scale, 0), y.shape)

  @pl.when(block == pl.num_programs(2) - 1)
  def _():
    y_ref[...] = sum_ref[...]


def _look_up(table, codes):
  # A gather across lanes works on registers of 128 lanes.
  table = jnp.broadcast_to(table, (codes.shape[0], LANES))
  return jnp.concatenate(
    [
      jnp.take_along_axis(table, codes[:, i : i + LANES], axis=1, mode='promise_in_bounds')
      for i in range(0, codes.shape[1], LANES)
    ],
    axis=1,
  )


def _cost(x_JTg, codes_IO, scales_JO) -> pl.CostEstimate:
  rows = x_JTg.shape[1]
  return pl.CostEstimate(
    flops=2 * rows * math.prod(codes_IO.shape),
    bytes_accessed=codes_IO.size // 2 + scales_JO.nbytes + x_JTg.nbytes,
    transcendentals=0,
  )
