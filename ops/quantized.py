"""Weights stored as low-bit codes with scales, and rounding to nearest.

A column of a matrix [I, O] is cut along I into J groups; each group has one scale, and an
asymmetric one a zero point:  w = (code - zero) * scale, or w = codebook[code] * scale.

  int8, int4   uniform (4-bit codes are packed two a byte); symmetric or asymmetric
  nf4          the 16 quantiles of a normal distribution (Dettmers et al. 2023, QLoRA,
               https://arxiv.org/abs/2305.14314), its scales optionally quantized in turn
  fp8_e4m3     8-bit floats (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433)

Rounding is half to even. Symmetric scales are amax / (2**bits - 1) * 2, so the grid reaches from
-2**(bits-1) to 2**(bits-1) - 1 and the largest value of a group is half a step away, as in
compressed-tensors. A scale is rounded to its stored precision before the codes are computed: in
bfloat16 that costs the largest value up to half a step more at 8 bits, and next to nothing at 4.
Zero is exactly representable in every format, so pruned weights stay pruned.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from ops import axes, packing
from ops.linear import Matrix, Weight, array, dense, matmul, weight_type

FormatName = Literal['int8', 'int4', 'nf4', 'fp8_e4m3']

NF4_CODEBOOK = (
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
)
NF4_ZERO_CODE = NF4_CODEBOOK.index(0.0)
FP8_MAX = 448.0
SCALE_BLOCK = 256  # scales that share one second-level scale in double quantization
SMALLEST_GROUP = 16  # a smaller one would spend more bits on scales than it saves
TINY = 1e-30  # the scale of a group that is all zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """How numbers become codes. `bits` a code, and the group size when none is asked for."""

  name: FormatName
  bits: int
  default_group: int | None  # None: one group, the whole column
  integer: bool


FORMATS = {
  f.name: f
  for f in (
    Format(name='int8', bits=8, default_group=None, integer=True),
    Format(name='int4', bits=4, default_group=128, integer=True),
    Format(name='nf4', bits=4, default_group=64, integer=False),
    Format(name='fp8_e4m3', bits=8, default_group=None, integer=False),
  )
}


@weight_type
@dataclasses.dataclass(frozen=True)
class QuantizedTensor(Weight):
  """A matrix (I, O) of codes with one scale (and zero point) for `group_size` inputs.

  values: int8 or float8_e4m3fn [I, O], or uint8 [I/2, O] holding two 4-bit codes a byte.
  scales: [J, O] with J = I / group_size, or `QuantizedScales` of that shape.
  zeros: uint8 [J, O] for an asymmetric format, else None.
  """

  values: jax.Array = array('IO')
  scales: Matrix = array('JO')
  zeros: jax.Array | None = array('JO')
  format: FormatName
  inputs: int  # I: an odd number of 4-bit rows fills the last byte with a zero
  dtype: jnp.dtype

  @property
  def shape(self):
    return (*self.values.shape[:-2], self.inputs, self.values.shape[-1])

  @property
  def group_size(self) -> int:
    return self.inputs // self.scales.shape[-2]

  def codes(self) -> jax.Array:
    """The codes before scaling as [I, O]: signed integers, or values of the codebook."""
    if self.format in ('int8', 'fp8_e4m3'):
      return self.values
    codes_IO = packing.unpack(self.values, 4, self.inputs)
    if self.format == 'nf4':
      return jnp.asarray(NF4_CODEBOOK, jnp.float32)[codes_IO]
    return codes_IO.astype(jnp.int8) - (8 if self.zeros is None else 0)

  def dense(self):
    codes_IO = self.codes().astype(jnp.float32)
    if self.zeros is not None:
      codes_IO = codes_IO - self._spread(self.zeros)
    return (codes_IO * self._spread(self.scales)).astype(self.dtype)

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

  def _spread(self, groups_JO):
    return jnp.repeat(dense(groups_JO).astype(jnp.float32), self.group_size, axis=0)


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
) -> QuantizedTensor:
  """Rounds each weight of a matrix to the nearest value of the format.

  `group_size` inputs share a scale; see `resolve_group` for None and -1.
  `double` quantizes the scales too.

  Raises:
    ValueError: unknown format, a group size that does not divide I, or an option that the format
      does not have.
  """
  scales_JO, zeros_JO = fit(w_IO, format, group_size=group_size, symmetric=symmetric)
  scales = quantize_scales(scales_JO) if double else scales_JO
  return encode(w_IO, scales, zeros_JO, format)


def fit(w_IO: jax.Array, format: FormatName, *, group_size=None, symmetric=True):
  """Finds the scales [J, O] in bfloat16, and zero points or None, that span each group's range."""
  axes.check('IO', w_IO)
  check_options(format, w_IO.shape[0], group_size, symmetric)
  spec = FORMATS[format]
  size = resolve_group(format, w_IO.shape[0], group_size)
  w_JgO = w_IO.astype(jnp.float32).reshape(-1, size, w_IO.shape[1])
  if not symmetric:
    return _fit_asymmetric(w_JgO, spec.bits)
  amax_JO = jnp.abs(w_JgO).max(1)
  top = (2**spec.bits - 1) / 2 if spec.integer else {'nf4': 1.0, 'fp8_e4m3': FP8_MAX}[format]
  return _stored_scale(amax_JO / top), None


