"""GPTQ checkpoints, laid out here by arithmetic on long integers."""

import numpy as np
import pytest

from model import hf, hf_quantized, native
from model.hf_quantized import parts
from model.safetensors_io import Tensor
from ops.quantized import QuantizedTensor

GROUP = 32


def _settings(bits=4, **others):
  return {'quant_method': 'gptq', 'bits': bits, 'group_size': GROUP, **others}


def _words(codes_IO, bits):
  """Each column as one long integer, cut into words of 32 bits."""
  columns = []
  for column in codes_IO.T.tolist():
    stream = sum(code << (bits * i) for i, code in enumerate(column))
    columns.append([stream >> 32 * k & 0xFFFFFFFF for k in range(len(column) * bits // 32)])
  return np.array(columns, np.uint32).T.view(np.int32)


def _less_one(zeros, bits):
  """Zero points less one: subtracted from whole words, but of 3 bits from each by itself."""
  if bits == 3:
    return _words((zeros - 1) % 8, 3)
  ones = int(('0' * (bits - 1) + '1') * (32 // bits), 2)
  words = (_words(zeros, bits).astype(np.int64) - ones) % 2**32
  return words.astype(np.uint32).view(np.int32)


def _encode(rng, outputs, inputs, *, bits=4, symmetric=False, form='gptq', group=GROUP, order=None):
  """Random codes as GPTQ stores them, and the matrix that they are."""
  groups = np.arange(inputs) // group
  if order == 'activations':
    groups = rng.permutation(groups)
  shape = (groups.max() + 1, outputs)
  codes = rng.integers(0, 2**bits, (inputs, outputs))
  zeros = rng.integers(0, 2**bits, shape)
  if symmetric:
    zeros[:] = 2 ** (bits - 1)
  scales = (0.5 ** (bits - 2) * rng.uniform(0.1, 0.3, shape)).astype(np.float16)
  qzeros = _less_one(zeros.T, bits) if form == 'gptq' else _words(zeros.T, bits)
  stored = {'qweight': _words(codes, bits), 'qzeros': qzeros.T, 'scales': scales}
  if order is not None:
    stored['g_idx'] = groups.astype(np.int32)
  wide = [
    (codes[i] - zeros[g]).astype(np.float32) * scales[g].astype(np.float32)
    for i, g in enumerate(groups)
  ]
  return stored, np.stack(wide, 1)


def test_symmetric_codes_stay_and_the_logits_are_those_of_transformers(checkpoints, tmp_path):
  checkpoint = checkpoints['llama']
  tensors, wide = checkpoint.stored(_encode, symmetric=True, order='groups')
  zeros = {f'{layer}.bias': np.zeros(len(w), np.float16) for layer, w in wide.items()}
  checkpoint.write(tmp_path, _settings(desc_act=False, sym=True), tensors | zeros)
  loaded = checkpoint.check_weights(tmp_path, wide)
  for w in loaded.weights.values():
    assert isinstance(w, QuantizedTensor) and (w.format, w.group_size) == ('int4', GROUP)
    assert w.zeros is None and w.scales.dtype == np.float16
  (line,) = loaded.said
  assert 'are left out: ' in line and 'model.layers.*.self_attn.q_proj.bias (2)' in line
  checkpoint.check_logits(loaded.model, wide)
  hf.save_pretrained(loaded.model, None, tmp_path / 'saved')
  again = checkpoint.check_weights(tmp_path / 'saved', wide)
  assert native.is_native(tmp_path / 'saved')
  assert again.weights['0.ffn.up'].nbytes == loaded.weights['0.ffn.up'].nbytes


@pytest.mark.parametrize('bits, form', [(3, 'gptq'), (4, 'gptq_v2')])
def test_parts_of_fused_matrices_stay_codes(checkpoints, tmp_path, bits, form):
  tensors, wide = checkpoints['phi3'].stored(_encode, bits=bits, form=form)
  checkpoints['phi3'].write(tmp_path, _settings(bits, checkpoint_format=form), tensors)
  loaded = checkpoints['phi3'].check_weights(tmp_path, wide)
  for w in loaded.weights.values():
    assert isinstance(w, QuantizedTensor) and w.format == f'int{bits}'
    assert w.zeros.dtype == np.uint8
  assert loaded.said == []


def test_the_order_of_activations_is_widened_and_said(checkpoints, tmp_path):
  tensors, wide = checkpoints['llama'].stored(_encode, order='activations')
  checkpoints['llama'].write(tmp_path, None, tensors)
  (tmp_path / 'quantize_config.json').write_text('{"bits": 4, "group_size": 32, "desc_act": true}')
  loaded = checkpoints['llama'].check_weights(tmp_path, wide)
  assert not any(isinstance(w, QuantizedTensor) for w in loaded.weights.values())
  (line,) = loaded.said
  assert line.startswith('14 quantized matrices are widened to floating point: consecutive inputs')


def test_one_scale_a_column_and_settings_by_module(checkpoints, tmp_path):
  tensors, wide = checkpoints['llama'].stored(_encode, bits=8, group=10**6)
  settings = _settings(4, group_size=-1, dynamic={'.*': {'bits': 8}})
  checkpoints['llama'].write(tmp_path, settings, tensors)
  for w in checkpoints['llama'].check_weights(tmp_path, wide).weights.values():
    assert (w.format, w.group_size) == ('int8', w.inputs)


def _decoded(arrays, settings):
  stored = {f'up.{leaf}': Tensor(a.shape, a.dtype, lambda a=a: a) for leaf, a in arrays.items()}
  return hf_quantized.decode(settings, stored, print)['up.weight']


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('form', ['gptq', 'gptq_v2'])
def test_every_number_of_bits_in_both_forms(bits, form):
  arrays, wide = _encode(np.random.default_rng(3), 32, 96, bits=bits, form=form)
  tensor = _decoded(arrays, _settings(bits, checkpoint_format=form))
  np.testing.assert_array_equal(tensor.read(), wide)


def test_a_last_group_may_be_shorter():
  arrays, wide = _encode(np.random.default_rng(3), 8, 80)
  codes = _decoded(arrays, _settings()).codes()
  w = codes.weight(np.float32)
  assert w.group_size == 16
  np.testing.assert_array_equal(np.asarray(w.dense()).T, wide)


def test_words_are_one_stream_of_bits():
  word = np.array([[0b11_010_001_000], [0]], np.int32)  # 0, 1, 2 and the low bits of 3
  assert parts.unpack(word, 3, 0)[:4, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'quant_method': 'gptq', 'checkpoint_format': 'marlin'}, "'marlin' .*supported: gptq, gptq_v"),
    ({'quant_method': 'gptq', 'bits': 5}, 'bits 5 and group_size 128'),
    ({'quant_method': 'gptq', 'bits': '4'}, "bits in config.json must be an integer, not '4'"),
    ({'quant_method': 'gptq', 'group_size': 16}, '2 groups, but 64 inputs in groups of 16 have 4'),
    ({'quant_method': 'gptq', 'bits': 3}, r'up.qweight .8, 8. holds no 8 columns of 3 bits'),
  ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
  arrays, _ = _encode(np.random.default_rng(3), 8, 64)
  with pytest.raises(ValueError, match=message):
    _decoded(arrays, settings)


def test_an_unknown_method_is_refused_with_those_that_are_read(checkpoints, tmp_path):
  checkpoints['llama'].write(tmp_path, {'quant_method': 'aqlm'}, {})
  with pytest.raises(ValueError, match=r'\(aqlm\).*supported: awq, bitsandbytes, .*gptq.*original'):
    hf.load_pretrained(tmp_path)
