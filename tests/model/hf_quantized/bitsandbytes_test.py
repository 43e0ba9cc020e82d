"""Checkpoints of bitsandbytes: its own numbers bit for bit, and models laid out here by loops."""

import base64
import json
import pathlib

import numpy as np
import pytest

from model import hf_quantized
from model.safetensors_io import Tensor
from ops import quantized
from ops.formats import NF4_CODEBOOK
from ops.quantized import QuantizedTensor

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'bitsandbytes_nf4.json').read_text())
NAME = 'model.layers.0.mlp.up_proj.weight'
SETTINGS = {'quant_method': 'bitsandbytes', 'load_in_4bit': True}
BLOCK = 64
# The sizes of FP4 are twelfths, from the lowest code on.
FP4_SIZES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
CODEBOOKS = {'nf4': np.float32(NF4_CODEBOOK), 'fp4': np.concatenate([FP4_SIZES, -FP4_SIZES])}


def _array(entry):
  dtype, data = entry
  return np.frombuffer(base64.b64decode(data), dtype)


def _decoded(case, **changes):
  """The tensor from a golden case; a change to None leaves a part out."""
  arrays = {n: _array(entry) for n, entry in GOLDEN['cases'][case].items() if n != 'dequantized'}
  arrays |= changes
  stored = {
    NAME + ('' if name == 'weight' else f'.{name}'): Tensor(a.shape, a.dtype, lambda a=a: a)
    for name, a in arrays.items()
    if a is not None
  }
  return hf_quantized.decode(SETTINGS, stored, print)[NAME]


@pytest.mark.parametrize('case', ['plain', 'nested'])
def test_the_dequantized_matrix_is_that_of_bitsandbytes_bit_for_bit(case):
  tensor = _decoded(case)
  w = tensor.codes().weight(np.float32)
  assert w.shape == (128, 6) and w.group_size == 64 and w.format == 'nf4'
  theirs = _array(GOLDEN['cases'][case]['dequantized']).reshape(6, 128)
  assert np.asarray(w.dense()).T.tobytes() == theirs.tobytes()
  np.testing.assert_array_equal(tensor.read(), theirs)


def test_our_own_codes_are_theirs_but_where_a_scale_is_rounded():
  source_IO = _array(GOLDEN['source']).reshape(6, 128).T
  ours = quantized.quantize(np.asarray(source_IO), 'nf4', group_size=64)
  theirs = _decoded('plain').codes().weight(np.float32)
  assert (np.asarray(ours.stored_codes()) != np.asarray(theirs.stored_codes())).mean() < 0.01


