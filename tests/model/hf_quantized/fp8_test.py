"""Checkpoints in e4m3, decoded here from the bits."""

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.integrations import finegrained_fp8

from model import hf_quantized
from model.safetensors_io import Tensor
from ops.quantized import QuantizedTensor

TILE = (48, 32)  # does not divide the outputs of any layer


def _value(code: int) -> float:
  exponent, mantissa = code >> 3 & 15, code & 7
  size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
  return -size if code & 128 else size


VALUES = np.array([_value(code) for code in range(256)], np.float32)


def _encode(rng, outputs, inputs, *, scaled='tile', leaf='weight_scale_inv'):
  codes = rng.integers(0, 0x70, (outputs, inputs), np.uint8) | rng.choice(
    np.array([0, 128], np.uint8), (outputs, inputs)
  )
  rows, columns = {'tile': TILE, 'output': (1, inputs), 'matrix': (outputs, inputs)}[scaled]
  shape = (-(-outputs // rows), -(-inputs // columns))
  scales = rng.uniform(0.002, 0.004, shape).astype(np.float32)
  wide = np.empty((outputs, inputs), np.float32)
  for o in range(outputs):
    for i in range(inputs):
      wide[o, i] = VALUES[codes[o, i]] * scales[o // rows, i // columns]
  stored = scales if scaled != 'matrix' else scales.reshape(())
  return {'weight': codes.view(ml_dtypes.float8_e4m3fn), leaf: stored}, wide


@pytest.mark.parametrize(
  'family, scaled, leaf, method',
  [
    pytest.param('llama', 'tile', 'weight_scale_inv', 'fp8', marks=pytest.mark.slow),
    ('phi3', 'tile', 'weight_scale_inv', 'fp8'),
    ('llama', 'output', 'weight_scale', 'fbgemm_fp8'),
    ('phi3', 'matrix', 'weight_scale', 'fp8'),
  ],
)
def test_codes_stay(checkpoints, tmp_path, family, scaled, leaf, method):
  checkpoint = checkpoints[family]
  tensors, wide = checkpoint.stored(_encode, scaled=scaled, leaf=leaf)
  inputs = {f'{layer}.input_scale': np.ones((), np.float32) for layer in wide}
  settings = {'quant_method': method}
  if scaled == 'tile':
    settings |= {'weight_block_size': list(TILE)}
  checkpoint.write(tmp_path, settings, tensors | inputs)
  loaded = checkpoint.check_weights(tmp_path, wide)
  for w in loaded.weights.values():
    assert isinstance(w, QuantizedTensor) and w.format == 'fp8_e4m3'
    assert w.group_size == (TILE[1] if scaled == 'tile' else w.inputs)
  (line,) = loaded.said
  assert line == (
    f'activations and caches stay floating point: {len(inputs)} scales of theirs are left out'
  )
  if (family, scaled) == ('llama', 'tile'):
    checkpoint.check_logits(loaded.model, wide)


def _decoded(arrays, **settings):
  stored = {f'up.{leaf}': Tensor(a.shape, a.dtype, lambda a=a: a) for leaf, a in arrays.items()}
  return hf_quantized.decode({'quant_method': 'fp8', **settings}, stored, print)['up.weight']


def test_tiles_are_those_of_transformers():
  arrays, wide = _encode(np.random.default_rng(3), 80, 96)
  theirs = finegrained_fp8._dequantize_fp8_weight(
    torch.tensor(arrays['weight'].view(np.uint8)).view(torch.float8_e4m3fn),
    torch.tensor(arrays['weight_scale_inv']),
    list(TILE),
    torch.float32,
  )
  np.testing.assert_array_equal(wide, theirs.numpy())
  np.testing.assert_array_equal(_decoded(arrays, weight_block_size=list(TILE)).read(), wide)


def test_powers_of_two_are_scales():
  arrays, _ = _encode(np.random.default_rng(3), 96, 64)
  exponents = np.full((2, 2), 2.0**-8, ml_dtypes.float8_e8m0fnu)
  tensor = _decoded({**arrays, 'weight_scale_inv': exponents}, weight_block_size=list(TILE))
  expected = VALUES[arrays['weight'].view(np.uint8)] * 2.0**-8
  np.testing.assert_array_equal(tensor.read(), expected)
  w = tensor.codes().weight(np.float32)
  np.testing.assert_array_equal(np.asarray(w.dense()).T, expected)


@pytest.mark.parametrize(
  'settings, message',
  [
    ({}, r'up.weight_scale_inv has the shape \(2, 2\), .* \(96, 64\) .* weight_block_size is not'),
    ({'weight_block_size': [32, 32]}, r'has the shape \(2, 2\); its matrix needs \(3, 2\)'),
    ({'weight_block_size': [0, 32]}, 'weight_block_size must be two whole numbers'),
    ({'weight_block_size': 128}, 'weight_block_size must be two whole numbers, not 128'),
  ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
  arrays, _ = _encode(np.random.default_rng(3), 96, 64)
  with pytest.raises(ValueError, match=message):
    _decoded(arrays, **settings)
