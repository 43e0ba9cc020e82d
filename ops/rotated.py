"""Weights whose inputs are rotated first, and the orthogonal transforms that are quick to apply.

A rotation spreads outliers over all channels, so that few bits represent them better (Ashkboos et
al. 2024, QuaRot, https://arxiv.org/abs/2404.00456). A width n = 2**k * m with m odd gets the
orthogonal matrix  C_m x H_2 x ... x H_2  (Kronecker products), where H is Hadamard's matrix and C_m
that of the cosine transform. It is applied factor by factor: where n is 11008 = 43 * 64 * 4, a row
takes 43 + 64 + 4 multiplications an entry and not 11008. QuaRot has Hadamard matrices for some m
instead, and refuses other widths.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ops.linear import (
  Matrix,
  Weight,
  array,
  dense,
  grouped_matmul,
  is_count,
  map_values,
  matmul,
  refit,
  require,
  weight_type,
)

LARGEST_FACTOR = 64  # wide enough for a matrix unit, narrow enough to save work


@functools.cache
def factors(width: int) -> tuple[np.ndarray, ...]:
  """Small orthogonal matrices, float64, whose Kronecker product is the transform of this width."""
  odd = width
  while odd % 2 == 0:
    odd //= 2
  found, rest = [_cosine(odd)] if odd > 1 else [], width // odd
  while rest > 1:
    found.append(_hadamard(min(rest, LARGEST_FACTOR)))
    rest //= len(found[-1])
  return tuple(found)


def _cosine(n: int) -> np.ndarray:
  k, i = np.arange(n)[:, None], np.arange(n)
  matrix = np.sqrt(2 / n) * np.cos(np.pi * (2 * i + 1) * k / (2 * n))
  matrix[0] /= np.sqrt(2)
  return matrix


def _hadamard(n: int) -> np.ndarray:
  matrix = np.ones((1, 1))
  while len(matrix) < n:
    matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
  return matrix / np.sqrt(n)


def rotate(x, width: int | None = None, *, inner: int = 1, inverse: bool = False):
  """Multiplies the last axis of x by the transform, block by block of `width` * `inner` entries.

  In a block, entries that are `inner` apart are mixed: 1 mixes neighbours, the width of a head
  mixes heads. `width` None is the whole axis. Works on numpy and on JAX arrays, in their precision.
  """
  shape, lead = x.shape, x.shape[:-1]
  width = shape[-1] // inner if width is None else width
  if shape[-1] % (width * inner):
    raise ValueError(f'{shape[-1]} entries do not divide into blocks of {width} x {inner}')
  blocks = (*lead, shape[-1] // (width * inner))
  x = x.reshape(*blocks, width, inner).swapaxes(-1, -2)  # [..., inner, width]
  for factor in factors(width):
    # The first part of the axis is contracted and put last; after all factors, order is restored.
    factor = factor.T if inverse else factor
    parted = x.reshape(*blocks, inner, len(factor), -1).swapaxes(-1, -2)
    x = (parted @ factor.astype(x.dtype)).reshape(*blocks, inner, width)
  return x.swapaxes(-1, -2).reshape(shape)


@weight_type
@dataclasses.dataclass(frozen=True)
class RotatedTensor(Weight):
  """x -> rotate(x) @ weight. `inner` is that of `rotate`; the products of a row are in float32."""

  weight: Matrix = array('IO')
  inner: int

  transforms_input = True
  passes_to = 'weight'

  def check_fields(self):
    inputs = self.weight.shape[-2]
    divides = is_count(self.inner) and inputs % self.inner == 0
    require(divides, f'inner is a divisor of the {inputs} inputs, not {self.inner!r}')

  @property
  def shape(self):
    return self.weight.shape

  @property
  def dtype(self):
    return self.weight.dtype

  def dense(self):
    w_OI = dense(self.weight).astype(jnp.float32).T
    return rotate(w_OI, inner=self.inner, inverse=True).T.astype(self.dtype)

  def matmul(self, x):
    return matmul(self._turned(x), self.weight)

  def grouped_matmul(self, x_TI, group_sizes_E):
    return grouped_matmul(self._turned(x_TI), self.weight, group_sizes_E)

  def _turned(self, x):
    return rotate(x.astype(jnp.float32), inner=self.inner).astype(x.dtype)

  def map_values(self, fn):
    return dataclasses.replace(self, weight=map_values(fn, self.weight))

  def refit(self, w_IO):
    turned_OI = rotate(w_IO.astype(jnp.float32).T, inner=self.inner)
    return dataclasses.replace(self, weight=refit(self.weight, turned_OI.T))


def rotated(w_IO: jax.Array, inner: int = 1) -> RotatedTensor:
  """A weight that multiplies like w_IO but stores the matrix for rotated inputs; experts too."""
  w_OI = np.swapaxes(np.asarray(w_IO, np.float64), -1, -2)
  turned_IO = np.swapaxes(rotate(w_OI, inner=inner), -1, -2)
  return RotatedTensor(jnp.asarray(turned_IO.astype(w_IO.dtype)), inner)
