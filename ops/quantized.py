"""Weights stored as low-bit codes with scales, and rounding to nearest.

A column of a matrix [I, O] is cut along I into J groups; each group has one scale, and an
asymmetric one a zero point:  w = (code - zero) * scale, or w = codebook[code] * scale.

  int8 to int2  uniform; symmetric or asymmetric
  nf4           the 16 quantiles of a normal distribution (Dettmers et al. 2023, QLoRA,
                https://arxiv.org/abs/2305.14314), its scales optionally quantized in turn
  fp8_e4m3      8-bit floats (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433)

Codes of fewer than 8 bits are packed without gaps (ops/packing.py). Rounding is half to even.
Symmetric scales are amax / (2**bits - 1) * 2, so the grid reaches from -2**(bits-1) to
2**(bits-1) - 1 and the largest value of a group is half a step away, as in compressed-tensors. A
scale is rounded to its stored precision before the codes are computed: in bfloat16 that costs the
largest value up to half a step more at 8 bits, and next to nothing at 4. Zero is exactly
representable wherever zero points are integers, so pruned weights stay pruned.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp

from ops import axes, formats, packing
from ops.formats import FORMATS, TINY, Clip, FormatName
from ops.formats import NF4_CODEBOOK as NF4_CODEBOOK
from ops.linear import Matrix, Weight, array, dense, matmul, weight_type

SCALE_BLOCK = 256  # scales that share one second-level scale in double quantization
SMALLEST_GROUP = 16  # a smaller one would spend more bits on scales than it saves


@weight_type
@dataclasses.dataclass(frozen=True)
class QuantizedTensor(Weight):
  """A matrix (I, O) of codes with one scale (and zero point) for `group_size` inputs.

  values: int8, uint8 or float8_e4m3fn [I, O], or uint8 [ceil(I * bits / 8), O] of packed codes.
  scales: [J, O] with J = I / group_size, or `QuantizedScales` of that shape.
  zeros: uint8 [J, O] for an asymmetric format, or floating (see ops/solvers/hqq.py); else None.
  """

  values: jax.Array = array('IO')
  scales: Matrix = array('JO')
  zeros: jax.Array | None = array('JO')
  format: FormatName
  inputs: int  # I: the last byte of packed codes may be filled up with zeros
  dtype: jnp.dtype

  @property
  def shape(self):
    return (*self.values.shape[:-2], self.inputs, self.values.shape[-1])

  @property
  def group_size(self) -> int:
    return self.inputs // self.scales.shape[-2]

  def codes(self) -> jax.Array:
    """The codes before scaling as [I, O]: integers (signed if symmetric), or codebook values."""
    bits = FORMATS[self.format].bits
    stored_IO = self.values if bits == 8 else packing.unpack(self.values, bits, self.inputs)
    return formats.levels(stored_IO, self.format, self.zeros is None)

  def dense(self):
    codes_JgO = self.codes().reshape(self.scales.shape[0], -1, self.values.shape[-1])
    scale_JO = dense(self.scales).astype(jnp.float32)
    return formats.scaled(codes_JgO, scale_JO, self.zeros).reshape(self.shape).astype(self.dtype)

  def matmul(self, x):
    if self.group_size != self.inputs or self.zeros is not None:
      return matmul(x, self.dense())
    # One scale a column commutes with the product, and a bare convert fuses into it on GPU and TPU.
    y = jnp.matmul(x, self.codes().astype(x.dtype), preferred_element_type=jnp.float32)
    scales_O = dense(self.scales)[0].astype(jnp.float32)
    return (y * jnp.broadcast_to(scales_O, y.shape)).astype(x.dtype)

  def kernel(self, platform):
    per_column = self.group_size == self.inputs and self.zeros is None
    fused = platform in ('gpu', 'tpu') and per_column and self.format == 'int8'
    return 'XLA, convert fused into the product' if fused else None

  def map_values(self, fn):
    raise ValueError(
      f'a matrix that is already quantized ({self.format}) cannot be pruned, cast or quantized; '
      'put that step before the quantization'
    )


@weight_type
@dataclasses.dataclass(frozen=True)
class QuantizedScales(Weight):
  """Scales [J, O], themselves stored as int8 codes: double quantization, after QLoRA.

  The mean is taken off, for scales are positive; blocks of up to 256 neighbours along O share one
  float32 scale. 8 bits a scale, and 32 / 256 for the second level.
  """

  codes: jax.Array = array('JO')  # int8
  scales: jax.Array = array('J_')  # [J, blocks]
  offset: jax.Array = array('')

  @property
  def shape(self):
    return self.codes.shape

  @property
  def dtype(self):
    return self.offset.dtype

  def dense(self) -> jax.Array:
    """The scales, float32 [J, O]."""
    return self.codes.astype(jnp.float32) * _blocks(self.scales, self.shape[-1]) + self.offset

  def map_values(self, fn):
    raise ValueError('scales that are quantized already cannot be quantized or cast')


def quantize_scales(scales_JO: jax.Array) -> QuantizedScales:
  """Rounds positive scales to 8 bits in blocks along O."""
  scales_JO = scales_JO.astype(jnp.float32)
  outputs = scales_JO.shape[1]
  count = -(-outputs // SCALE_BLOCK)
  width = -(-outputs // count)
  offset = scales_JO.mean()
  centred_JO = scales_JO - offset
  padded = jnp.pad(centred_JO, ((0, 0), (0, count * width - outputs)))
  amax = jnp.abs(padded.reshape(-1, count, width)).max(-1)
  scales = jnp.maximum(amax / 127, TINY)
  codes_JO = jnp.round(centred_JO / _blocks(scales, outputs)).astype(jnp.int8)
  return QuantizedScales(codes_JO, scales, offset)


def _blocks(scales, outputs):
  width = -(-outputs // scales.shape[1])
  return jnp.repeat(scales, width, axis=1)[:, :outputs]


def quantize(
  w_IO: jax.Array,
  format: FormatName,
  *,
  group_size: int | None = None,
  symmetric: bool = True,
  double: bool = False,
  clip: Clip = 'none',
) -> QuantizedTensor:
  """Rounds each weight of a matrix to the nearest value of the format.

  `group_size` inputs share a scale; see `resolve_group` for None and -1.
  `double` quantizes the scales too.  `clip`: see `fit`.

  Raises:
    ValueError: unknown format, a group size that does not divide I, or an option that the format
      does not have.
  """
  scales, zeros_JO = fit(w_IO, format, group_size=group_size, symmetric=symmetric, clip=clip)
  if double:
    exact_JO, scales = scales.astype(jnp.float32), quantize_scales(scales)
    if zeros_JO is not None:  # keep the low end of the range where it is
      low_JO = -zeros_JO.astype(jnp.float32) * exact_JO
      zeros_JO = formats.zero_points(low_JO, scales.dense(), FORMATS[format].bits)
  return encode(w_IO, scales, zeros_JO, format)


def fit(
  w_IO: jax.Array,
  format: FormatName,
  *,
  group_size: int | None = None,
  symmetric: bool = True,
  clip: Clip = 'none',
) -> tuple[jax.Array, jax.Array | None]:
  """Finds the scales [J, O] in bfloat16, and zero points or None, that span each group's range.

  `clip` 'mse' searches the share of the range that loses least. Raises ValueError as `quantize`.
  """
  axes.check('IO', w_IO)
  check_options(format, w_IO.shape[0], group_size, symmetric, clip)
  size = resolve_group(format, w_IO.shape[0], group_size)
  w_JgO = w_IO.astype(jnp.float32).reshape(-1, size, w_IO.shape[1])
  return formats.fit(w_JgO, format, symmetric, clip)


def encode(
  w_IO: jax.Array, scales: Matrix, zeros_JO: jax.Array | None, format: FormatName
) -> QuantizedTensor:
  """Rounds a matrix to the grid that the scales (and zeros) span."""
  bits = FORMATS[format].bits
  scale_JO = dense(scales).astype(jnp.float32)
  codes_JgO = formats.to_codes(_grouped(w_IO, scale_JO), scale_JO, zeros_JO, format)
  values = codes_JgO.reshape(w_IO.shape)
  if bits < 8:
    values = packing.pack(values, bits)
  return QuantizedTensor(values, scales, zeros_JO, format, w_IO.shape[0], jnp.dtype(w_IO.dtype))


def project(
  w_IO: jax.Array, scales: Matrix, zeros_JO: jax.Array | None, format: FormatName
) -> jax.Array:
  """The values that `encode` would store, float32 [I, O]; `encode` keeps them as they are."""
  scale_JO = dense(scales).astype(jnp.float32)
  values_JgO = formats.nearest(_grouped(w_IO, scale_JO), scale_JO, zeros_JO, format)
  return values_JgO.reshape(w_IO.shape)


def _grouped(w_IO, scale_JO):
  return w_IO.astype(jnp.float32).reshape(scale_JO.shape[0], -1, w_IO.shape[1])


def resolve_group(format: FormatName, inputs: int, group_size: int | None) -> int:
  """The number of inputs that share a scale.

  -1 is the whole column. None is the format's usual group, or what `fitting_group` finds.
  """
  size = FORMATS[format].default_group if group_size is None else group_size
  if size in (None, -1):
    return inputs
  return fitting_group(inputs, size) if group_size is None else size


def fitting_group(inputs: int, usual: int) -> int:
  """The usual group, or the largest of its halves that divides the inputs, or the whole column.

  No half is smaller than `SMALLEST_GROUP`.
  """
  size = usual
  while inputs % size and size > SMALLEST_GROUP:
    size //= 2
  return size if inputs % size == 0 else inputs


def check_options(
  format: str, inputs: int, group_size: int | None, symmetric: bool, clip: str = 'none'
) -> None:
  """Raises ValueError if a matrix with this many inputs cannot be stored so."""
  if format not in FORMATS:
    raise ValueError(f'format {format!r} is not one of {", ".join(FORMATS)}')
  if not symmetric and not FORMATS[format].integer:
    raise ValueError(f'{format} has no asymmetric form; only the integer formats have one')
  if clip not in typing.get_args(Clip):
    raise ValueError(f'clip {clip!r} is not one of {", ".join(typing.get_args(Clip))}')
  size = resolve_group(format, inputs, group_size)
  if size < 1 or inputs % size:
    raise ValueError(
      f'a group size of {size} does not divide {inputs} inputs; use a divisor, or -1 for one group'
    )
