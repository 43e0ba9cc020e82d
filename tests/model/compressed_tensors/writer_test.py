"""Folders that are written: what the tensors and config.json say, and what is read back."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from model import compressed_tensors, hf, safetensors_io
from model.transformer import parameters
from ops import lora
from ops.activations import ActivationQuantized
from ops.linear import dense
from ops.quantized import QuantizedTensor
from ops.sparse import SparseTensor

GROUP = 32


def _settings(folder):
  return json.loads((folder / 'config.json').read_text())['quantization_config']


def _wide(w):
  return np.asarray(dense(w))


def _assert_same(model, folder, kinds=True):
  """Loads the folder and compares all weights bit for bit, and the types of those with codes."""
  again, _ = hf.load_pretrained(folder)
  found = {path: param.get_value() for path, param in parameters(again).items()}
  for path, param in parameters(model).items():
    w = param.get_value()
    np.testing.assert_array_equal(_wide(found[path]), _wide(w), err_msg=path)
    if kinds and isinstance(w, QuantizedTensor | ActivationQuantized) and 'router' not in path:
      assert type(found[path]) is type(w), path
  return found


def _int4(random_codes, **options):
  return lambda rng, path, shape: random_codes(rng, shape, 'int4', GROUP, **options)


@pytest.mark.parametrize('family', ['llama', 'phi3', 'gpt_neox'])
def test_codes_come_back_from_files_of_their_own_and_of_fused_layers(
  family, tiny_model, random_codes, tmp_path
):
  model = tiny_model(family, _int4(random_codes, symmetric=family == 'llama', scales=np.float16))
  rows = compressed_tensors.write(tmp_path / 'm', model, None)
  stored = safetensors_io.read_folder(tmp_path / 'm')
  # Scales are float32 in a model of float32, where readers widen in the dtype of the scales.
  scales = {t.dtype for name, t in stored.items() if name.endswith('weight_scale')}
  assert scales == {np.dtype(np.float32)}
  settings, (line,) = _settings(tmp_path / 'm'), compressed_tensors.summary(rows)
  assert settings['config_groups']['group_0']['targets'] == ['Linear'] and not settings['ignore']
  assert line.split(maxsplit=1)[0] == str(len(rows)) and 'int4 g32' in line
  found = _assert_same(model, tmp_path / 'm')
  layer = found['layers.0.attention.query.weight']
  assert (layer.format, layer.group_size) == ('int4', GROUP)


def test_experts_are_layers_of_their_own_and_routers_numbers(tiny_model, random_codes, tmp_path):
  model = tiny_model('mixtral', _int4(random_codes), num_local_experts=3, num_experts_per_tok=2)
  rows = compressed_tensors.write(tmp_path / 'm', model, None)
  settings = _settings(tmp_path / 'm')
  assert settings['ignore'] == [r're:model\.layers\.\d+\.block_sparse_moe\.gate$']
  widened = [row for row in rows if row.kind == 'widened']
  assert {row.name.rpartition('.')[2] for row in widened} == {'gate'}
  name = 'model.layers.1.block_sparse_moe.experts.2.w2.weight_packed'
  assert safetensors_io.read_folder(tmp_path / 'm')[name].shape == (64, 96 // 8)
  _assert_same(model, tmp_path / 'm')


def test_several_schemes_name_their_layers(tiny_model, random_codes, tmp_path):
  def weight(rng, path, shape):
    if path.startswith(('layers.0.attention.output', 'head')):
      return jnp.asarray(rng.standard_normal(shape).astype(np.float32))
    if path.endswith('down.weight'):
      return ActivationQuantized(random_codes(rng, shape, 'int8'), None, 8)
    if path.endswith('query.weight'):
      return random_codes(rng, shape, 'int8', symmetric=False)
    return random_codes(rng, shape, 'int4', GROUP)

  model = tiny_model('llama', weight)
  rows = compressed_tensors.write(tmp_path / 'm', model, None)
  settings = _settings(tmp_path / 'm')
  assert settings['format'] == 'mixed-precision'
  targets = {
    (g['format'], g['weights']['num_bits'], g['weights']['symmetric']): g['targets']
    for g in settings['config_groups'].values()
  }
  layer = r're:model\.layers\.\d+\.'
  attention, ffn = layer + r'self_attn\.', layer + r'mlp\.'
  assert targets[('int-quantized', 8, True)] == [ffn + r'down_proj$']
  assert targets[('pack-quantized', 8, False)] == [attention + r'q_proj$']
  assert 'model.layers.1.self_attn.o_proj' in targets[('pack-quantized', 4, True)]
  assert settings['ignore'] == ['model.layers.0.self_attn.o_proj', 'lm_head']
  assert any('vLLM needs one scheme for q_proj' in row.how for row in rows)
  _assert_same(model, tmp_path / 'm')


def test_a_tied_head_is_no_quantized_layer(tiny_model, random_codes, tmp_path):
  model = tiny_model('llama', _int4(random_codes), tie_word_embeddings=True)
  compressed_tensors.write(tmp_path / 'm', model, None)
  assert _settings(tmp_path / 'm')['ignore'] == ['lm_head']


def _sparse(rng, shape, values=None):
  """A 2:4 weight with random places; `values` is of its kept entries [I / 2, O]."""
  inputs, outputs = shape
  order = rng.permuted(np.tile(np.arange(4)[:, None], (inputs // 4, 1, outputs)), axis=1)
  places = np.sort(order[:, :2], axis=1).reshape(-1, 4, outputs)
  indices = sum(places[:, i] << 2 * i for i in range(4)).astype(np.uint8)
  if values is None:
    values = jnp.asarray(rng.standard_normal((inputs // 2, outputs)).astype(np.float32))
  return SparseTensor(values, jnp.asarray(indices), 2, 4)


@pytest.mark.parametrize('bitmask', [False, True])
def test_sparse_layers_keep_their_zeros(bitmask, tiny_model, random_codes, tmp_path):
  def weight(rng, path, shape):
    if path.endswith('up.weight'):
      return _sparse(rng, shape)
    if path.endswith('down.weight'):
      codes = random_codes(rng, (shape[0] // 2, shape[1]), 'int8')
      return ActivationQuantized(_sparse(rng, shape, codes), None, 8)
    if path.endswith('gate.weight'):
      codes = random_codes(rng, (shape[0] // 2, shape[1]), 'int4', 16, symmetric=False)
      return _sparse(rng, shape, codes)
    return random_codes(rng, shape, 'int4', GROUP)

  model = tiny_model('llama', weight, num_hidden_layers=1)
  compressed_tensors.write(tmp_path / 'm', model, None, bitmask=bitmask)
  stored = safetensors_io.read_folder(tmp_path / 'm')
  name = 'model.layers.0.mlp.up_proj'
  assert (f'{name}.bitmask' in stored) == bitmask and (f'{name}.weight' in stored) != bitmask
  sparsity = _settings(tmp_path / 'm')['sparsity_config']
  if bitmask:
    assert stored[f'{name}.compressed'].shape == (96, 32)
    assert sparsity['format'] == 'sparse-24-bitmask' and sparsity['sparsity_structure'] == '2:4'
    both = ['model.layers.0.mlp.down_proj', name]
    assert sparsity['targets'] == both and 0.5 <= sparsity['global_sparsity'] < 0.52
    found = _assert_same(model, tmp_path / 'm', kinds=False)
    assert found['layers.0.ffn.gate.weight'].group_size == GROUP
  else:
    assert sparsity == {}
    w_OI = stored[f'{name}.weight'].read()
    np.testing.assert_array_equal(w_OI.T, _wide(model.layers[0].ffn.up.weight.get_value()))


def test_what_has_no_form_is_widened_and_said(tiny_model, random_codes, tmp_path):
  def weight(rng, path, shape):
    w = random_codes(rng, shape, 'int4', GROUP)
    if path.endswith('up.weight'):
      return random_codes(rng, shape, 'nf4', GROUP)
    if path.endswith('down.weight'):
      zeros = jnp.asarray(rng.uniform(0, 15, w.scales.shape).astype(np.float32))
      return QuantizedTensor(w.values, w.scales, zeros, 'int4', shape[0], w.dtype)
    if path.endswith('gate.weight'):
      a_IR, b_RO = (jnp.asarray(rng.standard_normal(s), 'float32') for s in ((64, 2), (2, 96)))
      return lora.LoraTensor(w, a_IR, b_RO, 0.5)
    return w

  model = tiny_model('llama', weight)
  rows = compressed_tensors.write(tmp_path / 'm', model, None)
  reasons = {row.name.rpartition('.')[2]: row.how for row in rows if row.kind == 'widened'}
  assert reasons == {
    'up_proj': 'the format has no nf4',
    'down_proj': 'the format has no zero points that are not integers',
    'gate_proj': 'a LoraTensor has no codes',
  }
  assert r're:model\.layers\.\d+\.mlp\.up_proj$' in _settings(tmp_path / 'm')['ignore']
  _assert_same(model, tmp_path / 'm', kinds=False)


def test_parts_that_differ_are_widened(tiny_model, random_codes, tmp_path):
  def weight(rng, path, shape):
    return random_codes(rng, shape, 'int8' if path.endswith('key.weight') else 'int4', GROUP)

  rows = compressed_tensors.write(tmp_path / 'm', tiny_model('phi3', weight), None)
  (reason,) = {row.how for row in rows if row.kind == 'widened'}
  assert reason.startswith('its parts are one matrix in the checkpoint, and are int4 g32')


def test_models_without_codes_are_refused(tiny_model, random_codes, tmp_path):
  plain = lambda rng, path, shape: jnp.asarray(rng.standard_normal(shape).astype(np.float32))
  with pytest.raises(ValueError, match=r'all are plain arrays.*round_to_nearest'):
    compressed_tensors.write(tmp_path / 'm', tiny_model('llama', plain), None)
  assert not (tmp_path / 'm').exists()
  with pytest.raises(ValueError, match='no linear layer of its own'):  # Conv1D of GPT-2
    compressed_tensors.write(tmp_path / 'm', tiny_model('gpt2', _int4(random_codes)), None)


def test_masks_of_any_pattern(tiny_model, tmp_path):
  def weight(rng, path, shape):
    w_IO = rng.standard_normal(shape).astype(np.float32)
    return jnp.asarray(np.where(np.abs(w_IO) > 0.8, w_IO, 0))

  model = tiny_model('llama', weight, num_hidden_layers=1)
  compressed_tensors.write(tmp_path / 'm', model, None, bitmask=True)
  assert _settings(tmp_path / 'm')['sparsity_config']['format'] == 'sparse-bitmask'
  _assert_same(model, tmp_path / 'm')


def test_patterns_name_what_is_meant_and_nothing_else():
  everything = ['a.0.b', 'a.1.b', 'a.0.c', 'a.1.c', 'head']
  assert compressed_tensors.patterns(['a.0.b', 'a.1.b', 'head'], everything) == [
    r're:a\.\d+\.b$',
    'head',
  ]
  assert compressed_tensors.patterns(['a.1.c'], everything) == ['a.1.c']
