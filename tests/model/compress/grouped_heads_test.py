"""Fewer key/value heads: exact where those of a group are equal, by numpy where they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import presets
from model.compress import pipeline, recipe
from model.transformer import Transformer, parameters

# The mean of equal numbers is rounded once; logits are of order 1.
TOLERANCE = 1e-5
HEADS, WIDTH, GROUPS = 4, 16, 2


def _model(name, equal=False, **mixer) -> Transformer:
  """A model of four key/value heads in one layer; `equal`: those of a group are."""
  config = presets.preset(name)
  layer = config.layers[0].with_mixer(query_heads=8, kv_heads=HEADS, **mixer)
  model = Transformer(config.replace(layers=(layer,)), rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  for path, param in parameters(model).items():
    value = np.asarray(param.get_value())
    value = value + 0.1 * rng.standard_normal(value.shape)
    if equal and path.split('.')[-2] in ('key', 'value', 'key_norm') and value.shape[-1] > WIDTH:
      heads = value.reshape(*value.shape[:-1], GROUPS, -1, WIDTH)
      value = np.broadcast_to(heads[..., :1, :], heads.shape).reshape(value.shape)
    param.set_value(jnp.asarray(value, jnp.float32))
  return model


def _grouped(model, **options) -> Transformer:
  steps = [{'grouped_heads': {'kv_heads': GROUPS, **options}}]
  return pipeline.compress(model, recipe.parse({'name': 'x', 'steps': steps}))[0]


@pytest.fixture(scope='module')
def tokens_BT():
  return np.random.default_rng(1).integers(0, 256, (2, 12), np.int32)


def _logits(model, tokens_BT):
  graphdef, state = nnx.split(model)
  return np.asarray(jax.jit(lambda s, t: nnx.merge(graphdef, s)(t))(state, tokens_BT))


def _heads(model, part):
  return np.float64(getattr(model.layers[0].attention, part).weight.get_value()).reshape(
    -1, model.config.layers[0].mixer.kv_heads, WIDTH
  )


@pytest.mark.parametrize(
  ('name', 'traits', 'mode'),
  [
    ('tiny-llama', {'qkv_bias': True}, 'mean'),
    ('tiny-llama', {}, 'first'),
    ('tiny-qwen3', {}, 'mean'),
    ('tiny-olmo2', {}, 'mean'),
  ],
)
def test_where_the_heads_of_a_group_are_equal_nothing_changes(tokens_BT, name, traits, mode):
  model = _model(name, equal=True, **traits)
  found = _grouped(model, mode=mode)
  assert found.config.layers[0].mixer.kv_heads == GROUPS
  expected, logits = (_logits(one, tokens_BT) for one in (model, found))
  np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_neighbours_are_merged_and_query_heads_keep_their_places(tokens_BT):
  model = _model('tiny-llama')
  for part in ('key', 'value'):
    heads = _heads(model, part)
    means = heads.reshape(-1, GROUPS, HEADS // GROUPS, WIDTH).mean(2)
    np.testing.assert_allclose(_heads(_grouped(model), part), means, atol=1e-7)
    first = _heads(_grouped(model, mode='first'), part)
    np.testing.assert_array_equal(first, heads[:, [0, 2]])
  for part in ('query', 'output'):
    same = getattr(_grouped(model).layers[0].attention, part).weight.get_value()
    np.testing.assert_array_equal(same, getattr(model.layers[0].attention, part).weight.get_value())


def test_random_heads_have_the_spread_of_the_matrix_and_follow_the_seed():
  model = _model('tiny-llama')
  one, again, other = (_heads(_grouped(model, mode='random', seed=s), 'key') for s in (0, 0, 1))
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - other).max() > 0.1
  np.testing.assert_allclose(one.std(), _heads(model, 'key').std(), rtol=0.1)


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('tiny-llama', {'kv_heads': 3}, 'the 4 key/value heads of layer 0 cannot be merged into 3'),
    ('tiny-llama', {'kv_heads': 0}, 'kv_heads must be at least 1, not 0'),
    ('tiny-deepseek-v3', {}, 'layer 0 has a LatentConfig; only attention has groups'),
  ],
)
def test_what_cannot_be_merged_is_refused(name, options, message):
  model = Transformer(presets.preset(name), rngs=nnx.Rngs(0))
  model = model if name == 'tiny-deepseek-v3' else _model(name)
  with pytest.raises(ValueError, match=message):
    _grouped(model, **options)
