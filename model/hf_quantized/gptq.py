"""GPTQ checkpoints, as AutoGPTQ, GPTQModel and Optimum write them.

A linear layer X of b = 2, 3, 4 or 8 bits is stored as

  X.qweight  int32 [I * b / 32, O]  codes, packed along the inputs
  X.qzeros   int32 [J, O * b / 32]  zero points, packed along the outputs
  X.scales   float16 [J, O]
  X.g_idx    int32 [I]              the group of each input

with the lowest bits first, and w = (code - zero) * scale. The format `gptq`, which is that of files
that name none, stores zero - 1; `gptq_v2` stores the zero point itself. GPTQModel subtracts from
whole words of 2, 4 or 8 bits, so that a zero point of 0 borrows from its neighbour, and adding to
whole words undoes it; kernels that add to each number by itself read such words in another way.
Where columns were quantized in the order of their activations (`desc_act`), the same group comes
more than once in `g_idx`. After
Frantar et al. (2022), "GPTQ", https://arxiv.org/abs/2210.17323; format:
https://github.com/ModelCloud/GPTQModel.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from model.hf_names import fields
from model.hf_quantized import parts
from model.hf_quantized.codes import Codes, coded
from model.safetensors_io import DTYPES, Tensor

INDICES = (*parts.WORDS, DTYPES['I64'])
BITS = (2, 3, 4, 8)
# Formats, and whether they store zero - 1.
FORMS = {'gptq': True, 'gptq_v2': False}


def read(settings: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """The tensors of the plain model. Raises ValueError as `Method.read` says."""
  settings = dict(settings)
  form = settings.get('checkpoint_format') or settings.get('format') or 'gptq'
  if form not in FORMS:
    raise ValueError(
      f'checkpoint_format {form!r} of a GPTQ checkpoint is not supported; '
      f'supported: {", ".join(FORMS)}'
    )
  bits = fields.integer(settings, 'bits', 4)
  group = fields.integer(settings, 'group_size', 128)
  if bits not in BITS or (group < 1 and group != -1):
    raise ValueError(f'GPTQ with bits {bits} and group_size {group} is not supported')
  # Settings for single modules; what they have been given follows from the shapes.
  varied = bool(settings.get('dynamic'))
  left = dict(stored)
  for module in parts.modules(stored, 'qweight'):
    matrix = _matrix(left, module, None if varied else (bits, group), FORMS[form])
    parts.put(left, f'{module}.weight', matrix)
  return left


def _matrix(stored, module, stated, less_one):
  take = functools.partial(parts.take, stored, module)
  qweight, qzeros = take('qweight', parts.WORDS, 2), take('qzeros', parts.WORDS, 2)
  scales = take('scales', parts.SCALES, 2)
  (groups, outputs), (words, _) = scales.shape, qweight.shape
  parts.require(qweight, f'{module}.qweight', (words, outputs))
  bits = 32 * qzeros.shape[1] // outputs if outputs else 0
  bits, group = stated or (bits, None)
  if bits not in BITS or 32 * words % bits or outputs * bits % 32:
    raise ValueError(f'{module}.qweight {qweight.shape} holds no {outputs} columns of {bits} bits')
  parts.require(qzeros, f'{module}.qzeros', (groups, outputs * bits // 32))
  inputs = 32 * words // bits
  size = inputs if group == -1 else group or -(-inputs // max(groups, 1))
  if groups != -(-inputs // size):
    raise ValueError(
      f'{module}.scales has {groups} groups, but {inputs} inputs in groups of {size} have '
      f'{-(-inputs // size)}'
    )
  order = None
  if f'{module}.g_idx' in stored:
    order = take('g_idx', INDICES, 1)
    parts.require(order, f'{module}.g_idx', (inputs,))

  def codes():
    return Codes(
      values=parts.unpack(qweight.read(), bits, 0),
      scales=scales.read(),
      zeros=_zero_points(qzeros.read(), bits, less_one),
      rows=np.arange(inputs) // size if order is None else _order(order.read(), groups),
      format=f'int{bits}',
    )

  return coded(module, outputs, inputs, codes)


def _zero_points(words, bits, less_one):
  if not less_one:
    return parts.unpack(words, bits, 1)
  if 32 % bits == 0:
    ones = sum(1 << at for at in range(0, 32, bits))
    return parts.unpack(words.view(np.uint32) + np.uint32(ones), bits, 1)
  return (parts.unpack(words, bits, 1) + np.uint8(1)) & np.uint8(2**bits - 1)


def _order(groups_I, groups):
  if groups_I.min() < 0 or groups_I.max() >= groups:
    raise ValueError(f'g_idx has groups {groups_I.min()} to {groups_I.max()}, of {groups}')
  return groups_I.astype(np.int64)
