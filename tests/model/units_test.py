"""Which arrays a unit is cut from, and that a model without it computes what it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import presets, units
from model.transformer import Context, Transformer, abstract, parameters
from model.units import Kept
from ops import quantized

FAMILIES = ('gemma2', 'gpt2', 'neox', 'qwen3')
# Of the largest logit. Removed terms are exact zeros; only the order of the other sums differs.
TOLERANCE = 1e-6


def _random(name, **changes):
  """A tiny model in which every parameter differs from its initial value."""
  config = presets.preset(f'tiny-{name}').replace(**changes)
  model, rng = Transformer(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for param in parameters(model).values():
    value = param.get_value()
    noise = rng.normal(size=value.shape)
    param.set_value(
      value + jnp.asarray(0.3 * noise if value.ndim == 1 else 0.05 * noise, value.dtype)
    )
  return model


def _logits(model):
  tokens_BT = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 9), np.int32)
  graphdef, state = nnx.split(model)
  return np.asarray(jax.jit(lambda state: nnx.merge(graphdef, state)(tokens_BT))(state))


def _assert_near(logits, expected):
  assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max()


def _cut(model, kept):
  config, values = units.cut(model, kept)
  return units.build(config, values)


def _zero(model, path, index):
  param = parameters(model)[path]
  param.set_value(param.get_value().at[index].set(0))


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.quick(name=('gemma2', 'gpt2'))
def test_channels_and_heads_that_hand_on_nothing_can_go(name):
  model = _random(name)
  queries = model.config.layers[0].mixer.query_heads // model.config.layers[0].mixer.kv_heads
  run = queries * model.config.layers[0].mixer.head_width
  channels, heads = np.array([0, 3, 40, 41]), np.array([1])
  for l in range(2):
    _zero(model, f'layers.{l}.ffn.down.weight', channels + l)
    _zero(model, f'layers.{l}.attention.output.weight', slice(run, 2 * run))
  stay = lambda size, gone: np.setdiff1d(np.arange(size), gone)
  layer = model.config.layers[0]
  kept = Kept(
    channels={l: stay(layer.ffn.width, channels + l) for l in range(2)},
    heads={l: stay(layer.mixer.kv_heads, heads) for l in range(2)},
  )
  smaller = _cut(model, kept)
  now = smaller.config.layers[1]
  assert (now.ffn.width, now.mixer.kv_heads) == (layer.ffn.width - 4, layer.mixer.kv_heads - 1)
  assert now.mixer.query_heads == queries * now.mixer.kv_heads
  _assert_near(_logits(smaller), _logits(model))


@pytest.mark.parametrize('name', ['gemma2', 'gpt2', 'neox'])
@pytest.mark.quick(name=('neox',))
def test_a_model_without_a_layer_runs_the_others(name):
  layers = presets.preset(f'tiny-{name}').layers
  model = _random(name, layers=(*layers, layers[0], layers[1]))
  smaller = _cut(model, Kept(layers=[0, 3]))
  tokens_BT = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 9), np.int32)
  x_BTD, context = model.embed(tokens_BT), Context.of(model.config, tokens_BT)
  for l in (0, 3):
    x_BTD, _ = context.run(model.layers[l], x_BTD)
  expected = model.logits(model.final_norm(x_BTD))
  assert smaller.config.layers == (layers[0], layers[1])
  _assert_near(_logits(smaller), np.asarray(expected))


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.quick(name=('gemma2', 'gpt2'))
def test_every_array_of_the_stream_is_cut(name):
  model = _random(name)
  width = np.arange(0, 64, 2)
  config, values = units.cut(model, Kept(width=width))
  assert config.width == 32
  shapes = {path: p.get_value().shape for path, p in parameters(abstract(config)).items()}
  assert {path: value.shape for path, value in values.items()} == shapes
  params = parameters(model)
  np.testing.assert_array_equal(
    values['layers.1.ffn.up.weight'], params['layers.1.ffn.up.weight'].get_value()[width]
  )
  np.testing.assert_array_equal(
    values['embedding.table'], params['embedding.table'].get_value()[:, width]
  )
  np.testing.assert_array_equal(
    values['final_norm.scale'], params['final_norm.scale'].get_value()[width]
  )


CUTS = {  # of a layer with 4 query heads on 2 key/value heads of width 16, without biases
  'F': {('ffn.gate.weight', 1, 1), ('ffn.up.weight', 1, 1), ('ffn.down.weight', 0, 1)},
  'K': {
    ('attention.query.weight', 1, 32),
    ('attention.key.weight', 1, 16),
    ('attention.value.weight', 1, 16),
    ('attention.output.weight', 0, 32),
  },
  'D': {
    ('attention_norm.scale', 0, 1),
    ('ffn_norm.scale', 0, 1),
    ('attention.query.weight', 0, 1),
    ('attention.key.weight', 0, 1),
    ('attention.value.weight', 0, 1),
    ('attention.output.weight', 1, 1),
    ('ffn.gate.weight', 0, 1),
    ('ffn.up.weight', 0, 1),
    ('ffn.down.weight', 1, 1),
  },
}


@pytest.mark.parametrize('unit', CUTS)
def test_which_arrays_a_unit_is_cut_from(unit):
  model = abstract(presets.preset('tiny-qwen3'))
  assert model.config.layers[1].mixer.head_width == 16
  found = {(c.path.split('.', 2)[2], c.axis, c.run) for c in units.cuts(model, unit, 1)}
  assert found == CUTS[unit]


def test_biases_learned_positions_and_a_head_are_cut_too():
  model = abstract(presets.preset('tiny-gpt2').replace(tied=False, head_bias=True))
  found = {(c.path, c.axis) for c in units.cuts(model, 'D')}
  assert {('positions.table', 1), ('head.weight', 0), ('final_norm.bias', 0)} < found
  assert {('layers.0.ffn.down.bias', 0), ('layers.1.attention.output.bias', 0)} < found
  assert not any(path in ('head.bias', 'layers.0.ffn.up.bias') for path, _ in found)
  assert ('layers.0.ffn.up.bias', 0) in {(c.path, c.axis) for c in units.cuts(model, 'F')}
  assert ('layers.0.attention.query.bias', 0) in {(c.path, c.axis) for c in units.cuts(model, 'K')}


def test_layers_may_keep_different_numbers():
  model = _random('llama')
  kept = Kept(channels={0: np.arange(10), 1: np.arange(5, 25)}, heads={1: np.array([1])})
  layers = _cut(model, kept).config.layers
  assert [(layer.ffn.width, layer.mixer.kv_heads, layer.mixer.query_heads) for layer in layers] == [
    (10, 2, 4),
    (20, 1, 2),
  ]


def test_what_is_compressed_already_is_not_cut():
  model = _random('llama')
  up = model.layers[0].ffn.up.weight
  up.set_value(quantized.quantize(up.get_value(), 'int8'))
  kept = Kept(channels={0: np.arange(8)})
  with pytest.raises(ValueError, match=r'layers\.0\.ffn\.up\.weight is a QuantizedTensor; units'):
    units.cut(model, kept)
  assert units.cut(model, Kept(layers=[0]))[0].layers == model.config.layers[:1]


def test_parameters_that_do_not_fit_the_config_are_named():
  model = _random('llama')
  config, values = units.cut(model, Kept(layers=[0]))
  del values['final_norm.scale']
  values['layers.0.ffn.up.weight'] = values['layers.0.ffn.up.weight'][:, 1:]
  with pytest.raises(ValueError, match=r'final_norm\.scale, layers\.0\.ffn\.up\.weight'):
    units.build(config, values)
