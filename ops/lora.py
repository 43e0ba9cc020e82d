"""A weight plus a low-rank correction: LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

The base may be any weight; over a quantized one this is QLoRA (Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ops import axes
from ops.linear import (
  Matrix,
  Weight,
  array,
  dense,
  map_values,
  matmul,
  matmuls,
  require,
  weight_type,
)


@weight_type
@dataclasses.dataclass(frozen=True)
class LoraTensor(Weight):
  """base + scale * a @ b, with a [I, R] and b [R, O]. `scale` is alpha / R in the paper's terms."""

  base: Matrix = array('IO')
  a_IR: jax.Array = array('IR', 'adapter')
  b_RO: jax.Array = array('RO', 'adapter')
  scale: float

  passes_to = 'base'

  def check_fields(self):
    axes.check('...IO,...IR,...RO', self.base, self.a_IR, self.b_RO)
    number = isinstance(self.scale, int | float) and math.isfinite(self.scale)
    require(number, f'the scale of a correction is a finite number, not {self.scale!r}')
    for side in (self.a_IR, self.b_RO):
      floating = jnp.issubdtype(side.dtype, jnp.floating)
      require(floating, f'the sides of a correction are floating, not {side.dtype}')

  @property
  def shape(self):
    return self.base.shape

  @property
  def dtype(self):
    return self.base.dtype

  def dense(self):
    return (dense(self.base).astype(jnp.float32) + self.delta()).astype(self.dtype)

  def delta(self) -> jax.Array:
    """The correction alone, float32 [I, O]."""
    return self.scale * (self.a_IR.astype(jnp.float32) @ self.b_RO.astype(jnp.float32))

  def matmul(self, x):
    return self.matmuls(x, [self])[0]

  @classmethod
  def matmuls(cls, x, weights):
    lows = matmuls(x, [w.a_IR for w in weights])
    products = matmuls(x, [w.base for w in weights])
    return tuple(y + w.scale * matmul(low, w.b_RO) for y, low, w in zip(products, lows, weights))

  def map_values(self, fn):
    return dataclasses.replace(self, base=map_values(fn, self.base))


def attach(w: Matrix, rank: int, *, alpha: float, key: jax.Array) -> LoraTensor:
  """Adds a correction that starts at zero: a is uniform as in the reference code, b is zero.

  Raises ValueError if the rank is below 1 or above the smaller side of the matrix.
  """
  sizes = axes.check('IO', w)
  if not 1 <= rank <= min(sizes.values()):
    raise ValueError(f'a rank lies between 1 and {min(sizes.values())}, not {rank}')
  limit = sizes['I'] ** -0.5
  a_IR = jax.random.uniform(key, (sizes['I'], rank), jnp.float32, -limit, limit)
  return LoraTensor(w, a_IR, jnp.zeros((rank, sizes['O']), jnp.float32), alpha / rank)


def merge(w: LoraTensor) -> jax.Array:
  """Folds the correction into a dense matrix of the base's dtype, computed in float32.

  The base is what the adapter was trained against, so a quantized one is dequantized first.
  """
  return w.dense()
