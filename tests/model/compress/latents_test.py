"""Compression of models with latent attention, whose matrices are like others to all techniques."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import adapters, kv_cache, units
from model.adapters import AdapterConfig
from model.compress import pipeline, recipe, slicing
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.latent import LatentConfig
from model.transformer import Transformer, linears, parameters
from ops.linear import dense

# Exact transforms are rounded once, in float32; logits are of order 1.
TOLERANCE = 1e-4
WIDTH, VOCABULARY, LENGTH = 32, 50, 16
MIXER = LatentConfig(
  query_heads=4,
  kv_heads=4,
  still_width=8,
  rotary_width=8,
  value_width=8,
  rank=16,
  query_rank=16,
)
CONFIG = ModelConfig(
  family='llama',
  vocab_size=VOCABULARY,
  width=WIDTH,
  layers=(LayerConfig(mixer=MIXER, ffn=FeedForwardConfig(width=32)),),
  max_positions=64,
)
NAMES = ('query_down', 'query_up', 'kv_down', 'rotary_key', 'key_up', 'value_up', 'output')
FEW = ('kv_down', 'key_up', 'value_up')


@pytest.fixture(scope='module')
def model():
  """A model in which no parameter has its initial value."""
  made, rng = Transformer(CONFIG, rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for param in parameters(made).values():
    value = param.get_value()
    param.set_value(jnp.asarray(value + 0.2 * rng.standard_normal(value.shape), value.dtype))
  return made


@pytest.fixture(scope='module')
def tokens_BT():
  return np.random.default_rng(1).integers(0, VOCABULARY, (8, LENGTH), np.int32)


def _compressed(model, tokens_BT, *steps):
  return pipeline.compress(model, recipe.parse({'name': 'x', 'steps': list(steps)}), tokens_BT)


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


def _logits(model, tokens_BT):
  return np.asarray(_run(*nnx.split(model), tokens_BT))


def _value_up(model):
  return model.layers[0].attention.value_up


def _decoded(model, tokens_BT):
  """The logits of tokens that are fed one by one."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def step(state, tokens_BT, positions_BT, caches):
    own = nnx.merge(graphdef, state)
    x_BTD, caches = own.hidden(tokens_BT, positions_BT=positions_BT, cache=caches)
    return own.logits(x_BTD), caches

  caches, parts = kv_cache.init(model.config, len(tokens_BT), 8), []
  for t in range(4):
    at = np.full((len(tokens_BT), 1), t, np.int32)
    logits, caches = step(state, tokens_BT[:, t : t + 1], at, caches)
    parts.append(logits)
  return np.concatenate(parts, 1)


@pytest.mark.parametrize(
  'step',
  [
    {'rotate': {}},
    {'awq': {'grid': 3, 'rows': 2, 'quantize': False}},
    {'smoothquant': {'fold': 'all', 'quantize': False}},
  ],
  ids=lambda step: next(iter(step)),
)
def test_what_cancels_out_changes_no_logit(model, tokens_BT, step):
  changed, _ = _compressed(model, tokens_BT, step)
  before, after = (np.asarray(dense(_value_up(m).weight.get_value())) for m in (model, changed))
  assert np.abs(after - before).max() > 0.01
  expected = _logits(model, tokens_BT)
  np.testing.assert_allclose(_logits(changed, tokens_BT), expected, atol=TOLERANCE)
  np.testing.assert_allclose(_decoded(changed, tokens_BT), expected[:, :4], atol=TOLERANCE)


@pytest.mark.parametrize(
  ('step', 'kind', 'names'),
  [
    ({'gptq': {'format': 'int4', 'group_size': 16}}, 'QuantizedTensor', FEW),
    pytest.param({'wanda': {'n': 2, 'm': 4}}, 'SparseTensor', NAMES, marks=pytest.mark.slow),
  ],
  ids=['gptq', 'wanda'],
)
def test_matrices_are_compressed_and_decoding_reads_what_they_stand_for(
  model, tokens_BT, step, kind, names
):
  only = [f'*.attention.{name}' for name in names]
  compressed, _ = _compressed(model, tokens_BT, {**step, 'only': only})
  own = linears(compressed.layers[0].attention)
  kinds = {type(own[name].weight.get_value()).__name__ for name in names}
  assert kinds == {kind}
  expected = _logits(compressed, tokens_BT)
  assert np.abs(expected - _logits(model, tokens_BT)).max() > 0.01
  np.testing.assert_allclose(_decoded(compressed, tokens_BT), expected[:, :4], atol=TOLERANCE)


def test_an_adapter_of_each_matrix_is_part_of_what_decoding_reads(model, tokens_BT):
  adapted = adapters.attach(model, AdapterConfig(rank=2), key=jax.random.key(0))
  for linear in linears(adapted).values():
    w = linear.weight.get_value()
    if hasattr(w, 'b_RO'):
      linear.weight.set_value(jax.tree.map(lambda a: a + 0.05 if a.shape[0] == 2 else a, w))
  expected = _logits(adapted, tokens_BT)
  assert np.abs(expected - _logits(model, tokens_BT)).max() > 0.01
  np.testing.assert_allclose(_decoded(adapted, tokens_BT), expected[:, :4], atol=TOLERANCE)


def test_merging_the_norms_of_the_stream_leaves_those_of_the_latents(model, tokens_BT):
  values = slicing.merge_norms(model)
  merged = units.build(slicing.merged_config(model.config), _single(values))
  assert np.ptp(merged.layers[0].attention_norm.scale.get_value()) == 0
  assert np.ptp(merged.layers[0].attention.kv_norm.scale.get_value()) > 0.1
  np.testing.assert_allclose(_logits(merged, tokens_BT), _logits(model, tokens_BT), atol=TOLERANCE)


def _single(values):
  return {path: jnp.asarray(value, jnp.float32) for path, value in values.items()}


@pytest.mark.parametrize(
  ('step', 'sizes'),
  [
    pytest.param({'prune_heads': {'ratio': 0.25}}, (32, 3, 16), marks=pytest.mark.slow),
    ({'prune_heads': {'ratio': 0.5, 'importance': 'taylor', 'refit': True}}, (32, 2, 16)),
    ({'slice': {'ratio': 0.25, 'multiple': 8}}, (24, 4, 16)),
  ],
  ids=['heads', 'taylor', 'slice'],
)
def test_units_are_removed(model, tokens_BT, step, sizes):
  smaller, _ = _compressed(model, tokens_BT, step)
  mixer = smaller.config.layers[0].mixer
  assert (smaller.config.width, mixer.kv_heads, mixer.rank) == sizes
  assert mixer.query_heads == mixer.kv_heads
  assert smaller.layers[0].attention.query_up.weight.shape == (16, sizes[1] * 16)
  expected, found = _logits(model, tokens_BT), _logits(smaller, tokens_BT)
  np.testing.assert_allclose(_decoded(smaller, tokens_BT), found[:, :4], atol=TOLERANCE)
  # What is left does much of what there was.
  assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.7
