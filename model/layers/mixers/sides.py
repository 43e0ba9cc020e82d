"""Stores the keys or the values of tokens, one side of a cache, as floats or as 8-bit codes.

  Floats   in a floating-point type
  Codes8   x = code * scale with one symmetric scale per token and head

`of` encodes new tokens; what is stored of a token depends on that token alone. Scales are float16,
so keys and values must be smaller than 65504 in magnitude. Bytes per token and head of width 64,
both sides: Codes8 132, bfloat16 256.
"""

import dataclasses
from typing import Protocol, Self

import jax
import jax.numpy as jnp

from model.layers import cache
from ops import axes
from ops.attention import attention, attention_over_codes
from ops.masks import AttentionMask

SCALE_DTYPE = jnp.float16
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16; a constant group has a range of zero


class Side(Protocol):
  """Keys or values [B, S, K, H] in some form; all arrays of the pytree begin with B and S."""

  @property
  def slots(self) -> int:
    """The size of the axis S."""

  def of(self, new_BTKH: jax.Array) -> Self:
    """New tokens in the form in which this side stores them."""

  def floats(self, dtype) -> jax.Array:
    """The stored keys or values as floating-point numbers [B, S, K, H]."""

  def attended(self, values: Self, q_BTNH: jax.Array, mask: AttentionMask, **scores) -> jax.Array:
    """Attends to these keys and to `values`, as `ops.attention.attention` does."""


@cache.register
@dataclasses.dataclass(frozen=True)
class Floats:
  """In a floating-point type; attention widens what it reads."""

  x_BSKH: jax.Array = cache.array('BSKH')

  @classmethod
  def empty(cls, shape: tuple[int, ...], dtype) -> 'Floats':
    # Not uninitialised: masked slots are multiplied by zero, and 0 * NaN is NaN.
    return cls(jnp.zeros(shape, dtype))

  @property
  def slots(self) -> int:
    return self.x_BSKH.shape[1]

  def of(self, new_BTKH):
    return Floats(new_BTKH.astype(self.x_BSKH.dtype))

  def floats(self, dtype):
    return self.x_BSKH.astype(dtype)

  def attended(self, values, q_BTNH, mask, **scores):
    return attention(q_BTNH, self.x_BSKH, values.x_BSKH, mask, **scores)


class BFloats:
  """`Floats` in bfloat16, for a model of any dtype."""

  @staticmethod
  def empty(shape: tuple[int, ...], dtype) -> Floats:
    del dtype
    return Floats.empty(shape, jnp.bfloat16)


@cache.register
@dataclasses.dataclass(frozen=True)
class Codes8:
  """As int8 codes with one scale per token and head."""

  codes_BSKH: jax.Array = cache.array('BSKH')
  scales_BSK: jax.Array = cache.array('BSK')

  def __post_init__(self):
    axes.check_fields('...BSKH,...BSK', self.codes_BSKH, self.scales_BSK)

  @classmethod
  def empty(cls, shape: tuple[int, ...], dtype) -> 'Codes8':
    del dtype  # nothing is stored in floating point
    return cls(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:3], SCALE_DTYPE))

  @property
  def slots(self) -> int:
    return self.codes_BSKH.shape[1]

  def of(self, new_BTKH):
    new_BTKH = new_BTKH.astype(jnp.float32)
    scales_BTK = stored_scale(jnp.abs(new_BTKH).max(-1) * (1 / 127))
    steps = new_BTKH / scales_BTK.astype(jnp.float32)[..., None]
    return Codes8(jnp.clip(jnp.round(steps), -127, 127).astype(jnp.int8), scales_BTK)

  def floats(self, dtype):
    scales = self.scales_BSK.astype(jnp.float32)[..., None]
    return (self.codes_BSKH.astype(jnp.float32) * scales).astype(dtype)

  def attended(self, values, q_BTNH, mask, **scores):
    codes = self.codes_BSKH, values.codes_BSKH
    return attention_over_codes(q_BTNH, codes, (self.scales_BSK, values.scales_BSK), mask, **scores)


SIDES = {'float': Floats, 'bf16': BFloats, 'int8': Codes8}


def stored_scale(x: jax.Array) -> jax.Array:
  """A scale as it is stored, at least the smallest."""
  return stored(jnp.maximum(x, SMALLEST_SCALE))


def stored(x: jax.Array) -> jax.Array:
  """A scale or a minimum as it is stored."""
  # XLA may skip a rounding between two float32 computations; the codes must use the stored value.
  return jax.lax.optimization_barrier(x.astype(SCALE_DTYPE))
