"""Matrices that compressed-tensors stores as a bitmask and values, as matrices again."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from model.compressed_tensors import layout, masks
from model.hf_quantized import parts
from model.safetensors_io import DTYPES, Tensor

_SHAPES = (np.dtype(np.int64), np.dtype(np.int32))
_BYTES = (np.dtype(np.uint8),)


def expanded(settings: Any, left: dict[str, Tensor]) -> dict[str, Tensor]:
  """The tensors with each such matrix in place of its parts, which is read when it is asked for.

  `settings` is the `sparsity_config`. Raises ValueError, naming the tensor, where parts of a matrix
  are missing or do not fit.
  """
  if not settings:
    return left
  format = settings.get('format') if isinstance(settings, Mapping) else settings
  if format in (None, 'dense'):
    return left
  if format not in masks.FORMATS:
    raise ValueError(
      f'the format {format!r} of sparsity_config is not one of {", ".join(masks.FORMATS)}'
    )
  for prefix in parts.modules(left, 'bitmask'):
    name = f'{prefix}.weight' if format == masks.TWO_OF_FOUR else prefix
    if name in left:
      raise ValueError(f'{name} is stored twice, the second time as {prefix}.bitmask')
    left[name] = _matrix(left, prefix, format)
  return left


def _matrix(left, prefix, format) -> Tensor:
  stated = parts.take(left, prefix, 'shape', _SHAPES)
  mask = parts.take(left, prefix, 'bitmask', _BYTES, 2)
  values = parts.take(left, prefix, 'compressed', tuple(DTYPES.values()))
  if format == masks.ANY:
    parts.take(left, prefix, 'row_offsets', _SHAPES)  # they follow from the mask
  shape = tuple(int(n) for n in stated.read().reshape(-1))
  rows = mask.shape[0]
  if len(shape) != 2 or min(shape) < 1 or shape[0] != rows:
    raise ValueError(f'{prefix}.shape is {shape}, and the mask has {rows} rows')
  parts.require(mask, f'{prefix}.bitmask', (rows, -(-shape[1] // 8)))

  def read():
    try:
      kept_OI = layout.unpack_mask(mask.read(), shape[1])
      return layout.scattered(values.read(), kept_OI)
    except ValueError as error:
      raise ValueError(f'{prefix}: {error}') from None

  return Tensor(shape, values.dtype, read)
