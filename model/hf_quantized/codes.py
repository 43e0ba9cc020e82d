"""Matrices as codes and scales, apart from how a file lays them out.

Each reader of a method makes `Codes`, in numpy. They say which numbers are meant, and whether a
weight type of `ops.quantized` holds exactly these numbers.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from model.safetensors_io import Tensor
from ops import packing
from ops.formats import FORMATS, FormatName
from ops.quantized import SCALE_DTYPES, SMALLEST_GROUP, QuantizedTensor

FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes:
  """A matrix [I, O]: w = (code - zero) * scale, or w = codebook[code] * scale.

  values: [I, O], unsigned integers, or floats of few bits that stand for themselves.
  scales: [J, O], floating.
  zeros: integers [J, O]; None where `values` are indices or floats.
  rows: [I], the row of `scales` and `zeros` that an input has.
  codebook: the numbers that `values` are indices of, float32.
  format: the one of ours with these levels; None: there is none.
  """

  values: np.ndarray
  scales: np.ndarray
  zeros: np.ndarray | None = None
  rows: np.ndarray
  codebook: np.ndarray | None = None
  format: FormatName | None

  def dense(self) -> np.ndarray:
    """The numbers, float32 [I, O]."""
    if self.codebook is not None:
      levels_IO = self.codebook[self.values]
    else:
      levels_IO = self.values.astype(np.float32)
    if self.zeros is not None:
      levels_IO = levels_IO - self.zeros.astype(np.float32)[self.rows]
    return levels_IO * self.scales.astype(np.float32)[self.rows]

  def columns(self, places: np.ndarray) -> 'Codes':
    """Some of the outputs, in this order."""
    if np.array_equal(places, np.arange(self.values.shape[1])):
      return self
    take = lambda array: None if array is None else array[:, places]
    return dataclasses.replace(
      self, values=take(self.values), scales=take(self.scales), zeros=take(self.zeros)
    )

  @property
  def finite(self) -> bool:
    floats = self.values.dtype.kind not in 'iu'
    return bool(np.isfinite(self.scales).all()) and not (
      floats and not np.isfinite(self.values.astype(np.float32)).all()
    )

  def weight(self, dtype: jnp.dtype) -> QuantizedTensor | str:
    """The weight with the same numbers, or why there is none; `dtype` is that of its dense form."""
    if self.format is None:
      return 'no format has these levels'
    size = self._run()
    if size < min(SMALLEST_GROUP, len(self.rows)):
      return f'consecutive inputs have different scales (in runs of {size})'
    places = self.rows[::size]
    scales_JO = self.scales[places]
    if scales_JO.dtype not in SCALE_DTYPES:
      scales_JO = scales_JO.astype(np.float32)
    zeros_JO = None
    bits = FORMATS[self.format].bits
    if self.zeros is not None and (self.zeros != 2 ** (bits - 1)).any():
      zeros_JO = self.zeros[places]
      outside = zeros_JO[(zeros_JO < 0) | (zeros_JO > 255)]
      if outside.size:
        return f'a zero point of {outside[0]} does not fit a byte'
      zeros_JO = jnp.asarray(zeros_JO.astype(np.uint8))
    values_IO = self._stored(bits, zeros_JO is None)
    return QuantizedTensor(
      values_IO, jnp.array(scales_JO), zeros_JO, self.format, len(self.rows), jnp.dtype(dtype)
    )

  def _run(self) -> int:
    """The largest size of equal groups of consecutive inputs that share a scale."""
    changes = np.flatnonzero(np.diff(self.rows)) + 1
    return int(np.gcd.reduce([len(self.rows), *changes]))

  def _stored(self, bits, symmetric):
    if bits < 8:
      return packing.pack(jnp.asarray(self.values), bits)
    if self.zeros is not None and symmetric:
      return jnp.asarray((self.values ^ np.uint8(128)).view(np.int8))
    return jnp.array(self.values, copy=True)


@dataclasses.dataclass(frozen=True)
class CodedTensor(Tensor):
  """A matrix that is stored as codes, of shape (O, I); `read` makes float32 numbers of them."""

  codes: Callable[[], Codes]

  def turned(self) -> 'CodedTensor':
    """The same matrix with the shape (I, O)."""
    return dataclasses.replace(self, shape=self.shape[::-1], read=lambda: self.read().T)


def coded(name: str, outputs: int, inputs: int, codes: Callable[[], Codes]) -> CodedTensor:
  """A tensor (O, I) of such codes; errors from reading them name the tensor."""
  named = functools.partial(_named, name, codes)
  return CodedTensor((outputs, inputs), FLOAT32, lambda: named().dense().T, named)


def _named(name, codes):
  try:
    return codes()
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from None
