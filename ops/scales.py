"""Scales of a quantized matrix that are stored in 8 bits themselves, with scales of a second level.

QuantizedScales  int8 codes, and a float32 scale for 256 of them: double quantization, after
                 Dettmers et al. (2023), "QLoRA", https://arxiv.org/abs/2305.14314
E4m3Scales       8-bit floats (e4m3), and one float32 scale for the whole matrix: NVFP4, after
                 NVIDIA (2025), https://arxiv.org/abs/2509.25149
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.formats import FP8_MAX, TINY
from ops.linear import Weight, array, require, weight_type

SCALE_BLOCK = 256  # scales that share one second-level scale


@weight_type
@dataclasses.dataclass(frozen=True)
class QuantizedScales(Weight):
  """Scales [J, O], themselves stored as int8 codes.

  Scales are positive, so their mean is taken off first. Blocks of up to 256 neighbours along O
  share one float32 scale.
  """

  codes: jax.Array = array('JO', 'scale')  # int8
  scales: jax.Array = array('J_', 'scale')  # [J, blocks]
  offset: jax.Array = array('', 'scale')

  def check_fields(self):
    (groups, outputs), dtype = self.codes.shape[-2:], self.codes.dtype
    require(dtype == jnp.int8, f'codes of scales are int8, not {dtype}')
    expected, found = (groups, -(-outputs // SCALE_BLOCK)), self.scales.shape[-2:]
    require(found == expected, f'second-level scales have the shape {found}, not {expected}')
    dtypes = self.scales.dtype, self.offset.dtype
    floating = all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
    require(floating, f'second-level scales and their mean are floating, not {dtypes}')

  @property
  def shape(self):
    return self.codes.shape

  @property
  def dtype(self):
    return self.offset.dtype

  def dense(self) -> jax.Array:
    """The scales, float32 [J, O]."""
    return self.codes.astype(jnp.float32) * _blocks(self.scales, self.shape[-1]) + self.offset

  def columns(self, index):
    """The scales of some columns, float32: blocks of neighbours have no meaning for them."""
    scales_JO = self.scales[:, index // _block(self.shape[-1], self.scales.shape[1])]
    return self.codes[:, index].astype(jnp.float32) * scales_JO + self.offset

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


@weight_type
@dataclasses.dataclass(frozen=True)
class E4m3Scales(Weight):
  """Scales [J, O] as float8_e4m3fn `values`, all multiplied by one float32 `scale`."""

  values: jax.Array = array('JO', 'scale')
  scale: jax.Array = array('', 'scale')

  def check_fields(self):
    dtype = self.values.dtype
    require(dtype == jnp.float8_e4m3fn, f'e4m3 scales are float8_e4m3fn, not {dtype}')
    dtype = self.scale.dtype
    require(dtype == jnp.float32, f'the scale of e4m3 scales is float32, not {dtype}')

  @property
  def shape(self):
    return self.values.shape

  @property
  def dtype(self):
    return self.scale.dtype

  def dense(self) -> jax.Array:
    """The scales, float32 [J, O]."""
    return self.values.astype(jnp.float32) * self.scale

  def map_values(self, fn):
    raise ValueError('scales that are quantized already cannot be quantized or cast')


def e4m3_scales(scales_JO: jax.Array) -> E4m3Scales:
  """Rounds positive scales to e4m3, of which the largest becomes 448.

  A scale below 2**-10 / 448 of the largest becomes zero, and so do the weights of its group.
  """
  scales_JO = scales_JO.astype(jnp.float32)
  scale = jnp.maximum(scales_JO.max() / FP8_MAX, TINY)
  values_JO = jnp.minimum(scales_JO / scale, FP8_MAX).astype(jnp.float8_e4m3fn)
  return E4m3Scales(values_JO, scale)


def _blocks(scales, outputs):
  return jnp.repeat(scales, _block(outputs, scales.shape[1]), axis=1)[:, :outputs]


def _block(outputs: int, count: int) -> int:
  """How many neighbours share each of `count` second-level scales."""
  return -(-outputs // count)
