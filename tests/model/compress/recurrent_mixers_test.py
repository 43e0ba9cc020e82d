"""Techniques on models of recurrent mixers and gated attention, layer by layer of another kind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import checkpoint, hf, units
from model.compress import folding, pipeline, recipe
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers import linear
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.delta import GatedDeltaConfig
from model.transformer import Transformer, linears, matrices, parameters
from model.units import Kept
from ops import rotated
from ops.linear import Weight
from ops.rotated import RotatedTensor

# Float32 sums in another order, through four layers, of the largest logit.
UNCHANGED = 1e-4
MIXERS = (
  linear.retnet(2, 16, 16),
  linear.gla(2, 16, 16),
  GatedDeltaConfig(key_heads=2, value_heads=4, key_width=16, value_width=8),
  AttentionConfig(query_heads=4, kv_heads=2, head_width=16, qk_norm=True, gated=True),
)
CONFIG = ModelConfig(
  family='llama',
  vocab_size=64,
  width=32,
  layers=tuple(LayerConfig(mixer=one, ffn=FeedForwardConfig(width=32)) for one in MIXERS),
  max_positions=64,
)


def _model() -> Transformer:
  """A model in which every parameter differs from its initial value."""
  model, rng = Transformer(CONFIG, rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for path, param in parameters(model).items():
    value = param.get_value()
    noise = rng.normal(size=value.shape) * (0.2 if value.ndim > 1 else 0.1)
    if 'log_decay' not in path:
      param.set_value(value + jnp.asarray(noise, value.dtype))
  return model


@pytest.fixture
def tokens_BT(rng):
  return rng.integers(0, CONFIG.vocab_size, (8, 24), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, tokens_BT):
  return nnx.merge(graphdef, state)(tokens_BT)


def _logits(model, tokens_BT):
  return np.asarray(_run(*nnx.split(model), tokens_BT))


def _assert_near(found, expected):
  np.testing.assert_allclose(found, expected, atol=UNCHANGED * np.abs(expected).max())


def _compressed(model, *steps, tokens_BT=None):
  return pipeline.compress(model, recipe.parse({'name': 'x', 'steps': list(steps)}), tokens_BT)


def test_scales_fold_into_every_edge_and_each_part_of_it_matters(rng, tokens_BT):
  model = _model()
  expected, partly = _logits(model, tokens_BT), _model()
  producers = []
  for block, other in zip(model.layers, partly.layers):
    for group in folding.groups(CONFIG, block.layer):
      producers.append(group.producer)
      values = {path: param.get_value() for path, param in parameters(block).items()}
      inputs = values[f'{group.consumers[0]}.weight'].shape[0] // group.copies
      scales_O = jnp.asarray(10 ** rng.uniform(-1, 1, inputs), jnp.float32)
      for path, value in folding.fold(values, group, scales_O).items():
        parameters(block)[path].set_value(value)
        if 'ffn' not in path and path not in group.parameters[:2]:
          parameters(other)[path].set_value(value)
  assert producers.count('attention.head_norm') == 3
  assert producers.count('attention.decay_in') == producers.count('attention.value') == 1
  _assert_near(_logits(model, tokens_BT), expected)
  assert np.abs(_logits(partly, tokens_BT) - expected).max() > 0.1


def test_a_rotated_model_computes_the_same(tokens_BT):
  model = _model()
  turned, _ = _compressed(model, {'rotate': {}})
  _assert_near(_logits(turned, tokens_BT), _logits(model, tokens_BT))
  online = {path for path, w in matrices(turned).items() if isinstance(w, RotatedTensor)}
  outputs = {f'layers.{l}.attention.output' for l in range(4)}
  assert online == outputs | {f'layers.{l}.ffn.down' for l in range(4)} | {
    'layers.1.attention.decay_out'
  }
  # Where a norm or a gate comes after the heads, all channels turn together.
  plain = rotated.rotated(model.layers[2].attention.output.weight.get_value(), inner=1)
  assert turned.layers[2].attention.output.weight.get_value().inner == plain.inner


def test_heads_that_hand_on_nothing_can_go(tokens_BT):
  model = _model()
  for l, block in enumerate(model.layers):
    weight = block.attention.output.weight
    half = weight.shape[0] // 2
    gone = slice(0, half) if l % 2 else slice(half, None)
    weight.set_value(weight.get_value().at[gone].set(0))
  expected = _logits(model, tokens_BT)
  kept = Kept(heads={l: np.array([l % 2]) for l in range(4)})
  config, values = units.cut(model, kept)
  assert [layer.mixer.units.count for layer in config.layers] == [1] * 4
  assert config.layers[2].mixer == dataclasses.replace(MIXERS[2], key_heads=1, value_heads=2)
  _assert_near(_logits(units.build(config, values), tokens_BT), expected)


PLAIN = (
  {'prune_heads': {'ratio': 0.5, 'importance': 'weights'}},
  {'round_to_nearest': {'format': 'int4', 'group_size': 16}, 'only': ['layers.*']},
)
CALIBRATED = (
  {'prune_heads': {'ratio': 0.5, 'importance': 'output'}},
  {'awq': {'group_size': 16, 'grid': 3, 'rows': 4}, 'only': ['layers.*.attention.*']},
  {'gptq': {'format': 'int4', 'group_size': 16}, 'only': ['layers.*.ffn.*']},
)


@pytest.mark.parametrize(
  'steps', [PLAIN, pytest.param(CALIBRATED, marks=pytest.mark.slow)], ids=['plain', 'calibrated']
)
def test_a_recipe_prunes_heads_of_all_kinds_and_quantizes_what_is_left(tokens_BT, tmp_path, steps):
  model = _model()
  found, _ = _compressed(model, *steps, tokens_BT=tokens_BT)
  assert [layer.mixer.units.count for layer in found.config.layers] == [1] * 4
  assert np.isfinite(_logits(found, tokens_BT)).all()
  for path, layer in linears(found).items():
    in_layers, left = path.startswith('layers.'), path.endswith(('attention.decay', 'strength'))
    assert isinstance(layer.weight.get_value(), Weight) == (in_layers and not left), path
  hf.save_pretrained(found, None, tmp_path / 'folder')  # in our own format
  checkpoint.save(tmp_path / 'orbax', found)
  for again in (hf.load_pretrained(tmp_path / 'folder')[0], checkpoint.load(tmp_path / 'orbax')):
    assert again.config == found.config
    np.testing.assert_array_equal(_logits(again, tokens_BT), _logits(found, tokens_BT))


@pytest.mark.parametrize(
  'step',
  [
    pytest.param({'smoothquant': {'fold': 'all'}}, marks=pytest.mark.slow),
    pytest.param({'slice': {'ratio': 0.25}}, marks=pytest.mark.slow),
    pytest.param({'prune_width': {'ratio': 0.25}}, marks=pytest.mark.slow),
    {'cast': {'dtype': 'bfloat16'}},
  ],
  ids=['smoothquant', 'slice', 'prune_width', 'cast'],
)
def test_other_techniques_reach_them(tokens_BT, step):
  model = _model()
  found, ledger = _compressed(model, step, tokens_BT=tokens_BT)
  logits = _logits(found, tokens_BT)
  assert np.isfinite(logits).all() and logits.std() > 0.1
  if 'cast' in step:  # what decides stays exact
    kinds = {path: p.get_value().dtype for path, p in parameters(found).items()}
    exact = {path for path, dtype in kinds.items() if dtype == jnp.float32}
    mixer = 'layers.2.attention'
    assert exact == {
      'layers.0.attention.decays.log_decay',
      f'{mixer}.rates.log_rate',
      *(f'{mixer}.{name}' for name in ('decay.weight', 'decay.bias', 'strength.weight')),
    }
  else:
    assert not any('not scaled' in row.event for row in ledger.events)
