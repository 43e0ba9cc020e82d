"""AWQ checkpoints, as AutoAWQ writes them in its GEMM layout.

A linear layer X of 4 bits is stored as

  X.qweight  int32 [I, O / 8]  codes, packed along the outputs
  X.qzeros   int32 [J, O / 8]  zero points, likewise
  X.scales   float16 [J, O]

and w = (code - zero) * scale. From the lowest bits on, the eight numbers of a word belong to the
outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight. After Lin et al. (2023), "AWQ",
https://arxiv.org/abs/2306.00978; format: https://github.com/casper-hansen/AutoAWQ.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from model.hf_names import fields
from model.hf_quantized import parts
from model.hf_quantized.codes import Codes, coded
from model.safetensors_io import Tensor

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each number of a word
LAYOUT = 'gemm'


def read(settings: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """The tensors of the plain model. Raises ValueError as `Method.read` says."""
  settings = dict(settings)
  # Older files spell these otherwise.
  bits = fields.integer(settings, 'w_bit' if 'w_bit' in settings else 'bits', BITS)
  group_key = 'q_group_size' if 'q_group_size' in settings else 'group_size'
  group = fields.integer(settings, group_key, 128)
  layout = settings.get('version') or LAYOUT
  if str(layout).lower() != LAYOUT:
    raise ValueError(f'AWQ in the layout {layout!r} is not supported; supported: {LAYOUT}')
  if bits != BITS or (group < 1 and group != -1):
    raise ValueError(f'AWQ with {bits} bits in groups of {group} is not supported')
  left = dict(stored)
  for module in parts.modules(stored, 'qweight'):
    parts.put(left, f'{module}.weight', _matrix(left, module, group))
  return left


def _matrix(stored, module, group):
  take = functools.partial(parts.take, stored, module)
  qweight, qzeros = take('qweight', parts.WORDS, 2), take('qzeros', parts.WORDS, 2)
  scales = take('scales', parts.SCALES, 2)
  (groups, outputs), inputs = scales.shape, qweight.shape[0]
  parts.require(qweight, f'{module}.qweight', (inputs, outputs // 8))
  parts.require(qzeros, f'{module}.qzeros', (groups, outputs // 8))
  size = inputs if group == -1 else group
  parts.require(scales, f'{module}.scales', (-(-inputs // size), qweight.shape[1] * 8))

  def codes():
    return Codes(
      values=_unpacked(qweight),
      scales=scales.read(),
      zeros=_unpacked(qzeros),
      rows=np.arange(inputs) // size,
      format='int4',
    )

  return coded(module, outputs, inputs, codes)


def _unpacked(words: Tensor) -> np.ndarray:
  numbers = parts.unpack(words.read(), BITS, 1).reshape(*words.shape, len(ORDER))
  return numbers[..., np.argsort(ORDER)].reshape(words.shape[0], -1)
