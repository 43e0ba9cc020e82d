"""NF4 as bitsandbytes stores it: its own dequantized numbers, bit for bit."""

import base64
import json
import pathlib

import numpy as np
import pytest

from model import bitsandbytes
from model.safetensors_io import Tensor
from ops import quantized

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'bitsandbytes_nf4.json').read_text())
NAME = 'model.layers.0.mlp.up_proj.weight'


def _array(entry):
  dtype, data = entry
  return np.frombuffer(base64.b64decode(data), dtype)


def _tensors(case, **changes):
  """The tensors of a checkpoint, by name; a change to None leaves one out."""
  arrays = {n: _array(entry) for n, entry in GOLDEN['cases'][case].items() if n != 'dequantized'}
  arrays |= changes
  return {
    NAME + ('' if name == 'weight' else f'.{name}'): Tensor(a.shape, a.dtype, lambda a=a: a)
    for name, a in arrays.items()
    if a is not None
  }


@pytest.mark.parametrize('case', ['plain', 'nested'])
def test_the_dequantized_matrix_is_that_of_bitsandbytes_bit_for_bit(case):
  tensors = _tensors(case)
  assert bitsandbytes.holds(tensors, NAME) and not bitsandbytes.holds(tensors, 'lm_head.weight')
  w = bitsandbytes.read(tensors, NAME)
  assert w.shape == (128, 6) and w.group_size == 64
  theirs = _array(GOLDEN['cases'][case]['dequantized']).reshape(6, 128)
  assert np.asarray(w.dense()).T.tobytes() == theirs.tobytes()


def test_our_own_codes_are_theirs_but_where_a_scale_is_rounded():
  source_IO = _array(GOLDEN['source']).reshape(6, 128).T
  ours = quantized.quantize(np.asarray(source_IO), 'nf4', group_size=64)
  theirs = bitsandbytes.read(_tensors('plain'), NAME)
  assert (np.asarray(ours.stored_codes()) != np.asarray(theirs.stored_codes())).mean() < 0.01


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'absmax': None}, 'absmax is missing'),
    ({'weight': np.zeros(10, np.uint8)}, '20 codes and 12 scales of blocks of 64 are no 6 x 128'),
    ({'quant_map': np.zeros(16, np.float32)}, 'the code book is not that of NF4'),
    ({'quant_state.bitsandbytes__nf4': np.frombuffer(b'{}', np.uint8)}, 'cannot be read'),
    (
      {
        'quant_state.bitsandbytes__nf4': np.frombuffer(
          b'{"quant_type": "nf4", "blocksize": 64, "shape": [8, 96]}', np.uint8
        )
      },
      'blocks of 64 run across rows of 96 inputs',
    ),
  ],
)
def test_what_does_not_fit_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    bitsandbytes.read(_tensors('plain', **changes), NAME)
