"""Checkpoints of bitsandbytes: NF4, FP4 and the int8 of LLM.int8().

4 bits. A linear layer X is stored as the uint8 codes `X.weight`, two a byte with the first in the
high half, of the flat matrix [O, I]; `X.weight.absmax` has a scale for each block of 64 of them.
With nested quantization `absmax` is uint8 itself:

  w = map[code] * (nested_map[absmax] * nested_absmax + offset)

all in float32. `X.weight.quant_state.bitsandbytes__nf4` (or `__fp4`) is JSON with the shape, the
sizes of blocks and the offset. The scales become float32: the nested form, which saves half a bit
a weight on disk, is not kept. A block that reaches into the next row of a matrix is a scale for
parts of both.

8 bits. `X.weight` is int8 [O, I], `X.SCB` has the largest size of each output: w = code * SCB /
127. A `X.weight_format` of 0 says that the codes lie in rows.

After Dettmers et al. (2023), "QLoRA", https://arxiv.org/abs/2305.14314, and (2022), "LLM.int8()",
https://arxiv.org/abs/2208.07339; format:
https://github.com/bitsandbytes-foundation/bitsandbytes, functional.QuantState.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from model.hf_quantized import parts
from model.hf_quantized.codes import Codes, coded
from model.safetensors_io import DTYPES, Tensor
from ops.formats import NF4_CODEBOOK

STATE = 'quant_state.bitsandbytes__'
KINDS = ('nf4', 'fp4')
BYTE, SIGNED, F32 = (DTYPES[name] for name in ('U8', 'I8', 'F32'))
MAX_SIZE = 2**31  # of an axis, so that a damaged file asks for no memory


def read(settings: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """The tensors of the plain model. Raises ValueError as `Method.read` says.

  What a matrix is stored as follows from the names; the settings are of no use.
  """
  left = dict(stored)
  for kind in KINDS:
    for module in parts.modules(stored, f'weight.{STATE}{kind}'):
      matrix = _four_bits(left, module, kind)
      parts.put(left, f'{module}.weight', matrix)
  for module in parts.modules(stored, 'SCB'):
    parts.put(left, f'{module}.weight', _eight_bits(left, module))
  return left


def _four_bits(stored, module, kind):
  take = functools.partial(parts.take, stored, module)
  outputs, inputs, state = _state(take(f'weight.{STATE}{kind}', (BYTE,), 1), module, kind)
  # Some releases stored the bytes in the shape of the model's floats.
  packed = take('weight', (BYTE, SIGNED, *parts.SCALES))
  table = take('weight.quant_map', (F32,), 1)
  parts.require(table, f'{module}.weight.quant_map', (16,))
  if 2 * packed.nbytes != outputs * inputs + outputs * inputs % 2:
    raise ValueError(
      f'{module}.weight has {packed.nbytes} bytes, not half of a matrix of {outputs} x {inputs}'
    )
  block = _count(state, 'blocksize', module)
  blocks = -(-outputs * inputs // block)
  nested = 'nested_blocksize' in state
  absmax = take('weight.absmax', (BYTE,) if nested else (F32,), 1)
  parts.require(absmax, f'{module}.weight.absmax', (blocks,))
  inner = _nested(take, state, module, blocks) if nested else lambda scales: scales

  def codes():
    octets = np.ascontiguousarray(packed.read()).reshape(-1).view(np.uint8)
    flat = np.stack([octets >> 4, octets & 15], 1).reshape(-1)[: outputs * inputs]
    codebook = table.read()
    known = kind == 'nf4' and np.array_equal(codebook, np.float32(NF4_CODEBOOK))
    scales_JO, rows = _by_output(inner(absmax.read()), outputs, inputs, block)
    return Codes(
      values=flat.reshape(outputs, inputs).T,
      scales=scales_JO,
      rows=rows,
      codebook=codebook,
      format='nf4' if known else None,
    )

  return coded(f'{module}.weight', outputs, inputs, codes)


def _by_output(scales, outputs, inputs, block) -> tuple[np.ndarray, np.ndarray]:
  """Scales [J, O] from those of blocks of the flat matrix [O, I], and the row for each input.

  Where blocks reach over the ends of rows, J groups are as large as fits both.
  """
  size = int(np.gcd(inputs, block))
  first = np.arange(outputs)[None] * inputs + np.arange(0, inputs, size)[:, None]
  return scales[first // block], np.arange(inputs) // size


def _nested(take, state, module, blocks):
  """A function from the codes of scales to the scales."""
  size = _count(state, 'nested_blocksize', module)
  offset = state.get('nested_offset')
  if not isinstance(offset, float | int) or isinstance(offset, bool):
    raise ValueError(f'{module}.weight.{STATE}*: nested_offset must be a number, not {offset!r}')
  outer, table = take('weight.nested_absmax', (F32,), 1), take('weight.nested_quant_map', (F32,), 1)
  parts.require(outer, f'{module}.weight.nested_absmax', (-(-blocks // size),))
  parts.require(table, f'{module}.weight.nested_quant_map', (256,))

  def scales(codes):
    wide = np.repeat(outer.read(), size)[: len(codes)]
    return table.read()[codes] * wide + np.float32(offset)

  return scales


def _state(tensor, module, kind) -> tuple[int, int, dict]:
  """The size of the matrix and the rest of what the JSON says."""
  name = f'{module}.weight.{STATE}{kind}'
  try:
    state = json.loads(tensor.read().tobytes())
    outputs, inputs = state['shape']
    given = state['quant_type']
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(f'{name} cannot be read: {error!r}') from None
  sizes = all(type(n) is int and 0 < n < MAX_SIZE for n in (outputs, inputs))
  if not sizes or given != kind:
    raise ValueError(f'{name} has the shape {state["shape"]!r} and the type {given!r}')
  return outputs, inputs, state


def _count(state, key, module) -> int:
  value = state.get(key)
  if type(value) is not int or not 0 < value < MAX_SIZE:
    raise ValueError(f'{module}.weight.{STATE}*: {key} must be a size, not {value!r}')
  return value


def _eight_bits(stored, module):
  take = functools.partial(parts.take, stored, module)
  weight, sizes = take('weight', (SIGNED,), 2), take('SCB', (F32,), 1)
  outputs, inputs = weight.shape
  parts.require(sizes, f'{module}.SCB', (outputs,))
  form = take('weight_format', (BYTE,)) if f'{module}.weight_format' in stored else None

  def codes():
    if form is not None and np.any(form.read()):
      raise ValueError('weight_format is that of a GPU; save the model again with bitsandbytes')
    return Codes(
      values=weight.read().T.view(np.uint8) ^ np.uint8(128),
      scales=(sizes.read() / np.float32(127))[None],
      zeros=np.full((1, outputs), 128, np.int16),
      rows=np.zeros(inputs, np.int64),
      format='int8',
    )

  return coded(module, outputs, inputs, codes)
