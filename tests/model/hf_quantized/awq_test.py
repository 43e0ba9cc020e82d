"""AWQ checkpoints, packed here number by number."""

import numpy as np
import pytest

from model import hf_quantized
from model.safetensors_io import Tensor
from ops.quantized import QuantizedTensor

GROUP = 32
SETTINGS = {'quant_method': 'awq', 'bits': 4, 'group_size': GROUP, 'zero_point': True}
# The bits of the eight outputs of a word: the even ones, and then the odd ones.
SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


def _words(codes):
  """Eight neighbours of a row in each word."""
  words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.int64)
  for output in range(codes.shape[1]):
    words[:, output // 8] |= codes[:, output] << SHIFTS[output % 8]
  return words.astype(np.uint32).view(np.int32)


def _encode(rng, outputs, inputs):
  codes = rng.integers(0, 16, (inputs, outputs))
  zeros = rng.integers(0, 16, (inputs // GROUP, outputs))
  scales = (0.25 * rng.uniform(0.1, 0.3, zeros.shape)).astype(np.float16)
  wide = np.empty((outputs, inputs), np.float32)
  for i in range(inputs):
    g = i // GROUP
    wide[:, i] = (codes[i] - zeros[g]).astype(np.float32) * scales[g].astype(np.float32)
  return {'qweight': _words(codes), 'qzeros': _words(zeros), 'scales': scales}, wide


@pytest.mark.parametrize('family', [pytest.param('llama', marks=pytest.mark.slow), 'phi3'])
def test_codes_stay_and_the_logits_are_those_of_transformers(checkpoints, tmp_path, family):
  tensors, wide = checkpoints[family].stored(_encode)
  checkpoints[family].write(tmp_path, {**SETTINGS, 'version': 'gemm'}, tensors)
  loaded = checkpoints[family].check_weights(tmp_path, wide)
  for w in loaded.weights.values():
    assert isinstance(w, QuantizedTensor) and (w.format, w.group_size) == ('int4', GROUP)
    assert w.zeros.dtype == np.uint8 and w.scales.dtype == np.float16
  assert loaded.said == []
  if family == 'llama':
    checkpoints[family].check_logits(loaded.model, wide)


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'version': 'GEMV'}, "AWQ in the layout 'GEMV' is not supported; supported: gemm"),
    ({'w_bit': 3}, 'AWQ with 3 bits in groups of 32'),
    ({'q_group_size': 64}, r'up.scales has the shape \(2, 16\); its matrix needs \(1, 16\)'),
    ({'group_size': 0}, 'AWQ with 4 bits in groups of 0'),
  ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
  arrays, _ = _encode(np.random.default_rng(3), 16, 64)
  stored = {f'up.{leaf}': Tensor(a.shape, a.dtype, lambda a=a: a) for leaf, a in arrays.items()}
  with pytest.raises(ValueError, match=message):
    hf_quantized.decode({**SETTINGS, **settings}, stored, print)
