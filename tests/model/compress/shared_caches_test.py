"""Shared caches as a retrofit: what each layer gets, where nothing changes, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import kv_cache, presets
from model.compress import pipeline, recipe
from model.train import students
from model.transformer import Transformer, abstract, parameters

TOLERANCE = 1e-5  # of logits, which are of order 1
TOKENS_BT = np.random.default_rng(1).integers(0, 256, (2, 12), np.int32)
KEYS = ('key', 'value', 'key_norm')
KEYS_OF_ONE = (
  'attention_norm.scale',
  'attention.key_norm.scale',
  *(f'attention.{part}.{leaf}' for part in ('key', 'value') for leaf in ('weight', 'bias')),
)


def _model(name='tiny-llama', layers=4, silent=(), **mixer) -> Transformer:
  """A small model; layers that are `silent` write nothing, and have the keys of the next one."""
  config = presets.preset(name)
  layer = config.layers[0].with_mixer(**mixer).with_ffn(width=32)
  model = Transformer(config.replace(layers=(layer,) * layers), rngs=nnx.Rngs(0))
  rng, params = np.random.default_rng(0), parameters(model)
  for param in params.values():
    value = np.asarray(param.get_value())
    param.set_value(jnp.asarray(value + 0.1 * rng.standard_normal(value.shape), jnp.float32))
  for l in silent:
    for path in ('attention.output', 'ffn.down'):
      weight = params[f'layers.{l}.{path}.weight']
      weight.set_value(jnp.zeros_like(weight.get_value()))
    for part in KEYS_OF_ONE:
      source = params.get(f'layers.{l + 1}.{part}')
      if source is not None:
        params[f'layers.{l}.{part}'].set_value(source.get_value())
  return model


def _compressed(model, *steps) -> Transformer:
  one = recipe.parse({'name': 'x', 'steps': list(steps)})
  return pipeline.compress(model, one)[0]


@jax.jit
def _logits(model):
  return model(TOKENS_BT)


@pytest.mark.parametrize(
  ('name', 'traits', 'mode'),
  [('tiny-llama', {'qkv_bias': True}, 'mean'), ('tiny-qwen3', {}, 'first')],
)
@pytest.mark.quick(name=('tiny-llama',))
def test_where_lenders_write_nothing_and_keys_are_equal_nothing_changes(name, traits, mode):
  model = _model(name, layers=2, silent=(0,), **traits)
  found = _compressed(model, {'shared_caches': {'every': 2, 'mode': mode}})
  assert [layer.mixer.back for layer in found.config.layers] == [0, 1]
  np.testing.assert_allclose(_logits(found), _logits(model), atol=TOLERANCE)


def test_groups_of_one_change_nothing():
  model = _model(layers=2)
  found = _compressed(model, {'shared_caches': {'every': 1}})
  assert found.config == model.config
  np.testing.assert_array_equal(_logits(found), _logits(model))


@pytest.mark.parametrize('every', [2, 3, 4])
@pytest.mark.quick(every=(3,))
def test_a_group_has_one_cache_and_the_mean_of_its_matrices(every):
  model = _model(layers=7)
  step = lambda mode: {'shared_caches': {'every': every, 'mode': mode}}
  one = recipe.parse({'name': 'x', 'steps': [step('mean')]})
  found, ledger = pipeline.compress(model, one)
  given, values = parameters(model), parameters(found)
  first = parameters(_compressed(model, step('first')))
  groups = [range(start, min(start + every, 7)) for start in range(0, 7, every)]
  at = lambda l, part: f'layers.{l}.attention.{part}.weight'
  for part in ('key', 'value'):
    for group in groups:
      own = np.mean([np.float64(given[at(l, part)].get_value()) for l in group], 0)
      np.testing.assert_allclose(values[at(group[0], part)].get_value(), own, atol=1e-7)
      np.testing.assert_array_equal(
        first[at(group[0], part)].get_value(), given[at(group[0], part)].get_value()
      )
      assert not any(at(l, part) in values for l in group[1:])
  readers = [l for group in groups for l in group[1:]]
  assert [row['layer'] for row in ledger.to_rows()] == [f'layers.{l}.attention' for l in readers]
  others = [path for path in values if path.split('.')[-2] not in KEYS]
  assert others and all(values[path].get_value() is given[path].get_value() for path in others)
  # A group of one, at the end, is as it was.
  assert found.config.layers[-1] == model.config.layers[-1] or len(groups[-1]) > 1
  size = lambda one: sum(leaf.nbytes for leaf in jax.tree.leaves(kv_cache.init(one.config, 1, 64)))
  assert size(found) * 7 == size(model) * len(groups)


def test_rotation_and_codes_follow():
  model = _compressed(_model(layers=2), {'shared_caches': {}})
  turned = _compressed(model, {'rotate': {}})
  np.testing.assert_allclose(_logits(turned), _logits(model), atol=1e-4)
  codes = _compressed(model, {'round_to_nearest': {'format': 'int8', 'group_size': -1}})
  difference = np.asarray(_logits(codes)) - np.asarray(_logits(model))
  assert 0 < np.sqrt(np.mean(difference**2)) < 0.05


def test_a_student_keeps_whole_groups():
  model = _compressed(_model(), {'shared_caches': {}})
  student = students.from_layers(model, (2, 3))
  assert [layer.mixer.back for layer in student.config.layers] == [0, 1]
  with pytest.raises(ValueError, match='keys and values of layer 2, so it has to stay 1 after'):
    students.from_layers(model, (0, 3))


REFUSED = {
  'every must be at least 1, not 0': [{'shared_caches': {'every': 0}}],
  'layer 0 shares its keys and values already': [{'shared_caches': {}}] * 2,
  'layer 1 has a SharedConfig; only attention has groups': [
    {'shared_caches': {}},
    {'grouped_heads': {}},
  ],
  'a layer has no key/value heads with their query heads': [
    {'shared_caches': {}},
    {'prune_heads': {'ratio': 0.5, 'importance': 'weights', 'refit': False}},
  ],
  'layer 1 cannot read .* it sees all keys here, and there no more than window4': [
    {'shared_caches': {}},
    {'sparse_attention': {'pattern': 'window4', 'full_layers': [1, 2, 3]}},
  ],
  'gptq measures on calibration text block by block': [{'shared_caches': {}}, {'gptq': {}}],
}


def _check(config, *steps):
  one = recipe.parse({'name': 'x', 'steps': list(steps)})
  pipeline.check(abstract(config), one, TOKENS_BT)


@pytest.mark.parametrize('message', REFUSED)
def test_what_cannot_share_is_refused(message):
  layer = presets.preset('tiny-llama').layers[0]
  with pytest.raises(ValueError, match=message):
    _check(presets.preset('tiny-llama').replace(layers=(layer,) * 4), *REFUSED[message])


def test_other_attention_and_evicting_caches_are_refused():
  with pytest.raises(ValueError, match='layer 0 has a LatentConfig; only attention'):
    _check(presets.preset('tiny-deepseek-v3'), {'shared_caches': {}})
  config = presets.preset('tiny-llama')
  first, other = config.layers[0], config.layers[0].with_mixer(head_width=8)
  with pytest.raises(ValueError, match=r'layer 1 cannot read .*: head_width is'):
    _check(config.replace(layers=(first, other)), {'shared_caches': {}})
  lender = config.replace(layers=(first.with_mixer(lends=True),))
  with pytest.raises(ValueError, match='later layers read cannot give tokens up'):
    kv_cache.init(lender, 1, 64, format='int8+h2o16')
