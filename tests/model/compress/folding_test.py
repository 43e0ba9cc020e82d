"""Tests that folding does not change the logits of any family, and follows the formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import presets
from model.compress import folding
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, parameters
from ops.quantized import quantize

# Logits of order 10 in float32, after scales over three orders of magnitude.
UNCHANGED = 1e-4

TINY = {name: presets.preset(f'tiny-{name}') for name in ('gemma2', 'gpt2', 'neox', 'phi3')}
TINY['llama'] = presets.preset('tiny-llama')
TINY['qwen3'] = presets.preset('tiny-qwen3')


def _with(config: ModelConfig, *, mixer=None, ffn=None, **traits) -> ModelConfig:
  layers = (dataclasses.replace(layer, **traits) for layer in config.layers)
  layers = (layer.with_mixer(**(mixer or {})).with_ffn(**(ffn or {})) for layer in layers)
  return config.replace(layers=tuple(layers))


FAMILIES = {
  **TINY,
  'qwen2': _with(TINY['llama'], mixer={'qkv_bias': True}),
  'biases': _with(TINY['llama'], mixer={'qkv_bias': True, 'output_bias': True}, ffn={'bias': True}),
  'relu': _with(TINY['gpt2'], ffn={'activation': 'relu'}),
  'relu, one key head': _with(TINY['gpt2'], ffn={'activation': 'relu'}, mixer={'kv_heads': 1}),
  'no norms before': _with(TINY['llama'], pre_norms=False, post_norms=True),
  'parallel llama': _with(TINY['llama'], parallel=True),
}
families = pytest.mark.parametrize('family', FAMILIES)


def _model(config, seed=0) -> Transformer:
  """Builds a model with all parameters random, so that zeros and ones hide no trait."""
  model, rng = Transformer(config, rngs=nnx.Rngs(0)), np.random.default_rng(seed)
  for param in parameters(model).values():
    value = param.get_value()
    noise = rng.normal(size=value.shape) * (0.2 if value.ndim > 1 else 0.1)
    param.set_value(value + jnp.asarray(noise, value.dtype))
  return model


def _program(model):
  tokens_BT = jnp.asarray(np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 12)))
  graphdef, _ = nnx.split(model)
  run = jax.jit(lambda state: nnx.merge(graphdef, state)(tokens_BT))
  return lambda model: np.asarray(run(nnx.split(model)[1]))


def _values(block):
  return {path: param.get_value() for path, param in parameters(block).items()}


def _width(values, group) -> int:
  inputs = values[f'{group.consumers[0]}.weight'].shape[0]
  return inputs // group.copies


def _change(block, group, rng, fold=folding.fold):
  values = _values(block)
  scales_O = jnp.asarray(10 ** rng.uniform(-1.5, 1.5, _width(values, group)), jnp.float32)
  for path, value in fold(values, group, scales_O).items():
    parameters(block)[path].set_value(value)


@families
@pytest.mark.quick(
  family=(
    'gemma2',
    'gpt2',
    'neox',
    'biases',
    'relu, one key head',
    'no norms before',
    'parallel llama',
  )
)
@pytest.mark.quick(family=('gemma2', 'gpt2', 'biases', 'parallel llama'))
def test_folding_does_not_change_the_logits(family, rng):
  config = FAMILIES[family]
  model = _model(config)
  run, before = _program(model), _values(model)
  expected = run(model)
  for block in model.layers:
    for group in folding.groups(config, block.layer):
      _change(block, group, rng)
  assert np.abs(expected).max() > 0.5
  np.testing.assert_allclose(run(model), expected, atol=UNCHANGED * np.abs(expected).max())
  _assert_folded(config.layers[0], before, _values(model))


def _assert_folded(layer, before, after):
  """Checks that the parameters of the groups have changed, and no others."""
  left = ('post_norm', 'query_norm', 'key_norm', 'output.bias', 'down.bias')
  producers = [edge.producer for edge in layer.wiring.edges if edge.obstacle is None]
  left += tuple(f'{name}.weight' for name in folding.unscaled(layer) if name not in producers)
  left += () if layer.ffn.gated or layer.ffn.activation == 'relu' else ('up.bias',)
  left += ('query.bias', 'key.bias', 'gate.bias')
  for path in before:
    expected = path.startswith('layers.') and not any(part in path for part in left)
    assert expected != np.array_equal(before[path], after[path]), path


@families
@pytest.mark.quick(family=('gemma2', 'relu, one key head', 'parallel llama'))
@pytest.mark.quick(family=('gemma2', 'parallel llama'))
def test_each_part_of_a_group_matters(family, rng):
  """Folding without dividing the producer changes the logits, for every group."""
  config = FAMILIES[family]
  model = _model(config)
  run = _program(model)
  expected, state = run(model), nnx.split(model)[1]
  state = jax.tree.map(lambda a: a, state)

  def consumers_only(values, group, scales_O):
    changed = folding.fold(values, group, scales_O)
    return {path: w for path, w in changed.items() if path not in group.parameters[:2]}

  for group in folding.groups(config, config.layers[0]):
    nnx.update(model, state)
    _change(model.layers[0], group, rng, consumers_only)
    assert np.abs(run(model) - expected).max() > 100 * UNCHANGED, group.producer


@pytest.mark.parametrize('family', ['gpt2', 'neox'])
def test_a_layer_after_an_inhomogeneous_activation_is_not_scaled(family, rng):
  config = FAMILIES[family]
  assert list(folding.unscaled(config.layers[0])) == ['ffn.down']
  assert all(
    'ffn.down' not in group.consumers for group in folding.groups(config, config.layers[0])
  )
  model = _model(config)
  run = _program(model)
  expected = run(model)
  _change(model.layers[0], folding.Group(producer='ffn.up', consumers=('ffn.down',)), rng)
  assert np.abs(run(model) - expected).max() > 100 * UNCHANGED


@families
def test_every_linear_layer_is_in_one_group_or_has_a_reason(family):
  config = FAMILIES[family]
  layer = config.layers[0]
  found = [name for group in folding.groups(config, layer) for name in group.consumers]
  found += folding.unscaled(layer)
  block = _model(config).layers[0]
  weights = [path.removesuffix('.weight') for path in _values(block) if path.endswith('.weight')]
  assert sorted(found) == sorted(weights)


def test_heads_that_share_values_share_scales():
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=6, kv_heads=2, head_width=4), ffn=FeedForwardConfig(width=8)
  )
  config = ModelConfig(family='llama', vocab_size=3, width=5, layers=(layer,), max_positions=4)
  group = folding.groups(config, layer)[1]
  scales_O, expected = np.arange(1.0, 9), np.zeros(24)
  for head in range(6):
    for channel in range(4):
      expected[head * 4 + channel] = scales_O[(head // 3) * 4 + channel]
  np.testing.assert_array_equal(group.spread(jnp.asarray(scales_O)), expected)
  values_I = np.random.default_rng(0).random(24).astype(np.float32)
  tied = [max(values_I[expected == scale]) for scale in scales_O]
  np.testing.assert_array_equal(group.tie(jnp.asarray(values_I), jnp.max), tied)


def test_parameters_are_divided_and_multiplied(rng):
  model = _model(FAMILIES['gpt2'])
  values = {k: np.asarray(v, np.float64) for k, v in _values(model.layers[0]).items()}
  group = folding.groups(model.config, model.layers[0].layer)[0]
  s = rng.uniform(0.1, 10, 64).astype(np.float32)
  found = folding.fold(_values(model.layers[0]), group, jnp.asarray(s))
  expected = {
    'attention_norm.scale': values['attention_norm.scale'] / s,
    'attention_norm.bias': values['attention_norm.bias'] / s,
  }
  for name in ('query', 'key', 'value'):
    path = f'attention.{name}.weight'
    expected[path] = values[path] * s[:, None]
  assert set(found) == set(expected)
  for path, value in expected.items():
    np.testing.assert_allclose(found[path], value, rtol=1e-6)


def test_the_rounding_of_a_stored_scale_is_compensated(rng):
  """With Gemma's offset, a scale + 1 of 0.01 has few significant bits in bfloat16."""
  config = FAMILIES['gemma2']
  model = _model(config)
  norms = ('attention_norm', 'ffn_norm')
  for block in model.layers:
    for name in norms:
      scale = getattr(block, name).scale
      scale.set_value(scale.get_value().astype(jnp.bfloat16))
  run = _program(model)
  expected = run(model)
  for block in model.layers:
    for group in folding.groups(config, block.layer):
      if group.producer in norms:
        scales_O = jnp.asarray(10 ** rng.uniform(0, 3, 64), jnp.float32)
        wanted = np.asarray(folding.realised(_values(block), group, scales_O) / scales_O)
        assert np.abs(wanted - 1).max() > 0.1  # otherwise nothing would be tested
        for path, value in folding.fold(_values(block), group, scales_O).items():
          parameters(block)[path].set_value(value)
  assert model.layers[0].attention_norm.scale.get_value().dtype == jnp.bfloat16
  np.testing.assert_allclose(run(model), expected, atol=UNCHANGED * np.abs(expected).max())


def test_channels_that_are_zero_stay_finite():
  group = folding.Group(producer='n', consumers=('c',), norm_offset=1.0)
  values = {'n.scale': jnp.array([-1.0, 0.0]), 'c.weight': jnp.ones((2, 3))}
  found = folding.fold(values, group, jnp.array([5.0, 5.0]))
  np.testing.assert_allclose(found['n.scale'], [-1, 0.2 - 1], rtol=1e-6)
  np.testing.assert_allclose(found['c.weight'], [[1] * 3, [5] * 3], rtol=1e-6)


def test_a_compressed_weight_is_an_obstacle():
  values = _values(_model(FAMILIES['llama']).layers[0])
  group = folding.groups(FAMILIES['llama'], FAMILIES['llama'].layers[0])[1]
  assert folding.obstacle(values, group) is None
  values['attention.value.weight'] = quantize(values['attention.value.weight'], 'int8')
  reason = folding.obstacle(values, group)
  assert reason == 'not scaled, because attention.value.weight is a QuantizedTensor'
