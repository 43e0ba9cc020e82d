"""Sparse matrices as a bitmask and the values that it keeps.

Releases of compressed-tensors up to 0.14 have these two forms, and later ones neither:

  sparse-24-bitmask  X.compressed [O, I / 2], X.bitmask uint8 [O, ceil(I / 8)], X.shape int64 [2, 1]
  sparse-bitmask     the same under X.weight, with flat values, X.weight.shape int64 [2], and
                     X.weight.row_offsets int64 [O]: where the values of each row begin

X.weight may hold codes, of the formats that store a number an entry.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from model.compressed_tensors import layout
from model.safetensors_io import Tensor

TWO_OF_FOUR, ANY = 'sparse-24-bitmask', 'sparse-bitmask'
FORMATS = (TWO_OF_FOUR, ANY)
PRUNED = 0.2  # share of exact zeros above which a matrix counts as pruned


def zeros_share(tensor: Tensor) -> float:
  """The share of exact zeros of a matrix."""
  return float((tensor.read() == 0).mean())


def format_of(matrices: Mapping[str, Tensor]) -> str:
  """The form that all these matrices have: that of 2:4 if each has the pattern."""
  fits = (layout.two_of_four(tensor.read() != 0) is not None for tensor in matrices.values())
  return TWO_OF_FOUR if all(fits) else ANY


def tensors(name: str, tensor: Tensor, format: str) -> dict[str, Tensor]:
  """The tensors of the matrix `name`, which ends in .weight."""
  outputs, inputs = tensor.shape
  mask = lambda: _mask(tensor.read(), format)
  bitmask = Tensor((outputs, -(-inputs // 8)), np.dtype(np.uint8), lambda: layout.pack_mask(mask()))
  shape = np.array([outputs, inputs], np.int64)
  if format == TWO_OF_FOUR:
    prefix, half = name.removesuffix('.weight'), (outputs, inputs // 2)
    values = Tensor(half, tensor.dtype, lambda: tensor.read()[mask()].reshape(half))
    more = {'shape': Tensor((2, 1), shape.dtype, lambda: shape[:, None])}
  else:
    prefix, counts = name, mask().sum(1)
    values = Tensor((int(counts.sum()),), tensor.dtype, lambda: tensor.read()[mask()])
    offsets = np.cumsum(counts) - counts
    more = {
      'shape': Tensor((2,), shape.dtype, lambda: shape),
      'row_offsets': Tensor((outputs,), np.dtype(np.int64), lambda: offsets.astype(np.int64)),
    }
  found = {'compressed': values, 'bitmask': bitmask, **more}
  return {f'{prefix}.{leaf}': one for leaf, one in found.items()}


def _mask(matrix: np.ndarray, format: str) -> np.ndarray:
  nonzero = matrix != 0
  return layout.two_of_four(nonzero) if format == TWO_OF_FOUR else nonzero


def settings(matrices: Mapping[str, Tensor], format: str, targets: list[str]) -> dict[str, Any]:
  """The `sparsity_config` of these matrices."""
  sizes = [np.prod(tensor.shape) for tensor in matrices.values()]
  shares = [zeros_share(tensor) for tensor in matrices.values()]
  return {
    'format': format,
    'global_sparsity': round(float(np.average(shares, weights=sizes)), 6),
    'ignore': [],
    'registry_requires_subclass': False,
    'sparsity_structure': '2:4' if format == TWO_OF_FOUR else 'unstructured',
    'targets': targets,
  }
