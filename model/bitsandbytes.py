"""Matrices in the 4-bit format of bitsandbytes, read without loss.

A linear layer X is stored as the uint8 codes `X.weight`, two a byte with the first in the high
half, of the flat matrix [outputs, inputs]; `X.weight.absmax` has a scale for each block of 64 of
them. With nested quantization `absmax` is uint8 itself:

  w = map[code] * (nested_map[absmax] * nested_absmax + offset)

all in float32. `X.weight.quant_state.bitsandbytes__nf4` is JSON with the shape and the block size.
Format: https://github.com/bitsandbytes-foundation/bitsandbytes, functional.QuantState.

Here a block lies in one row, so that its scale is that of a group of inputs. The scales become
float32: the nested form, which saves half a bit a weight on disk, is not kept.
"""

import json
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from model.safetensors_io import Tensor
from ops import packing
from ops.formats import NF4_CODEBOOK
from ops.quantized import QuantizedTensor

STATE = '.quant_state.bitsandbytes__nf4'


def holds(tensors: Mapping[str, Tensor], name: str) -> bool:
  """Whether the weight `name`, such as 'lm_head.weight', is stored in this format."""
  return name + STATE in tensors


def read(tensors: Mapping[str, Tensor], name: str, dtype=jnp.float32) -> QuantizedTensor:
  """Reads a weight as a matrix [I, O] in NF4; `dtype` is that of its dense form.

  Raises ValueError if a tensor is absent or of the wrong size, the code book is another one, or
  blocks run across rows.
  """
  state = _state(tensors, name)
  outputs, inputs = state['shape']
  block = state['blocksize']
  if inputs % block:
    raise ValueError(f'{name}: blocks of {block} run across rows of {inputs} inputs')
  if not np.array_equal(_tensor(tensors, f'{name}.quant_map'), np.float32(NF4_CODEBOOK)):
    raise ValueError(f'{name}: the code book is not that of NF4')
  packed = _tensor(tensors, name).reshape(-1).view(np.uint8)
  codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
  scales = _scales(tensors, name, state)
  if len(codes) != outputs * inputs or len(scales) * block != outputs * inputs:
    raise ValueError(
      f'{name}: {len(codes)} codes and {len(scales)} scales of blocks of {block} are no '
      f'{outputs} x {inputs} matrix'
    )
  codes_IO = jnp.asarray(codes.reshape(outputs, inputs).T)
  scales_JO = jnp.asarray(scales.reshape(outputs, -1).T)
  return QuantizedTensor(
    packing.pack(codes_IO, 4), scales_JO, None, 'nf4', inputs, jnp.dtype(dtype)
  )


def _state(tensors, name) -> dict:
  try:
    state = json.loads(_tensor(tensors, name + STATE).tobytes())
    if state['quant_type'] != 'nf4' or len(state['shape']) != 2:
      raise ValueError('it is no matrix in NF4')
    return state
  except (KeyError, ValueError) as error:
    raise ValueError(f'{name}{STATE} cannot be read: {error}') from None


def _scales(tensors, name, state) -> np.ndarray:
  absmax = _tensor(tensors, f'{name}.absmax')
  if absmax.dtype != np.uint8:
    return absmax.astype(np.float32)
  outer = _tensor(tensors, f'{name}.nested_absmax').astype(np.float32)
  outer = np.repeat(outer, state['nested_blocksize'])[: len(absmax)]
  inner = _tensor(tensors, f'{name}.nested_quant_map').astype(np.float32)[absmax]
  return inner * outer + np.float32(state['nested_offset'])


def _tensor(tensors, name) -> np.ndarray:
  if name not in tensors:
    raise ValueError(f'{name} is missing')
  return tensors[name].read()
