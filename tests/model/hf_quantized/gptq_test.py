"""GPTQ checkpoints, laid out here by arithmetic on long integers."""

import numpy as np
import pytest

from model import hf_quantized
from model.hf_quantized import parts
from ops.quantized import QuantizedTensor

GROUP = 32


def _settings(bits=4, **others):
  return {'quant_method': 'gptq', 'bits': bits, 'group_size': GROUP, **others}


@pytest.fixture
def store(checkpoints, to_words):
  """A function that stores random codes for the matrices of a family, and says what they are."""

  def stored(family, bits=4, *, symmetric=False, shift=1, group=GROUP, order=None):
    rng, tensors, wide = np.random.default_rng(2), {}, {}
    checkpoint = checkpoints[family]
    for layer in checkpoint.layers():
      outputs, inputs = checkpoint.state[f'{layer}.weight'].shape
      groups = np.arange(inputs) // group
      if order == 'activations':
        groups = rng.permutation(groups)
      shape = (groups.max() + 1, outputs)
      codes = rng.integers(0, 2**bits, (inputs, outputs))
      half = np.full(shape, 2 ** (bits - 1))
      zeros = half if symmetric else rng.integers(shift, 2**bits, shape)
      scales = (0.5 ** (bits - 2) * rng.uniform(0.1, 0.3, shape)).astype(np.float16)
      tensors |= {
        f'{layer}.qweight': to_words(codes, bits),
        f'{layer}.qzeros': np.ascontiguousarray(to_words((zeros - shift).T, bits).T),
        f'{layer}.scales': scales,
      }
      if order is not None:
        tensors[f'{layer}.g_idx'] = groups.astype(np.int32)
      w = [
        (codes[i] - zeros[g]).astype(np.float32) * scales[g].astype(np.float32)
        for i, g in enumerate(groups)
      ]
      wide[layer] = np.stack(w, 1)
    return checkpoint, tensors, wide

  return stored


def test_symmetric_codes_stay_and_the_logits_are_those_of_transformers(store, tmp_path):
  checkpoint, tensors, wide = store('llama', symmetric=True, order='groups')
  zeros = {f'{layer}.bias': np.zeros(len(w), np.float16) for layer, w in wide.items()}
  checkpoint.write(tmp_path, _settings(desc_act=False, sym=True), tensors | zeros)
  loaded = checkpoint.check_weights(tmp_path, wide)
  for w in loaded.weights.values():
    assert isinstance(w, QuantizedTensor) and (w.format, w.group_size) == ('int4', GROUP)
    assert w.zeros is None and w.scales.dtype == np.float16
  (line,) = loaded.said
  assert 'are left out: ' in line and 'model.layers.*.self_attn.q_proj.bias (2)' in line
  checkpoint.check_logits(loaded.model, wide)


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_parts_of_fused_matrices_stay_codes(store, tmp_path, bits):
  form, shift = ('gptq', 1) if bits in (3, 4) else ('gptq_v2', 0)
  checkpoint, tensors, wide = store('phi3', bits, shift=shift)
  checkpoint.write(tmp_path, _settings(bits, checkpoint_format=form), tensors)
  loaded = checkpoint.check_weights(tmp_path, wide)
  for w in loaded.weights.values():
    assert isinstance(w, QuantizedTensor) and w.format == f'int{bits}'
    assert w.zeros.dtype == np.uint8
  assert loaded.said == []


def test_zero_points_of_all_ones_are_one_above_the_codes(store, tmp_path):
  _, tensors, _ = store('llama')
  for name in tensors:
    if name.endswith('qzeros'):
      tensors[name] = np.full_like(tensors[name], -1)
  found = hf_quantized.decode(_settings(), {n: _tensor(a) for n, a in tensors.items()})
  codes = found['model.layers.0.mlp.up_proj.weight'].codes()
  assert (codes.zeros == 16).all()


def test_the_order_of_activations_is_widened_and_said(store, tmp_path):
  checkpoint, tensors, wide = store('llama', order='activations')
  checkpoint.write(tmp_path, None, tensors)
  (tmp_path / 'quantize_config.json').write_text('{"bits": 4, "group_size": 32, "desc_act": true}')
  loaded = checkpoint.check_weights(tmp_path, wide)
  assert not any(isinstance(w, QuantizedTensor) for w in loaded.weights.values())
  (line,) = loaded.said
  assert line.startswith('14 quantized matrices are widened to floating point: consecutive inputs')


def test_one_scale_a_column_and_settings_by_module(store, tmp_path):
  checkpoint, tensors, wide = store('llama', 8, group=10**6)
  settings = _settings(4, group_size=-1, dynamic={'.*': {'bits': 8}})
  checkpoint.write(tmp_path, settings, tensors)
  for w in checkpoint.check_weights(tmp_path, wide).weights.values():
    assert (w.format, w.group_size) == ('int8', w.inputs)


def _tensor(array):
  return hf_quantized.Tensor(array.shape, array.dtype, lambda: array)


def test_words_are_one_stream_of_bits():
  word = np.array([[0b11_010_001_000], [0]], np.int32)  # 0, 1, 2 and the low bits of 3
  assert parts.unpack(word, 3, 0)[:4, 0].tolist() == [0, 1, 2, 3]
