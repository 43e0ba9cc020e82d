"""Tests that rotation does not change the logits, and that it reduces the error of 4 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import native, presets
from model.compress import pipeline, recipe
from model.transformer import Transformer, matrices, parameters
from ops import rotated
from ops.linear import core

# Float32 sums in another order, through two layers; logits are of order 1.
TOLERANCE = 1e-4
PRESETS = ['tiny-llama', 'tiny-mistral', 'tiny-qwen3', 'tiny-phi3']


def _recipe(*steps):
  return recipe.parse({'name': 'x', 'steps': list(steps)})


def _logits(model, tokens_BT):
  return np.asarray(_run(*nnx.split(model), tokens_BT))


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


def _random(name, rng, **changes):
  """Builds a model with random norms and biases."""
  model = Transformer(presets.preset(name).replace(**changes), rngs=nnx.Rngs(0))
  for param in parameters(model).values():
    value = param.get_value()
    if value.ndim == 1:
      param.set_value(value + jnp.asarray(rng.normal(size=value.shape) / 4, value.dtype))
    else:
      param.set_value(value * 3)
  return model


def _tokens(model, rng, shape=(2, 17)):
  return rng.integers(0, model.config.vocab_size, shape).astype(np.int32)


@pytest.mark.parametrize('online', [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', PRESETS)
@pytest.mark.quick(name=('tiny-qwen3', 'tiny-phi3'))
def test_rotation_does_not_change_the_logits(rng, name, online):
  model = _random(name, rng)
  tokens_BT = _tokens(model, rng)
  turned, ledger = pipeline.compress(model, _recipe({'rotate': {'online': online}}))
  expected = _logits(model, tokens_BT)
  assert np.abs(expected).max() > 0.5
  np.testing.assert_allclose(_logits(turned, tokens_BT), expected, atol=TOLERANCE, rtol=0)
  after = matrices(turned)
  assert not any(_same(after[path], model, path) for path in matrices(model))
  assert any('tied' in row.event for row in ledger.events) == model.config.tied
  kinds = {type(w) for w in matrices(turned).values()}
  assert (rotated.RotatedTensor in kinds) == online


def _same(w, model, path):
  w, before = core(w), matrices(model)[path]
  return w.shape == before.shape and np.allclose(w, before, atol=1e-3)


def test_norms_with_an_offset_and_biases_do_not_change_the_logits(rng):
  config = presets.preset('tiny-llama')
  model = _random('tiny-llama', rng, norm_offset=1.0, embedding_scale=3.0, head_bias=True)
  assert model.config.norm_offset == 1.0 and config.norm_offset == 0.0
  tokens_BT = _tokens(model, rng)
  turned, _ = pipeline.compress(model, _recipe({'rotate': {}}))
  np.testing.assert_allclose(
    _logits(turned, tokens_BT), _logits(model, tokens_BT), atol=TOLERANCE, rtol=0
  )


def test_equal_seeds_give_equal_rotations_and_others_differ(rng):
  model = _random('tiny-llama', rng)
  tables = [
    np.asarray(
      pipeline.compress(model, _recipe({'rotate': {'seed': seed}}))[0].embedding.table.get_value()
    )
    for seed in (0, 1, 0)
  ]
  assert np.array_equal(tables[0], tables[2]) and not np.allclose(tables[0], tables[1])


def test_the_input_model_is_not_changed(rng):
  model = _random('tiny-qwen3', rng)
  before = {path: np.asarray(p.get_value()) for path, p in parameters(model).items()}
  pipeline.compress(model, _recipe({'rotate': {}}))
  assert model.config.tied and model.head is None
  for path, param in parameters(model).items():
    assert np.array_equal(before[path], param.get_value())


def test_rotation_helps_a_model_with_outliers(rng):
  """Rotation reduces the 4-bit error if the stream has outlier channels, as in trained models."""
  model = _random('tiny-llama', rng)
  norm = model.layers[0].ffn_norm.scale
  norm.set_value(norm.get_value().at[:3].set(40.0))
  for linear in (model.layers[0].ffn.gate, model.layers[0].ffn.up):
    weight = linear.weight
    weight.set_value(weight.get_value().at[:3].divide(40.0))
  tokens_BT = _tokens(model, rng)
  step = {'round_to_nearest': {'format': 'int4', 'group_size': -1}}
  plain, _ = pipeline.compress(model, _recipe(step))
  turned, _ = pipeline.compress(model, _recipe({'rotate': {}}, step))
  expected = _logits(model, tokens_BT)
  error = lambda m: np.square(_logits(m, tokens_BT) - expected).mean()
  assert error(turned) < 0.8 * error(plain)


def test_a_rotated_and_quantized_model_is_saved_and_loaded(rng, tmp_path):
  from model import hf

  model = _random('tiny-llama', rng)
  one = _recipe({'rotate': {}}, {'round_to_nearest': {'format': 'int8'}})
  turned, _ = pipeline.compress(model, one)
  hf.save_pretrained(turned, None, tmp_path / 'm', recipe=one.to_dict())
  again, _ = hf.load_pretrained(tmp_path / 'm')
  tokens_BT = _tokens(model, rng)
  assert np.array_equal(_logits(turned, tokens_BT), _logits(again, tokens_BT))
  assert native.is_compressed(again)


@pytest.mark.parametrize(
  'name, message',
  [
    ('tiny-gpt2', 'layer norm'),
    ('tiny-gemma2', 'norms after attention'),
    ('tiny-olmo2', 'rotate: the scales of norms after attention'),
  ],
)
def test_models_that_do_not_commute_with_rotations_are_refused(name, message):
  model = Transformer(presets.preset(name), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=message):
    pipeline.compress(model, _recipe({'rotate': {}}))


@pytest.mark.parametrize('share, refused', [(0.5, True), (0.02, False)])
def test_a_pruned_model_is_not_rotated(rng, share, refused):
  model = _random('tiny-llama', rng)
  pruned = model.layers[1].ffn.down.weight
  value = np.array(pruned.get_value())
  pruned.set_value(jnp.asarray(np.where(rng.random(value.shape) < share, 0, value)))
  if not refused:  # a few zeros are chance
    pipeline.compress(model, _recipe({'rotate': {}}))
    return
  with pytest.raises(ValueError, match=r'layers\.1\.ffn\.down is pruned, and a rotation'):
    pipeline.compress(model, _recipe({'rotate': {}}))


def test_rotation_must_come_first_and_apply_to_all_layers(rng):
  model = _random('tiny-llama', rng)
  with pytest.raises(ValueError, match='has to come before cast'):
    pipeline.compress(model, _recipe({'cast': {}}, {'rotate': {}}))
  with pytest.raises(ValueError, match='takes no "only"'):
    pipeline.compress(model, _recipe({'rotate': {}, 'only': ['layers.0.*']}))
