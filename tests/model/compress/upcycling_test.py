"""Experts made of dense networks and back: equal at the start where they must be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.compress import pipeline, recipe, upcycling
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import RoutedConfig
from model.transformer import Transformer, parameters
from ops.moe import Router

EXACT = 1e-5  # of the logits, which are of order 1
MIXER = AttentionConfig(query_heads=2, kv_heads=1, head_width=8)
DENSE = FeedForwardConfig(width=24)
BIASED = FeedForwardConfig(width=24, gated=False, activation='gelu', bias=True)
TOKENS_BT = np.random.default_rng(1).integers(0, 40, (4, 13), np.int32)


def _model(ffn) -> Transformer:
  config = ModelConfig(
    family='llama',
    vocab_size=40,
    width=16,
    layers=(LayerConfig(mixer=MIXER, ffn=ffn),),
    max_positions=32,
  )
  model, rng = Transformer(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for path, param in parameters(model).items():
    value = param.get_value()
    if 'norm' not in path:
      param.set_value(jnp.asarray(rng.standard_normal(value.shape) / 3, value.dtype))
  return model


@pytest.fixture(scope='module')
def dense():
  """A dense model and its logits."""
  model = _model(DENSE)
  return model, _logits(model)


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


def _logits(model):
  return np.asarray(_run(*nnx.split(model), TOKENS_BT))


def _compress(model, *steps):
  return pipeline.compress(model, recipe.parse({'name': 'x', 'steps': list(steps)}), TOKENS_BT)[0]


def _value(model, name):
  return np.asarray(parameters(model)[f'layers.0.ffn.{name}'].get_value())


@pytest.mark.parametrize(
  'experts, choices, granularity', [(4, 1, 1), (4, 3, 1), (8, 2, 2), (12, 8, 4)]
)
@pytest.mark.quick(granularity=(2, 4))
def test_copies_and_their_shards_compute_what_the_dense_model_did(
  dense, experts, choices, granularity
):
  step = {'experts': experts, 'choices': choices, 'granularity': granularity, 'router_std': 0.5}
  model = _compress(dense[0], {'upcycle': step})
  ffn = model.config.layers[0].ffn
  assert (ffn.experts, ffn.width, ffn.router.choices) == (experts, 24 // granularity, choices)
  assert model.config.family == 'mixtral'
  np.testing.assert_allclose(_logits(model), dense[1], atol=EXACT)


def test_biases_are_shared_out():
  model = _model(BIASED)
  step = {'experts': 6, 'choices': 4, 'granularity': 2, 'router_std': 0.5}
  np.testing.assert_allclose(
    _logits(_compress(model, {'upcycle': step})), _logits(model), atol=EXACT
  )


def test_all_parts_together_are_the_dense_model(dense):
  step = {'mode': 'partition', 'experts': 4, 'choices': 4, 'router_std': 0.0}
  model = _compress(dense[0], {'upcycle': step})
  np.testing.assert_allclose(_logits(model), dense[1], atol=EXACT)
  columns = np.concatenate(_value(model, 'up.weight'), axis=1)
  assert sorted(map(tuple, columns.T)) == sorted(map(tuple, _value(dense[0], 'up.weight').T))


def test_channels_that_are_alike_get_into_one_part(rng):
  centres, which = rng.normal(size=(5, 7)), rng.permutation(np.repeat(np.arange(5), 6))
  points = centres[which] + 0.01 * rng.normal(size=(30, 7))
  for seed in range(20):  # k-means can stop short of the best clusters, but not always
    found = upcycling.balanced_clusters(points, 5, seed=seed)
    assert sorted(np.concatenate(found)) == list(range(30)) and {len(c) for c in found} == {6}
    if all(len(set(which[c])) == 1 for c in found):
      return
  raise AssertionError('no start found the clusters')


def test_a_share_of_the_channels_is_drawn_anew_in_all_matrices(dense):
  model = _compress(dense[0], {'upcycle': {'mode': 'drop', 'drop': 0.25, 'experts': 3}})
  drawn = []
  for e in range(3):
    changed = [
      (_value(model, f'{name}.weight')[e] != _value(dense[0], f'{name}.weight')).any(axis)
      for name, axis in (('gate', 0), ('up', 0), ('down', 1))
    ]
    assert changed[0].sum() == 6 and all((c == changed[0]).all() for c in changed)
    drawn.append(tuple(np.flatnonzero(changed[0])))
  assert len(set(drawn)) == 3


def test_noise_is_a_share_of_the_spread(dense):
  model = _compress(dense[0], {'upcycle': {'noise': 0.1, 'experts': 8}})
  for name in ('gate.weight', 'down.weight'):
    before = _value(dense[0], name)
    noise = np.std(_value(model, name) - before[None]) / np.std(before)
    assert noise == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
  'step, why',
  [
    ({'experts': 4, 'granularity': 3}, 'must be multiples of the granularity 3'),
    ({'mode': 'partition', 'granularity': 2}, 'leave it at 1'),
    ({'mode': 'partition', 'experts': 5}, '24 channels of layer 0 do not divide into 5'),
    ({'experts': 2, 'choices': 3}, 'cannot choose 3 experts of 2'),
  ],
)
def test_what_cannot_be_made_is_refused(dense, step, why):
  with pytest.raises(ValueError, match=why):
    _compress(dense[0], {'upcycle': step})


@pytest.mark.parametrize('back', [{'mode': 'average'}, {'mode': 'concatenate'}])
def test_a_dense_model_comes_back_from_its_copies(dense, back):
  step = {'upcycle': {'experts': 3, 'router_std': 0.5}}
  model = _compress(dense[0], step, {'densify': back})
  width = DENSE.width * (3 if back['mode'] == 'concatenate' else 1)
  assert model.config.layers[0].ffn == dataclasses.replace(DENSE, width=width)
  assert model.config.family == 'llama'
  np.testing.assert_allclose(_logits(model), dense[1], atol=EXACT)


def test_experts_whose_weights_are_fixed_stand_side_by_side_with_shared_ones():
  """A router of zeros, which gives all experts the same weight, and a gate that is half open."""
  ffn = RoutedConfig(
    experts=3, width=8, router=Router(choices=3), shared_width=6, shared_gate=True, bias=True
  )
  model = _model(ffn)
  for name in ('router', 'shared_gate'):
    weight = getattr(model.layers[0].ffn, name).weight
    weight.set_value(jnp.zeros_like(weight.get_value()))
  found = _compress(model, {'densify': {'mode': 'concatenate'}})
  assert found.config.layers[0].ffn == FeedForwardConfig(width=30, bias=True)
  np.testing.assert_allclose(_logits(found), _logits(model), atol=EXACT)
  two = _compress(model, {'densify': {'mode': 'concatenate', 'experts': 2}})
  assert two.config.layers[0].ffn.width == 22
  with pytest.raises(ValueError, match='there are 3 experts, not 4'):
    _compress(model, {'densify': {'mode': 'concatenate', 'experts': 4}})
