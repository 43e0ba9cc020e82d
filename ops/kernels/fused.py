"""Weights whose codes are decoded inside the product, by a kernel of the accelerator at hand.

`pack` is for TPUs and GPUs what ops/kernels/cpu/packed.py is for CPUs: called once when a model is
loaded, it gives each weight the form that is multiplied without a widened copy.

  on a TPU  integers of up to 4 bits become XLA's own 4-bit numbers, whose conversion XLA fuses into
            the product; NF4, and groups smaller than XLA's tiles, are multiplied by a kernel
            (ops/kernels/tpu)
  on a GPU  4-bit integers and NF4 are multiplied by a kernel (ops/kernels/gpu), from the bytes as
            they are stored

A kernel is a program for one device: what is spread over several stays as it is, and XLA splits its
product, on a TPU with 4-bit numbers still without a widened copy.
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
from ops.linear import Matrix, Weight, array, dense, map_inner, matmul, require, weight_type
from ops.quantized import FORMATS, NF4_CODEBOOK, UNMEASURED, QuantizedTensor, native

Platform = Literal['tpu', 'gpu']
TPU_TILE = 64  # rows of 4-bit numbers that XLA:TPU keeps together; it copies smaller groups apart


@weight_type
@dataclasses.dataclass(frozen=True)
class FusedTensor(Weight):
  """A quantized matrix whose product goes through a kernel where the platform has one for it."""

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
    return _product(x, self.weight)

  def kernel(self, platform):
    if platform not in KERNELS or not KERNELS[platform].takes(self.weight):
      return self.weight.kernel(platform)
    return f'{KERNELS[platform].name}, {self.weight.format}; {UNMEASURED}'

  def map_values(self, fn):
    return self.weight.map_values(fn)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A platform's kernel: what it is, which weights it takes, and how it multiplies x[T, I]."""

  name: str
  takes: Callable[[QuantizedTensor], bool]
  product: Callable[..., jax.Array]


def _tpu_takes(w: QuantizedTensor) -> bool:
  if FORMATS[w.format].bits > 4 or tpu.piece(w.group_size) is None:
    return False
  return w.format == 'nf4' or w.group_size % TPU_TILE != 0


def _tpu_product(x_TI, w, interpret=False):
  """The kernel's, less what zero points take off, which is a small product of its own."""
  codes_IO, scales_JO = native(w).values, dense(w.scales)
  y_TO = tpu.product(x_TI, codes_IO, scales_JO, _codebook(w), interpret=interpret)
  if w.zeros is None:
    return y_TO.astype(x_TI.dtype)
  sums_TJ = x_TI.astype(jnp.float32).reshape(len(x_TI), len(scales_JO), -1).sum(-1)
  lows_JO = w.zeros.astype(jnp.float32) * scales_JO.astype(jnp.float32)
  taken_TO = jnp.matmul(sums_TJ, lows_JO, precision='highest')
  return (y_TO - taken_TO).astype(x_TI.dtype)


def _codebook(w):
  """The values of the codes 0 to 15, a signed code -1 being 15."""
  if w.format == 'nf4':
    return NF4_CODEBOOK
  return tuple(float(c) for c in (range(16) if w.zeros is not None else (*range(8), *range(-8, 0))))


def _gpu_takes(w: QuantizedTensor) -> bool:
  return FORMATS[w.format].bits == 4 and gpu.piece(w.group_size) is not None


def _gpu_product(x_TI, w, interpret=False):
  packed_IO = w.values if w.packed else packing.pack(_unsigned(w), 4)
  codebook = NF4_CODEBOOK if w.format == 'nf4' else None
  return gpu.product(x_TI, packed_IO, dense(w.scales), w.zeros, codebook, interpret=interpret)


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

  return multiply


@jax.custom_vjp
def _product(x, w):
  return jax.lax.platform_dependent(x, w, tpu=_through('tpu'), cuda=_through('gpu'), default=matmul)


_product.defvjp(
  lambda x, w: (_product(x, w), (x, w)), lambda saved, y_bar: jax.vjp(matmul, *saved)[1](y_bar)
)


def pack(w: Matrix, platform: Platform, *, one_device: bool = True) -> Matrix:
  """Gives a weight the form that `platform` multiplies without widening it, or returns it as it is.

  The weight inside a low-rank correction, a rotation or one that rounds its inputs is packed too.
  `one_device` False is for what is spread over several, and keeps to products that XLA can split.
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
  # Second-level scales would be multiplied out at each use.
  scales = dense(w.scales)
  if platform == 'tpu' and scales.dtype == jnp.float16:  # TPU kernels have no such numbers
    scales = scales.astype(jnp.float32)
  w = dataclasses.replace(w, scales=scales)
  return FusedTensor(native(w) if platform == 'tpu' else w)


_native = jax.jit(native)
