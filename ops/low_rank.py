"""Weights that are the product of two narrow matrices, and the truncated SVD that finds them.

A matrix (I, O) of rank R takes R (I + O) numbers instead of I O. Of all matrices of that rank, the
leading R singular vectors give the one of least squared error (Eckart and Young 1936). A table of
a vocabulary is one as the transpose of such a weight (ops/transposed.py): a lookup takes the
columns of its tokens, and a tied head multiplies by one matrix after the other. ALBERT trains its
embeddings in this form (Lan et al. 2020, https://arxiv.org/abs/1909.11942).
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops import axes
from ops.linear import (
  Matrix,
  Weight,
  array,
  dense,
  grouped_matmul,
  is_count,
  map_values,
  matmul,
  matmul_transposed,
  require,
  weight_type,
)


@weight_type
@dataclasses.dataclass(frozen=True)
class LowRankTensor(Weight):
  """a [I, R] @ weight [R, O]. Other compressions apply to `weight`, the side of the outputs."""

  a_IR: jax.Array = array('IR')
  weight: Matrix = array('RO')

  transforms_input = True
  passes_to = 'weight'

  def check_fields(self):
    axes.check('...IR,...RO', self.a_IR, self.weight)
    floating = jnp.issubdtype(self.a_IR.dtype, jnp.floating)
    require(floating, f'the first of two factors is floating, not {self.a_IR.dtype}')

  @property
  def rank(self) -> int:
    return self.a_IR.shape[-1]

  @property
  def shape(self):
    return (*self.a_IR.shape[:-1], self.weight.shape[-1])

  @property
  def dtype(self):
    return self.weight.dtype

  def dense(self):
    product = self.a_IR.astype(jnp.float32) @ dense(self.weight).astype(jnp.float32)
    return product.astype(self.dtype)

  def matmul(self, x):
    return matmul(matmul(x, self.a_IR), self.weight)

  def grouped_matmul(self, x_TI, group_sizes_E):
    narrow = grouped_matmul(x_TI, self.a_IR, group_sizes_E)
    return grouped_matmul(narrow, self.weight, group_sizes_E)

  def matmul_transposed(self, x):
    return matmul_transposed(matmul_transposed(x, self.weight), self.a_IR)

  def rows(self, index):
    return matmul(self.a_IR[index], self.weight)

  def map_values(self, fn):
    return dataclasses.replace(self, weight=map_values(fn, self.weight))

  def refit(self, w_IO):
    if isinstance(self.weight, Weight):
      raise ValueError('two factors, one of them compressed, cannot store another matrix')
    return factorise(w_IO.astype(self.dtype), self.rank)


def factorise(w_IO: jax.Array, rank: int) -> LowRankTensor:
  """The matrix of this rank with the least squared error; both factors have the dtype of `w_IO`.

  The singular values are shared out between the factors. Raises ValueError if there are fewer
  inputs or outputs than the rank.
  """
  if not (is_count(rank) and rank <= min(w_IO.shape)):
    raise ValueError(f'a rank of {w_IO.shape} is from 1 to {min(w_IO.shape)}, not {rank!r}')
  left, sizes, right = jnp.linalg.svd(w_IO.astype(jnp.float32), full_matrices=False)
  roots_R = jnp.sqrt(sizes[:rank])
  a_IR, b_RO = left[:, :rank] * roots_R[None], roots_R[:, None] * right[:rank]
  return LowRankTensor(a_IR.astype(w_IO.dtype), b_RO.astype(w_IO.dtype))
