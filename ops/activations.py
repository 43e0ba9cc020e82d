"""Weights that round their inputs too, so that the product is one of small integers.

  y = (codes of x) @ (codes of w) * scale of x * scale of w

The codes of x are symmetric, `top` = 2**(bits - 1) - 1 steps on either side of zero. The scale is
amax / top of each token ('dynamic', after Yao et al. 2022, ZeroQuant,
https://arxiv.org/abs/2206.01861), or one stored number for all tokens ('static'), beyond which
inputs saturate. A rounded input is off by at most half a step, amax / (2 * top).

Where the weight has integer codes and one symmetric scale a column, int8 is multiplied by int8 and
summed in int32, which is exact up to 133,000 inputs of 8 bits; 4-bit codes take the same way, as
int8 numbers. Any other weight multiplies the codes of x as floating numbers, which costs more than
no rounding at all.

Gradients pass straight through the rounding, but not to inputs that saturate (Bengio et al. 2013,
https://arxiv.org/abs/1308.3432).
"""

import dataclasses
import functools
import typing
from typing import Literal

import jax
import jax.numpy as jnp

from ops import quantized
from ops.linear import (
  Matrix,
  Weight,
  array,
  dense,
  in_eights,
  map_values,
  matmul,
  refit,
  require,
  stored,
  weight_type,
)

Bits = Literal[8, 4]
TINY = 1e-30  # the scale of a token that is all zeros


@weight_type
@dataclasses.dataclass(frozen=True)
class ActivationQuantized(Weight):
  """A matrix (I, O) of any type whose inputs are rounded to integers of `bits` bits.

  scale: float32 [] of all tokens, or None for a scale of each token.
  """

  values: Matrix = array('IO')
  scale: jax.Array | None = array('', 'scale', optional=True)
  bits: Bits

  passes_to = 'values'

  def check_fields(self):
    check_bits(self.bits)
    if self.scale is not None:
      dtype = self.scale.dtype
      require(jnp.issubdtype(dtype, jnp.floating), f'the scale is floating, not {dtype}')
    rounds = isinstance(self.values, ActivationQuantized)
    require(not rounds, 'the inputs of this matrix are quantized already')

  @property
  def shape(self):
    return self.values.shape

  @property
  def dtype(self):
    return self.values.dtype

  def dense(self):
    return dense(self.values)

  def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The codes of x[..., I] as int8, and their scales [..., 1] or [1, ..., 1] in float32."""
    x32, top = x.astype(jnp.float32), highest_code(self.bits)
    if self.scale is None:
      scale = jnp.maximum(jnp.abs(x32).max(-1, keepdims=True) / top, TINY)
    else:
      scale = self.scale.reshape((1,) * x.ndim)
    return jnp.clip(jnp.round(x32 / scale), -top, top).astype(jnp.int8), scale

  def round_inputs(self, x):
    codes, scale = self.encode(x)
    return codes.astype(jnp.float32) * scale

  def matmul(self, x):
    return _product(x, self)

  def kernel(self, platform):
    if platform == 'cpu':
      return super().kernel(platform) if isinstance(self.values, Weight) else None
    if platform not in ('gpu', 'tpu') or not _per_column(self.values) or self.values.packed:
      return None
    return f'XLA, int8 by {self.values.values.dtype}; {quantized.UNMEASURED}'

  def map_values(self, fn):
    return dataclasses.replace(self, values=map_values(fn, self.values))

  def refit(self, w_IO):
    return dataclasses.replace(self, values=refit(self.values, w_IO))


def quantize_activations(
  w: Matrix, bits: Bits = 8, *, absmax: jax.Array | None = None
) -> ActivationQuantized:
  """Has a weight round its inputs to 8 or 4 bits.

  `absmax` is the largest magnitude that a static scale has to reach; None: a scale of each token.
  Raises ValueError for other widths, or if the weight rounds its inputs already.
  """
  check_bits(bits)
  if isinstance(w, ActivationQuantized):
    raise ValueError(f'the inputs of this matrix are quantized already, to {w.bits} bits')
  if absmax is None:
    return ActivationQuantized(w, None, bits)
  return ActivationQuantized(w, static_scale(absmax, bits), bits)


def check_bits(bits: Bits) -> None:
  """Raises ValueError unless inputs can be rounded to so many bits."""
  if bits not in typing.get_args(Bits):
    raise ValueError(f'activations have 8 or 4 bits, not {bits}')


def static_scale(absmax: jax.Array, bits: Bits) -> jax.Array:
  """The scale of codes that reach from -absmax to absmax, float32 []."""
  return jnp.maximum(absmax.astype(jnp.float32) / highest_code(bits), TINY)


def highest_code(bits: Bits) -> int:
  return 2 ** (bits - 1) - 1


def _per_column(w: Matrix) -> bool:
  """Whether a weight is integers times one scale a column."""
  if not isinstance(w, quantized.QuantizedTensor) or w.zeros is not None:
    return False
  return quantized.FORMATS[w.format].integer and w.group_size == w.inputs


def _integers(codes, w):
  contracted = (((codes.ndim - 1,), (0,)), ((), ()))
  codes_IO = w.codes().astype(jnp.int8)
  return jax.lax.dot_general(codes, codes_IO, contracted, preferred_element_type=jnp.int32)


@jax.custom_vjp
def _product(x, w):
  codes, scale = w.encode(x)
  values = jax.lax.optimization_barrier(stored(w.values))
  if _per_column(values):
    on_tpu = functools.partial(in_eights, _integers)
    y = jax.lax.platform_dependent(codes, values, tpu=on_tpu, default=_integers)
    y = y.astype(jnp.float32)
    column_O = dense(values.scales)[0].astype(jnp.float32)
    y = y * jnp.broadcast_to(column_O, y.shape)
  else:
    # Codes are exact in bfloat16; sums of them could leave the range of float16.
    wide = x.dtype if x.dtype == jnp.bfloat16 else jnp.float32
    y = matmul(codes.astype(wide), values).astype(jnp.float32)
  return (y * scale).astype(x.dtype)


def _forward(x, w):
  return _product(x, w), (x, w)


def _backward(saved, y_bar):
  x, w = saved
  _, pull = jax.vjp(matmul, w.round_inputs(x).astype(x.dtype), w.values)
  x_bar, values_bar = pull(y_bar)
  if w.scale is None:
    return x_bar, dataclasses.replace(w, values=values_bar)
  inside = jnp.abs(x.astype(jnp.float32)) <= highest_code(w.bits) * w.scale
  x_bar = jnp.where(inside, x_bar, jnp.zeros_like(x_bar))
  return x_bar, dataclasses.replace(w, values=values_bar, scale=jnp.zeros_like(w.scale))


_product.defvjp(_forward, _backward)