def _encode4(rng, outputs, inputs, *, kind='nf4', nested=False):
  """A random matrix of 4 bits, whose blocks may reach over the ends of rows."""
  flat = rng.integers(0, 16, outputs * inputs)
  blocks = -(-len(flat) // BLOCK)
  state = {'quant_type': kind, 'blocksize': BLOCK, 'dtype': 'float16', 'shape': [outputs, inputs]}
  stored = {'weight': (flat[::2] << 4 | flat[1::2]).astype(np.uint8)[:, None]}
  stored['weight.quant_map'] = codebook = CODEBOOKS[kind]
  if nested:
    table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
    outer = rng.uniform(0.1, 0.2, -(-blocks // 256)).astype(np.float32)
    codes = rng.integers(0, 256, blocks, np.uint8)
    state |= {'nested_blocksize': 256, 'nested_dtype': 'float32', 'nested_offset': 0.4}
    stored |= {'weight.nested_absmax': outer, 'weight.nested_quant_map': table}
    stored['weight.absmax'] = codes
    absmax = [table[c] * outer[b // 256] + np.float32(0.4) for b, c in enumerate(codes)]
  else:
    absmax = stored['weight.absmax'] = rng.uniform(0.3, 0.7, blocks).astype(np.float32)
  text = json.dumps(state).encode()
  stored[f'weight.quant_state.bitsandbytes__{kind}'] = np.frombuffer(text, np.uint8)
  wide = [codebook[code] * absmax[k // BLOCK] for k, code in enumerate(flat)]
  return stored, np.array(wide, np.float32).reshape(outputs, inputs)


def _encode8(rng, outputs, inputs):
  codes = rng.integers(-127, 128, (outputs, inputs), np.int8)
  sizes = rng.uniform(0.3, 0.7, outputs).astype(np.float32)
  wide = codes.astype(np.float32) * (sizes / np.float32(127))[:, None]
  return {'weight': codes, 'SCB': sizes, 'weight_format': np.zeros((), np.uint8)}, wide


@pytest.mark.parametrize('family, nested', [('llama', True), ('phi3', False)])
def test_nf4_stays_and_the_logits_are_those_of_transformers(checkpoints, tmp_path, family, nested):
  checkpoint = checkpoints[family]
  tensors, wide = checkpoint.stored(_encode4, nested=nested)
  checkpoint.write(tmp_path, SETTINGS, tensors)
  loaded = checkpoint.check_weights(tmp_path, wide)
  for path, w in loaded.weights.items():
    assert isinstance(w, QuantizedTensor) and w.format == 'nf4' and w.scales.dtype == np.float32
    # A row of 96 has one and a half blocks.
    assert w.group_size == (32 if path.endswith('ffn.down') else 64)
  assert loaded.said == []
  if family == 'llama':
    checkpoint.check_logits(loaded.model, wide)


def test_fp4_is_widened_and_said(checkpoints, tmp_path):
  tensors, wide = checkpoints['llama'].stored(_encode4, kind='fp4')
  checkpoints['llama'].write(tmp_path, SETTINGS, tensors)
  loaded = checkpoints['llama'].check_weights(tmp_path, wide)
  assert not any(isinstance(w, QuantizedTensor) for w in loaded.weights.values())
  (line,) = loaded.said
  assert line.endswith(
    '14 quantized matrices are widened to floating point: no format has these levels'
  )


def test_int8_stays(checkpoints, tmp_path):
  tensors, wide = checkpoints['phi3'].stored(_encode8)
  checkpoints['phi3'].write(tmp_path, {'load_in_8bit': True}, tensors)
  for w in checkpoints['phi3'].check_weights(tmp_path, wide).weights.values():
    assert (w.format, w.zeros, w.group_size) == ('int8', None, w.inputs)


def _state(**changes):
  state = {'quant_type': 'nf4', 'blocksize': 64, 'shape': [6, 128], **changes}
  return {'quant_state.bitsandbytes__nf4': np.frombuffer(json.dumps(state).encode(), np.uint8)}


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'absmax': None},
      'up_proj.weight.absmax is missing, but other parts of model.layers.0.mlp.up',
    ),
    ({'weight': np.zeros(10, np.uint8)}, 'has 10 bytes, not half of a matrix of 6 x 128'),
    ({'quant_map': np.zeros(15, np.float32)}, r'quant_map has the shape \(15,\); .* needs \(16,\)'),
    ({'quant_state.bitsandbytes__nf4': np.frombuffer(b'{}', np.uint8)}, 'cannot be read'),
    ({'quant_state.bitsandbytes__nf4': np.frombuffer(b'\xff[', np.uint8)}, 'cannot be read'),
    (_state(shape=[6, -128]), r'has the shape \[6, -128\] and the type'),
    (_state(shape=None), 'cannot be read'),
    (_state(blocksize=0), 'blocksize must be a size, not 0'),
    (_state(blocksize=128), r'absmax has the shape \(12,\); its matrix needs \(6,\)'),
    (_state(nested_blocksize=256), 'absmax is float32, not uint8'),
    (_state(quant_type='fp4'), "and the type 'fp4'"),
  ],
)
def test_what_does_not_fit_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    _decoded('plain', **changes)
