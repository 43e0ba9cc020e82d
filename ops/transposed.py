"""Tables stored as the transpose of a weight: embeddings, and heads that are tied to them.

A table (V, D) has a row for each token. Stored as the transpose of a weight (D, V), a token is an
output of that weight: its groups lie along D, so a token has scales of its own, as the output of
any linear layer has. A lookup takes the columns of the tokens, and widens those alone. The product
of a tied head is the product with the inner weight, by the kernels that serve linear layers.
"""

import dataclasses

from ops.linear import (
  Matrix,
  Weight,
  array,
  columns,
  dense,
  map_values,
  matmul,
  refit,
  rows,
  weight_type,
)


@weight_type
@dataclasses.dataclass(frozen=True)
class TransposedTensor(Weight):
  """A table (V, D), stored as `weight` (D, V)."""

  weight: Matrix = array('OI')

  transforms_input = True
  passes_to = 'weight'

  @property
  def shape(self):
    *lead, inputs, outputs = self.weight.shape
    return (*lead, outputs, inputs)

  @property
  def dtype(self):
    return self.weight.dtype

  def dense(self):
    return dense(self.weight).T

  def rows(self, index):
    own = columns(self.weight, index.reshape(-1))
    return dense(own).T.reshape(*index.shape, self.shape[-1])

  def columns(self, index):
    return TransposedTensor(rows(self.weight, index))

  def matmul_transposed(self, x):
    return matmul(x, self.weight)

  def map_values(self, fn):
    return dataclasses.replace(self, weight=map_values(fn, self.weight))

  def refit(self, w_IO):
    return dataclasses.replace(self, weight=refit(self.weight, w_IO.T))


def as_transposed(table: Matrix) -> TransposedTensor:
  """Stores a table (V, D) as the transpose of a weight (D, V), if it is not stored so."""
  return table if isinstance(table, TransposedTensor) else TransposedTensor(table.T)


def as_table(table: Matrix) -> Matrix:
  """A table as models hold it: a plain array where the weight inside is one."""
  plain = isinstance(table, TransposedTensor) and not isinstance(table.weight, Weight)
  return table.weight.T if plain else table
