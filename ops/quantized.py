"""Weights stored as low-bit codes with scales, and rounding to nearest.

A column of a matrix [I, O] is cut along I into J groups; each group has one scale, and an
asymmetric one a zero point:  w = (code - zero) * scale, or w = codebook[code] * scale.

  int8 to int2  uniform; symmetric or asymmetric
  nf4           the 16 quantiles of a normal distribution (Dettmers et al. 2023, QLoRA,
                https://arxiv.org/abs/2305.14314), its scales optionally quantized in turn
  fp8_e4m3      8-bit floats (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433)
  mxfp4, mxfp8  4- and 8-bit floats (e2m1, e4m3) in blocks of 32 that share a power of two (OCP
                Microscaling Formats 1.0, 2023; Rouhani et al. 2023,
                https://arxiv.org/abs/2310.10537)
  nvfp4         4-bit floats (e2m1) in blocks of 16 with e4m3 scales, and one float32 scale for the
                matrix (NVIDIA 2025, https://arxiv.org/abs/2509.25149)

Codes of fewer than 8 bits are packed without gaps (ops/packing.py). Rounding is half to even. A
symmetric scale is amax / (2**bits - 1) * 2, as in compressed-tensors: the codes reach from
-2**(bits-1) to 2**(bits-1) - 1, and the largest value of a group is half a step off the grid. With
the clip 'signed', the scale is the value of largest magnitude / -2**(bits-1); that value is then on
the grid, and the scale may be negative. Zero is exactly representable wherever zero points are
integers, so pruned weights stay pruned.

Codes are computed from the scale as it is stored. It is float32 for 8-bit codes and for whole
columns. It is float16 for groups of smaller codes, where scales are a large part of the bytes and
need no more than 11 bits. A float16 scale lies between 2**-24 and 65504: groups whose weights are
all below 2e-7 become zero in int4, and weights beyond 5e5 are clipped. Scales that are quantized
themselves start as float32. Those of mxfp4, mxfp8 and nvfp4 are stored as their definitions say:
float8_e8m0fnu, or `E4m3Scales` with a scale of amax / (6 * 448).

A product needs no widened copy of the codes if XLA has a type for them and the scale is applied
after the product: y_O = sum over J of scale_JO * (x_Jg @ codes_JgO - zero_JO * sum(x_Jg)). XLA then
converts the codes inside the product. `native` gives packed integers such a type. XLA:CPU has no
such product; there the weight is widened, unless a native kernel multiplies it (ops/kernels/cpu).
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops import axes, formats, packing
from ops.formats import FORMATS, Clip, FormatName
from ops.formats import NF4_CODEBOOK as NF4_CODEBOOK
from ops.linear import (
  Matrix,
  Weight,
  array,
  dense,
  in_eights,
  is_count,
  matmul,
  require,
  weight_type,
)
from ops.scales import QuantizedScales, e4m3_scales, quantize_scales

SCALE_DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32)
SMALLEST_GROUP = 16  # a smaller one would spend more bits on scales than it saves
UNMEASURED = 'compiled, not yet timed'  # of products on devices that were not at hand


@weight_type
@dataclasses.dataclass(frozen=True)
class QuantizedTensor(Weight):
  """A matrix (I, O) of codes with one scale (and zero point) for `group_size` inputs.

  values: int8, uint8 or float8_e4m3fn [I, O], or uint8 [ceil(I * bits / 8), O] of packed codes;
    int4 or uint4 [I, O] after `native`.
  scales: [J, O] with J = I / group_size, or a weight of that shape from ops/scales.py.
  zeros: uint8 [J, O] for an asymmetric format, or floating (see ops/solvers/hqq.py); else None.
  """

  values: jax.Array = array('IO', 'code')
  scales: Matrix = array('JO', 'scale')
  zeros: jax.Array | None = array('JO', 'scale', optional=True)
  format: FormatName
  inputs: int  # I: the last byte of packed codes may be filled up with zeros
  dtype: jnp.dtype

  def check_fields(self):
    known = ', '.join(FORMATS)
    require(self.format in tuple(FORMATS), f'format {self.format!r} is not one of {known}')
    require(is_count(self.inputs), f'{self.inputs!r} inputs are no whole number above 0')
    _check_codes(self)
    (groups, outputs), columns = self.scales.shape[-2:], self.values.shape[-1]
    require(outputs == columns, f'{columns} columns of codes have scales for {outputs}')
    divides = groups and self.inputs % groups == 0
    require(divides, f'{groups} groups of scales do not divide {self.inputs} inputs')
    _check_scales(self)
    if self.zeros is not None:
      shape, expected = self.zeros.shape[-2:], (groups, outputs)
      require(shape == expected, f'zeros have the shape {shape}, and scales {expected}')
      whole = self.zeros.dtype == jnp.uint8
      require(whole or self.zeros.dtype in SCALE_DTYPES, f'no zero points are {self.zeros.dtype}')

  @property
  def shape(self):
    return (*self.values.shape[:-2], self.inputs, self.values.shape[-1])

  @property
  def group_size(self) -> int:
    return self.inputs // self.scales.shape[-2]

  @property
  def packed(self) -> bool:
    """Whether codes share bytes, so that they must be unpacked before they are multiplied."""
    return FORMATS[self.format].bits < 8 and self.values.dtype == jnp.uint8

  @property
  def holds_zero(self) -> bool:
    """Whether zero is exactly representable; fractional zero points do not ensure it."""
    return self.zeros is None or self.zeros.dtype == jnp.uint8

  def codes(self) -> jax.Array:
    """The codes before scaling as [I, O]: integers (signed if symmetric), or codebook values."""
    if self.values.dtype in (jnp.int4, jnp.uint4) and FORMATS[self.format].integer:
      return self.values
    return formats.levels(self.stored_codes(), self.format, self.zeros is None)

  def stored_codes(self) -> jax.Array:
    """The codes as they are packed or stored, [I, O]."""
    if self.packed:
      return packing.unpack(self.values, FORMATS[self.format].bits, self.inputs)
    return self.values

  def dense(self):
    codes_JgO = self.codes().reshape(self.scales.shape[0], -1, self.values.shape[-1])
    scale_JO = dense(self.scales).astype(jnp.float32)
    return formats.scaled(codes_JgO, scale_JO, self.zeros).reshape(self.shape).astype(self.dtype)

  def matmul(self, x):
    return _product(x, self)

  def kernel(self, platform):
    if platform not in ('gpu', 'tpu') or self.widened:
      return None
    if platform == 'gpu' and self.values.dtype == jnp.uint8:
      return None  # XLA:GPU converts signed integers inside a product, unsigned ones before it
    return f'XLA, {self.values.dtype} converted inside the product; {UNMEASURED}'

  @property
  def widened(self) -> bool:
    """Whether the codes must be widened first, as XLA cannot convert them inside a product."""
    return self.packed or FORMATS[self.format].codebook is not None

  def map_values(self, fn):
    raise ValueError(
      f'a matrix that is already quantized ({self.format}) cannot be pruned, cast or quantized; '
      'put that step before the quantization'
    )

  def refit(self, w_IO):
    return quantize(
      w_IO.astype(self.dtype),
      self.format,
      group_size=self.group_size,
      symmetric=self.zeros is None,
      double=isinstance(self.scales, QuantizedScales),
    )


def _check_codes(w: QuantizedTensor) -> None:
  """Raises ValueError if the codes do not have the dtype or the rows of their format."""
  spec, dtype = FORMATS[w.format], w.values.dtype
  symmetric = w.zeros is None
  require(symmetric or spec.integer, f'{w.format} has no zero points')
  if spec.bits == 8:
    dtypes = [jnp.float8_e4m3fn if not spec.integer else jnp.int8 if symmetric else jnp.uint8]
  else:
    laid_out = jnp.int4 if spec.integer and symmetric else jnp.uint4
    dtypes = [jnp.uint8] + [laid_out] * (spec.bits <= 4)
  names = ' or '.join(jnp.dtype(d).name for d in dtypes)
  require(dtype in dtypes, f'codes of {w.format} are {names}, not {dtype}')
  rows = -(-w.inputs * spec.bits // 8) if w.packed else w.inputs
  found = w.values.shape[-2]
  require(
    found == rows, f'{w.inputs} inputs of {w.format} take {rows} rows of {dtype}, not {found}'
  )


def _check_scales(w: QuantizedTensor) -> None:
  """Raises ValueError if the scales do not have the dtype or the groups of their format."""
  spec, dtype = FORMATS[w.format], w.scales.dtype
  dtypes = (*SCALE_DTYPES, jnp.float8_e8m0fnu) if spec.scales == 'e8m0' else SCALE_DTYPES
  require(dtype in dtypes, f'scales of {w.format} are floating, not {dtype}')
  fits = spec.block in (None, w.group_size)
  require(fits, f'{w.format} has blocks of {spec.block} inputs, not of {w.group_size}')


def through_dense(x: jax.Array, w: QuantizedTensor) -> jax.Array:
  """The product as `dense()` defines it."""
  return matmul(x, w.dense())


def scaled_after(x: jax.Array, w: QuantizedTensor) -> jax.Array:
  """Multiplies the codes of each group, then scales and adds up the groups, with no widened copy.

  XLA:TPU adds the groups up inside the product; elsewhere the sums of all groups are in memory.
  """
  groups, outputs = w.scales.shape
  x_TJg = x.reshape(-1, groups, w.group_size)
  codes_JgO = w.codes().reshape(groups, -1, outputs).astype(x.dtype)
  y_TJO = jnp.einsum('TJg,JgO->TJO', x_TJg, codes_JgO, preferred_element_type=jnp.float32)
  if w.zeros is not None:
    sums_TJ1 = x_TJg.astype(jnp.float32).sum(-1, keepdims=True)
    y_TJO = y_TJO - sums_TJ1 * w.zeros.astype(jnp.float32)[None]
  y_TO = (y_TJO * dense(w.scales).astype(jnp.float32)[None]).sum(1)
  return y_TO.reshape(*x.shape[:-1], outputs).astype(x.dtype)


def _on_tpu(x, w):
  return in_eights(scaled_after, x, w)


def _on_gpu(x, w):
  # XLA:GPU writes the groups' sums to memory; many rows have more of them than there are weights.
  groups = w.scales.shape[-2]
  few = groups == 1 or x.size // w.inputs * groups < w.inputs
  return in_eights(scaled_after if few else through_dense, x, w)


def _on_cpu(x, w):
  per_column = w.group_size == w.inputs and w.zeros is None
  return scaled_after(x, w) if per_column else through_dense(x, w)


@jax.custom_vjp
def _product(x, w):
  if w.widened:
    return through_dense(x, w)
  return jax.lax.platform_dependent(x, w, tpu=_on_tpu, cuda=_on_gpu, default=_on_cpu)


def _backward(saved, y_bar):
  # The codes are widened again. Without the barrier, XLA would keep the forward pass's result.
  x, w, y_bar = jax.lax.optimization_barrier((*saved, y_bar))
  return jax.vjp(through_dense, x, w)[1](y_bar)


_product.defvjp(lambda x, w: (_product(x, w), (x, w)), _backward)


def wide_scales(w: QuantizedTensor) -> jax.Array:
  """The scales [J, O] in a dtype that kernels read; bfloat16 holds every power of two (e8m0)."""
  scales_JO = dense(w.scales)
  return scales_JO.astype(jnp.bfloat16) if scales_JO.dtype == jnp.float8_e8m0fnu else scales_JO


def native(w: QuantizedTensor) -> QuantizedTensor:
  """Stores codes of up to 4 bits in XLA's 4-bit types, [I, O]; others stay as they are.

  A TPU stores two of them per byte, so codes of 2 and 3 bits take 4. On a CPU each takes a byte.
  """
  if not w.packed or FORMATS[w.format].bits > 4:
    return w
  if FORMATS[w.format].integer and w.zeros is None:
    return dataclasses.replace(w, values=w.codes().astype(jnp.int4))
  return dataclasses.replace(w, values=w.stored_codes().astype(jnp.uint4))


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
  options = {'group_size': group_size, 'symmetric': symmetric, 'double': double, 'clip': clip}
  return encode(w_IO, *fit(w_IO, format, **options), format)


def fit(
  w_IO: jax.Array,
  format: FormatName,
  *,
  group_size: int | None = None,
  symmetric: bool = True,
  double: bool = False,
  clip: Clip = 'none',
) -> tuple[Matrix, jax.Array | None]:
  """Finds the scales [J, O] as they are stored, and zero points or None, that span each group.

  `clip` 'mse' searches the share of the range that loses least, 'signed' gives scales the sign that
  puts the largest value on the grid, 'signed_mse' does both. Raises ValueError as `quantize`.
  """
  axes.check('IO', w_IO)
  formats.check_form(format, clip=clip, symmetric=symmetric, double=double)
  check_options(format, w_IO.shape[0], group_size, symmetric, clip)
  size = resolve_group(format, w_IO.shape[0], group_size)
  w_JgO = w_IO.astype(jnp.float32).reshape(-1, size, w_IO.shape[1])
  return fit_groups(w_JgO, format, symmetric, double, clip)


def fit_groups(
  w_JgO: jax.Array, format: FormatName, symmetric: bool, double: bool, clip: Clip
) -> tuple[Matrix, jax.Array | None]:
  """Does what `fit` does, for float32 groups of any size."""
  dtype = jnp.float32 if double else scale_dtype(format, len(w_JgO))
  scales_JO, zeros_JO = formats.fit(w_JgO, format, symmetric, clip, dtype)
  if FORMATS[format].scales == 'e4m3':
    return e4m3_scales(scales_JO), None
  if not double:
    return scales_JO, zeros_JO
  scales = quantize_scales(scales_JO)
  if zeros_JO is not None:  # keep the low end of the range where it is
    low_JO = -zeros_JO.astype(jnp.float32) * scales_JO
    zeros_JO = formats.zero_points(low_JO, scales.dense(), FORMATS[format].bits)
  return scales, zeros_JO


def scale_dtype(format: FormatName, groups: int) -> jnp.dtype:
  """The dtype in which scales are stored, or from which they are quantized in their turn."""
  spec = FORMATS[format]
  if spec.scales == 'e8m0':
    return jnp.dtype(jnp.float8_e8m0fnu)
  wide = groups == 1 or spec.bits == 8 or spec.scales == 'e4m3'
  return jnp.dtype(jnp.float32 if wide else jnp.float16)


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
  return formats.nearest(_grouped(w_IO, scale_JO), scale_JO, zeros_JO, format).reshape(w_IO.shape)


def _grouped(w_IO, scale_JO):
  return w_IO.astype(jnp.float32).reshape(scale_JO.shape[0], -1, w_IO.shape[1])


def resolve_group(format: FormatName, inputs: int, group_size: int | None) -> int:
  """The number of inputs that share a scale.

  -1 is the whole column. None is the block of a format that has a fixed one, and otherwise what
  `fitting_group` makes of the format's usual group.
  """
  if group_size is None and FORMATS[format].block:
    return FORMATS[format].block
  size = FORMATS[format].default_group if group_size is None else group_size
  if size in (None, -1):
    return inputs
  return fitting_group(inputs, size) if group_size is None else size


def fitting_group(inputs: int, usual: int) -> int:
  """The usual group, halved until it divides the inputs, or else the whole column.

  No group is smaller than `SMALLEST_GROUP`.
  """
  size = usual
  while inputs % size and size > SMALLEST_GROUP:
    size //= 2
  return size if inputs % size == 0 else inputs


def check_options(
  format: str, inputs: int, group_size: int | None, symmetric: bool, clip: str = 'none'
) -> None:
  """Raises ValueError if a matrix with this many inputs cannot be stored with these options."""
  formats.check_form(format, symmetric=symmetric, clip=clip, group_size=group_size)
  size = resolve_group(format, inputs, group_size)
  if FORMATS[format].block and inputs % size:
    raise ValueError(
      f'{format} has blocks of {size}, which do not divide {inputs} inputs; use another format'
    )
  check_divides(inputs, size)


def check_divides(inputs: int, size: int) -> None:
  """Raises ValueError unless groups of this size divide the inputs."""
  if size < 1 or inputs % size:
    raise ValueError(
      f'a group size of {size} does not divide {inputs} inputs; use a divisor, or -1 for one group'
    )
