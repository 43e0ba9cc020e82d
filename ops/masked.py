"""Weights whose zeros stay: a matrix with a mask of the entries that may differ from zero.

Pruned matrices are stored as plain arrays, whose zeros the first update of a training run would
undo. Under a mask, gradients reach the kept entries alone, so recovery training (Sanh et al. 2020,
https://arxiv.org/abs/2005.07683, section 2 has the forms in use) leaves the sparsity as it is. The
mask takes one bit a weight. Every product masks the matrix anew; `bare` removes the mask.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops import axes, packing
from ops.linear import Matrix, Weight, array, dense, map_values, refit, require, weight_type


@weight_type
@dataclasses.dataclass(frozen=True)
class MaskedTensor(Weight):
  """A matrix (I, O) of which the entries outside a mask count as zero.

  values: [I, O], an array or a nested weight.
  mask: uint8 [ceil(I / 8), O], one bit an entry, packed along the input.
  """

  values: Matrix = array('IO')
  mask: jax.Array = array('IO', 'mask')

  def check_fields(self):
    inputs, outputs = self.values.shape[-2:]
    expected, found = (-(-inputs // 8), outputs), self.mask.shape[-2:]
    fits = self.mask.dtype == jnp.uint8 and found == expected
    require(fits, f'a mask is uint8 of the shape {expected}, not {self.mask.dtype} of {found}')

  @property
  def shape(self):
    return self.values.shape

  @property
  def dtype(self):
    return self.values.dtype

  def kept(self) -> jax.Array:
    """Which entries may differ from zero: bool [I, O]."""
    return packing.unpack(self.mask, 1, self.values.shape[-2]).astype(bool)

  def dense(self):
    return jnp.where(self.kept(), dense(self.values), 0).astype(self.dtype)

  def map_values(self, fn):
    return dataclasses.replace(self, values=map_values(fn, self.values))

  def refit(self, w_IO):
    return dataclasses.replace(self, values=refit(self.values, jnp.where(self.kept(), w_IO, 0)))


def masked(w: Matrix, mask_IO: jax.Array | None = None) -> MaskedTensor:
  """Keeps the zeros of a matrix: those outside `mask_IO` (bool), or by default its exact zeros.

  Weights that are no plain array stay under the mask as they are.
  """
  axes.check('IO,IO', w, mask_IO)
  mask_IO = dense(w) != 0 if mask_IO is None else mask_IO
  values = w if isinstance(w, Weight) else jnp.where(mask_IO, w, 0)
  return MaskedTensor(values, packing.pack(mask_IO, 1))


def bare(w: MaskedTensor) -> Matrix:
  """The matrix without its mask, with exact zeros where the mask had them.

  Raises ValueError if its values are codes, whose zeros may stand for something else.
  """
  return map_values(lambda v: jnp.where(w.kept(), v, 0).astype(v.dtype), w.values)