def _fit_asymmetric(w_JgO, bits):
  low_JO, high_JO = jnp.minimum(w_JgO.min(1), 0), jnp.maximum(w_JgO.max(1), 0)
  scales_JO = _stored_scale((high_JO - low_JO) / (2**bits - 1))
  zeros_JO = jnp.clip(jnp.round(-low_JO / scales_JO.astype(jnp.float32)), 0, 2**bits - 1)
  return scales_JO, zeros_JO.astype(jnp.uint8)


def _stored_scale(scales):
  return jnp.maximum(scales, TINY).astype(jnp.bfloat16)


def encode(
  w_IO: jax.Array, scales: Matrix, zeros_JO: jax.Array | None, format: FormatName
) -> QuantizedTensor:
  """Rounds a matrix to the grid that the scales (and zeros) span."""
  groups = scales.shape[0]
  scale_JO = dense(scales).astype(jnp.float32)
  w_JgO = w_IO.astype(jnp.float32).reshape(groups, -1, w_IO.shape[1])
  # Double quantization can round a small scale down to nothing or below it.
  safe_JO = jnp.where(jnp.abs(scale_JO) < TINY, TINY, scale_JO)
  scaled_JgO = w_JgO / safe_JO[:, None]
  offset_JgO = None if zeros_JO is None else zeros_JO.astype(jnp.float32)[:, None]
  values = _round(scaled_JgO, offset_JgO, format).reshape(w_IO.shape)
  if FORMATS[format].bits == 4:
    values = packing.pack(values, 4)
  return QuantizedTensor(values, scales, zeros_JO, format, w_IO.shape[0], jnp.dtype(w_IO.dtype))


def _round(x_JgO, zeros, format):
  if format == 'nf4':
    edges = jnp.asarray([(a + b) / 2 for a, b in zip(NF4_CODEBOOK, NF4_CODEBOOK[1:])])
    return jnp.searchsorted(edges, x_JgO).astype(jnp.uint8)
  if format == 'fp8_e4m3':
    return jnp.clip(x_JgO, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
  bits = FORMATS[format].bits
  half = 2 ** (bits - 1)
  if zeros is not None:
    return jnp.clip(jnp.round(x_JgO) + zeros, 0, 2 * half - 1).astype(jnp.uint8)
  codes = jnp.clip(jnp.round(x_JgO), -half, half - 1)
  return (codes + half).astype(jnp.uint8) if bits == 4 else codes.astype(jnp.int8)


def resolve_group(format: FormatName, inputs: int, group_size: int | None) -> int:
  """The number of inputs that share a scale.

  -1 is the whole column. None is the format's usual group, or the largest of its halves down to
  `SMALLEST_GROUP` that divides the inputs, or the whole column.
  """
  size = FORMATS[format].default_group if group_size is None else group_size
  if group_size is None and size is not None:
    while inputs % size and size > SMALLEST_GROUP:
      size //= 2
    size = size if inputs % size == 0 else -1
  return inputs if size in (None, -1) else size


def check_options(format: str, inputs: int, group_size: int | None, symmetric: bool) -> None:
  """Raises ValueError if a matrix with this many inputs cannot be stored so."""
  if format not in FORMATS:
    raise ValueError(f'format {format!r} is not one of {", ".join(FORMATS)}')
  if not symmetric and format != 'int4' and format != 'int8':
    raise ValueError(f'{format} has no asymmetric form; only the integer formats have one')
  size = resolve_group(format, inputs, group_size)
  if size < 1 or inputs % size:
    raise ValueError(
      f'a group size of {size} does not divide {inputs} inputs; use a divisor, or -1 for one group'
    )
