"""Decodes low-bit weights inside their matrix product, by a kernel for TPUs or for GPUs.

`pack` is called once when a model is loaded, like that of ops/kernels/cpu/packed.py for CPUs. It
converts each weight to a form that is multiplied without a widened copy:

  TPU  integers of up to 4 bits become XLA's own 4-bit type, whose conversion XLA fuses into the
       product; codebooks (NF4, mxfp4), and groups smaller than XLA's tiles, go to a kernel
       (ops/kernels/tpu)
  GPU  4-bit integers and codebooks of groups of 32 or more (NF4, mxfp4) go to a kernel
       (ops/kernels/gpu), which reads the bytes as stored

A kernel runs on one device. The product of a sharded weight is left to XLA, which splits it over
the devices; on a TPU, XLA's 4-bit type avoids the widened copy there too.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from ops import packing
from ops.kernels.gpu import quantized_matmul as gpu
from ops.kernels.tpu import quantized_matmul as tpu
from ops.linear import Matrix, Weight, array, map_inner, matmul, require, weight_type
from ops.quantized import FORMATS, UNMEASURED, QuantizedTensor, native, wide_scales

Platform = Literal['tpu', 'gpu']
TPU_TILE = 64  # rows in XLA:TPU's tile of 4-bit numbers; smaller groups make it copy the matrix


@weight_type
@dataclasses.dataclass(frozen=True)
class FusedTensor(Weight):
  """A quantized matrix that is multiplied by the platform's kernel, if one takes its format."""

  weight: QuantizedTensor = array('IO')

  def check_fields(self):
    kind = type(self.weight).__name__
    require(isinstance(self.weight, QuantizedTensor), f'no kernel multiplies by a {kind}')

  @property
  def shape(self):
    return self.weight.shape

  @property
  def dtype(self):
    return self.weight.dtype

  def dense(self):
    return self.weight.dense()

  def matmul(self, x):
    return _products(x, (self.weight,))[0]

  @classmethod
  def matmuls(cls, x, weights):
    return _products(x, tuple(w.weight for w in weights))

  def kernel(self, platform):
    if platform not in KERNELS or not KERNELS[platform].takes(self.weight):
      return self.weight.kernel(platform)
    return f'{KERNELS[platform].name}, {self.weight.format}; {UNMEASURED}'

  def map_values(self, fn):
    return self.weight.map_values(fn)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A platform's kernel: its name, the weights that it takes, and its product with x[T, I]."""

  name: str
  takes: Callable[[QuantizedTensor], bool]
  product: Callable[..., jax.Array]


def _tpu_takes(w: QuantizedTensor) -> bool:
  if FORMATS[w.format].bits > 4 or tpu.piece(w.group_size) is None:
    return False
  return FORMATS[w.format].codebook is not None or w.group_size % TPU_TILE != 0


def _tpu_product(x_TI, w, interpret=False):
  """Runs the kernel on the codes and subtracts the part of the zero points, a small product."""
  codes_IO, scales_JO = native(w).values, wide_scales(w)
  y_TO = tpu.product(x_TI, codes_IO, scales_JO, _codebook(w), interpret=interpret)
  if w.zeros is None:
    return y_TO.astype(x_TI.dtype)
  sums_TJ = x_TI.astype(jnp.float32).reshape(len(x_TI), len(scales_JO), -1).sum(-1)
  offsets_JO = w.zeros.astype(jnp.float32) * scales_JO.astype(jnp.float32)
  offset_TO = jnp.matmul(sums_TJ, offsets_JO, precision='highest')
  return (y_TO - offset_TO).astype(x_TI.dtype)


def _codebook(w):
  """Returns the values of the codes 0 to 15, where a signed code c < 0 is code c + 16."""
  if FORMATS[w.format].codebook is not None:
    return FORMATS[w.format].codebook
  return tuple(float(c) for c in (range(16) if w.zeros is not None else (*range(8), *range(-8, 0))))


def _gpu_takes(w: QuantizedTensor) -> bool:
  return FORMATS[w.format].bits == 4 and gpu.piece(w.group_size) is not None


def _gpu_product(x_TI, w, interpret=False):
  return _gpu_products(x_TI, [w], interpret)[0]


def _gpu_products(x_TI, weights, interpret=False):
  """The products of x with weights of one format and group size, by one kernel."""
  codes = tuple(
    gpu.Codes(w.values if w.packed else packing.pack(_unsigned(w), 4), wide_scales(w), w.zeros)
    for w in weights
  )
  return gpu.products(x_TI, codes, FORMATS[weights[0].format].codebook, interpret=interpret)


def _unsigned(w):
  codes_IO = w.stored_codes().astype(jnp.int8)
  return codes_IO + 8 if w.values.dtype == jnp.int4 else codes_IO


KERNELS = {
  'tpu': Kernel('Pallas', _tpu_takes, _tpu_product),
  'gpu': Kernel('Pallas for Triton', _gpu_takes, _gpu_product),
}


def _through(platform):
  kernel = KERNELS[platform]

  def multiply(x, w):
    if not kernel.takes(w):
      return matmul(x, w)
    y_TO = kernel.product(x.reshape(-1, x.shape[-1]), w)
    return y_TO.reshape(*x.shape[:-1], w.shape[-1])

  return lambda x, weights: tuple(multiply(x, w) for w in weights)


def _together(x, weights):
  """A GPU starts kernels at some microseconds each, so one multiplies by all of the weights."""
  alike = {(w.format, w.group_size, w.zeros is None) for w in weights}
  if len(alike) > 1 or not _gpu_takes(weights[0]):
    return _through('gpu')(x, weights)
  found = _gpu_products(x.reshape(-1, x.shape[-1]), weights)
  return tuple(y_TO.reshape(*x.shape[:-1], y_TO.shape[-1]) for y_TO in found)


def _one_by_one(x, weights):
  return tuple(matmul(x, w) for w in weights)


@jax.custom_vjp
def _products(x, weights):
  kernels = {'tpu': _through('tpu'), 'cuda': _together}
  return jax.lax.platform_dependent(x, weights, **kernels, default=_one_by_one)


_products.defvjp(
  lambda x, weights: (_products(x, weights), (x, weights)),
  lambda saved, y_bars: jax.vjp(_one_by_one, *saved)[1](y_bars),
)


def pack(w: Matrix, platform: Platform, *, one_device: bool = True) -> Matrix:
  """Converts a weight to the form that `platform` multiplies without a widened copy, if it has one.

  Also packs the weight inside a low-rank correction, a rotation or a weight that rounds its inputs.
  `one_device=False` is for sharded weights: it uses only products that XLA can split.
  """
  if len(w.shape) != 2:
    return w
  return map_inner(functools.partial(_pack_inner, platform=platform, one_device=one_device), w)


def _pack_inner(w: Matrix, platform: Platform, one_device: bool) -> Matrix:
  if not isinstance(w, QuantizedTensor):
    return w
  if one_device and KERNELS[platform].takes(w):
    return _fused(w, platform)
  uniform = platform == 'tpu' and w.packed and FORMATS[w.format].integer
  return _native(w) if uniform else w


@functools.partial(jax.jit, static_argnames='platform')
def _fused(w: QuantizedTensor, platform: Platform) -> FusedTensor:
  # Scales of 8 bits would be decoded at each use.
  scales = wide_scales(w)
  if platform == 'tpu' and scales.dtype == jnp.float16:  # TPU kernels have no such numbers
    scales = scales.astype(jnp.float32)
  w = dataclasses.replace(w, scales=scales)
  return FusedTensor(native(w) if platform == 'tpu' else w)


_native = jax.jit(native)
