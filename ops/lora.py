"""Low-rank adapters: a weight plus a correction of few numbers that is trained by itself.

  LoRA    W + scale * A B (Hu et al. 2021, https://arxiv.org/abs/2106.09685); scale is alpha / R, or
          alpha / sqrt(R) in rank-stabilized LoRA (Kalajdzievski 2023,
          https://arxiv.org/abs/2312.03732)
  QLoRA   the same over a quantized base (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)
  DoRA    the columns of W + scale * A B, scaled to trained lengths (Liu et al. 2024,
          https://arxiv.org/abs/2402.09353)

The base may be any weight. Over a pruned one the correction is masked, because a product with
A and B apart would give all weights a value: `MaskedTensor(LoraTensor(base, ...), mask)`, which is
SparsePEFT (Munoz et al. 2024, https://arxiv.org/abs/2410.03750). It widens the correction in each
product, and merges without losing a zero. ops/adapter_starts.py has the initial values.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from ops import axes, packing
from ops.linear import (
  Matrix,
  Weight,
  array,
  dense,
  grouped_matmul,
  map_values,
  matmul,
  matmuls,
  refit,
  require,
  weight_type,
)
from ops.masked import MaskedTensor
from ops.sparse import SparseTensor

Into = Literal['dense', 'base']


@weight_type
@dataclasses.dataclass(frozen=True)
class LoraTensor(Weight):
  """base + scale * a @ b, with a [I, R] and b [R, O]."""

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
    return self.sum().astype(self.dtype)

  def sum(self) -> jax.Array:
    """The corrected matrix before it is rounded to the dtype of the base, float32 [I, O]."""
    return dense(self.base).astype(jnp.float32) + self.delta()

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

  def grouped_matmul(self, x_TI, group_sizes_E):
    times = lambda x, w: grouped_matmul(x, w, group_sizes_E)
    return times(x_TI, self.base) + self.scale * times(times(x_TI, self.a_IR), self.b_RO)

  def map_values(self, fn):
    return dataclasses.replace(self, base=map_values(fn, self.base))


@weight_type
@dataclasses.dataclass(frozen=True)
class DoraTensor(Weight):
  """The columns of an adapted matrix, each scaled to a length of its own.

  values: a `LoraTensor` [I, O].
  magnitude_O: the lengths of the columns.

  Gradients do not pass through the lengths in the denominator (section 4.3 of the paper). They need
  the dense matrix, so every product computes it; merge before decoding.
  """

  values: LoraTensor = array('IO')
  magnitude_O: jax.Array = array('O', 'adapter')

  def check_fields(self):
    axes.check('...IO,...O', self.values, self.magnitude_O)
    kind = type(self.values).__name__
    require(isinstance(self.values, LoraTensor), f'DoRA scales the columns of LoRA, not a {kind}')

  @property
  def shape(self):
    return self.values.shape

  @property
  def dtype(self):
    return self.values.dtype

  def factor(self) -> jax.Array:
    """The factor of each column, float32 [O]."""
    length_O = jnp.linalg.norm(self.values.sum(), axis=0)
    return self.magnitude_O / jax.lax.stop_gradient(length_O)

  def dense(self):
    return self.sum().astype(self.dtype)

  def sum(self) -> jax.Array:
    """The adapted matrix before it is rounded to the dtype of the base, float32 [I, O]."""
    return self.values.sum() * self.factor()[None]

  def matmul(self, x):
    y = matmul(x, self.values)
    return (y.astype(jnp.float32) * jnp.broadcast_to(self.factor(), y.shape)).astype(y.dtype)

  def map_values(self, fn):
    return dataclasses.replace(self, values=map_values(fn, self.values))


def column_lengths(w: Matrix) -> jax.Array:
  """The Euclidean lengths of the columns of a matrix, float32 [O]; DoRA starts with them."""
  return jnp.linalg.norm(dense(w).astype(jnp.float32), axis=0)


def keep_zeros(w: LoraTensor) -> Matrix:
  """Masks an adapter over a pruned base (N:M or masked); returns any other as it is."""
  if not isinstance(w.base, MaskedTensor | SparseTensor):
    return w
  return MaskedTensor(w, packing.pack(w.base.kept(), 1))


def merge(w: Matrix, into: Into = 'dense') -> Matrix:
  """Folds the corrections inside a weight into it; computed in float32 and rounded once.

  'dense' gives a plain matrix of the base's dtype, which equals the adapted weight as it was
  trained. 'base' stores the result as the base is stored: a quantized base is quantized anew, which
  rounds a second time. Masks keep their zeros in both. A weight without a correction
  stays as it is.
  """
  if isinstance(w, LoraTensor | DoraTensor):
    base = w.base if isinstance(w, LoraTensor) else w.values.base
    return refit(base, w.sum()) if into == 'base' else w.dense()
  if isinstance(w, MaskedTensor) and _is_adapted(w.values):
    adapter = w.values
    base = adapter.base if isinstance(adapter, LoraTensor) else adapter.values.base
    w_IO = jnp.where(w.kept(), adapter.sum(), 0)
    return refit(base, w_IO) if into == 'base' else w_IO.astype(w.dtype)
  if isinstance(w, Weight) and w.passes_to is not None:
    return dataclasses.replace(w, **{w.passes_to: merge(getattr(w, w.passes_to), into)})
  return w


def _is_adapted(w: Matrix) -> bool:
  return isinstance(w, LoraTensor | DoraTensor)
