"""Checkpoints in 8-bit floats (e4m3): one scale for a matrix, for an output or for a tile.

A linear layer X is stored as `X.weight`, float8_e4m3fn [O, I], and one of

  X.weight_scale_inv  [ceil(O / 128), ceil(I / 128)]  of tiles (DeepSeek-V3, Qwen3, MiniMax);
                                                      with no axes, of the matrix
  X.weight_scale      [], [1], [O] or [O, 1]          of the matrix or of each output (AutoFP8,
                                                      FBGEMM)

In each case w = code * scale, in spite of the names. `weight_block_size` in the settings is the
tile. Files may have scales of activations and of caches, which are left out: these numbers stay
floating here. DeepSeek-AI (2024), https://arxiv.org/abs/2412.19437.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from model.hf_quantized import parts
from model.hf_quantized.codes import Codes, coded
from model.safetensors_io import DTYPES, Tensor

E4M3 = (DTYPES['F8_E4M3'],)
SCALES = (*parts.SCALES, DTYPES['F8_E8M0'])
INVERSE, PLAIN = 'weight_scale_inv', 'weight_scale'


def read(settings: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """The tensors of the plain model. Raises ValueError as `Method.read` says."""
  tile = _tile(settings)
  left = dict(stored)
  for module in parts.modules(stored, 'weight'):
    scaled = [leaf for leaf in (INVERSE, PLAIN) if f'{module}.{leaf}' in left]
    if not scaled and left[f'{module}.weight'].dtype not in E4M3:
      continue
    weight = parts.take(left, module, 'weight', E4M3, 2)
    # Where there is none, the error names the one that most files have.
    leaf = scaled[0] if scaled else INVERSE
    scales = parts.take(left, module, leaf, SCALES)
    parts.put(left, f'{module}.weight', _matrix(module, leaf, weight, scales, tile))
  return left


def _tile(settings) -> tuple[int, int] | None:
  found = settings.get('weight_block_size')
  if found is None:
    return None
  whole = isinstance(found, list | tuple) and all(type(n) is int and n > 0 for n in found)
  if not whole or len(found) != 2:
    raise ValueError(f'weight_block_size must be two whole numbers, not {found!r}')
  return found[0], found[1]


def _matrix(module, leaf, weight, scales, tile):
  outputs, inputs = weight.shape
  if len(scales.shape) == 2 and tile is not None:
    rows, size = tile
    parts.require(scales, f'{module}.{leaf}', (-(-outputs // rows), -(-inputs // size)))
  else:
    rows, size = 1, inputs
    if scales.shape not in ((), (1,), (1, 1), (outputs,), (outputs, 1)):
      raise ValueError(
        f'{module}.{leaf} has the shape {scales.shape}, which is no scale of the matrix '
        f'{weight.shape} or of each output'
        + (', and weight_block_size is not set' if tile is None else '')
      )

  def codes():
    scales_OJ = scales.read().astype(np.float32)
    if scales_OJ.size == 1:
      scales_OJ = np.broadcast_to(scales_OJ.reshape(1, 1), (outputs, 1))
    scales_OJ = np.repeat(scales_OJ.reshape(scales_OJ.shape[0], -1), rows, axis=0)[:outputs]
    return Codes(
      values=weight.read().T, scales=scales_OJ.T, rows=np.arange(inputs) // size, format='fp8_e4m3'
    )

  return coded(module, outputs, inputs, codes)
