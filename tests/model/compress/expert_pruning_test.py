"""Scores of experts against loops over tokens, and changes that must not change the outputs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.compress import expert_merging, expert_pruning, expert_use, pipeline, recipe
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import RoutedConfig
from model.transformer import Transformer, parameters
from ops.moe import Router

# Float32 sums in another order, of values of order 1.
TOLERANCE = 1e-5
PLAIN = RoutedConfig(
  experts=4, width=8, router=Router(choices=2, renormalize=True), router_bias=True, bias=True
)
GROUPED = RoutedConfig(
  experts=6,
  width=8,
  router=Router(choices=2, score='sigmoid', groups=2, group_limit=1, scale=2.0),
  router_bias=True,
  bias=True,
)
MIXER = AttentionConfig(query_heads=2, kv_heads=1, head_width=8)
TOKENS_BT = np.random.default_rng(1).integers(0, 40, (4, 13), np.int32)


def _model(ffn, layers=2) -> Transformer:
  layer = LayerConfig(mixer=MIXER, ffn=ffn)
  config = ModelConfig(
    family='llama', vocab_size=40, width=16, layers=(layer,) * layers, max_positions=32
  )
  model, rng = Transformer(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for path, param in parameters(model).items():
    value = param.get_value()
    if 'norm' not in path:
      param.set_value(jnp.asarray(rng.standard_normal(value.shape) / 3, value.dtype))
  return model


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


def _logits(model):
  return np.asarray(_run(*nnx.split(model), TOKENS_BT))


def _compress(model, *steps):
  return pipeline.compress(model, recipe.parse({'name': 'x', 'steps': list(steps)}), TOKENS_BT)


def _biased_against(model, gone):
  """The model with a router that never chooses some experts."""
  for block in model.layers:
    bias = block.ffn.router.bias
    bias.set_value(bias.get_value().at[jnp.array(gone)].set(-60.0))
  return model


def test_use_is_what_a_loop_over_tokens_counts(rng):
  ffn = GROUPED
  net = _model(ffn, layers=1).layers[0].ffn
  x_TD = np.float32(rng.standard_normal((15, 16)))
  use = jax.jit(lambda x: expert_use.of_tokens(net, x, outputs=True))(x_TD)
  routing = net.route(jnp.asarray(x_TD))
  value = lambda name: np.float64(parameters(net)[name].get_value())
  silu = lambda x: x / (1 + np.exp(-x))
  add = lambda name, e: value(f'{name}.bias')[e]

  def output(x_D, e):
    gate, up = (x_D @ value(f'{n}.weight')[e] + add(n, e) for n in ('gate', 'up'))
    return (silu(gate) * up) @ value('down.weight')[e] + add('down', e)

  rows, weights, norms, shares = np.zeros((4, ffn.experts))
  for x_D, chosen, own in zip(np.float64(x_TD), routing.experts_TX, np.float64(routing.weights_TX)):
    for e, w in zip(np.asarray(chosen), own):
      size = np.linalg.norm(output(x_D, e))
      rows[e], weights[e] = rows[e] + 1, weights[e] + w
      norms[e], shares[e] = norms[e] + size, shares[e] + size * w / own.sum()
  found = (use.rows_E, use.weights_E, use.norms_E, use.shares_E)
  for one, expected in zip(found, (rows, weights, norms, shares), strict=True):
    np.testing.assert_allclose(one, expected, rtol=10 * TOLERANCE, atol=10 * TOLERANCE)
  logits_TE = np.float64(x_TD) @ value('router.weight') + value('router.bias')
  logits_TE = logits_TE - logits_TE.mean(1, keepdims=True)
  np.testing.assert_allclose(use.logits_EE, logits_TE.T @ logits_TE, atol=1e-3)
  y_TED = np.array([[output(x_D, e) for e in range(ffn.experts)] for x_D in np.float64(x_TD)])
  np.testing.assert_allclose(use.outputs_EE, np.einsum('TED,TFD->EF', y_TED, y_TED), atol=1e-3)
  assert use.opened == 15
  np.testing.assert_allclose(expert_pruning.score(use, 'reap'), shares / np.maximum(rows, 1), 1e-4)
  np.testing.assert_allclose(expert_pruning.score(use, 'norm'), norms / np.maximum(rows, 1), 1e-4)


def test_pruning_no_expert_is_the_identity():
  model = _model(PLAIN)
  same, ledger = _compress(model, {'prune_experts': {'ratio': 0.0, 'score': 'random'}})
  assert same.config == model.config and not ledger.events
  for path, param in parameters(model).items():
    np.testing.assert_array_equal(parameters(same)[path].get_value(), param.get_value())


@pytest.mark.parametrize('score', ['reap', 'norm'])
@pytest.mark.quick(score=('reap',))
def test_an_expert_that_no_token_chose_goes_first_and_nothing_changes(score):
  model = _biased_against(_model(PLAIN, layers=1), [1])
  smaller, ledger = _compress(model, {'prune_experts': {'ratio': 0.25, 'score': score}})
  assert smaller.config.layers[0].ffn.experts == 3
  assert smaller.layers[0].ffn.router.bias.get_value().shape == (3,)
  assert [row['event'] for row in ledger.to_rows()] == ['experts removed, of 4: 1']
  np.testing.assert_allclose(_logits(smaller), _logits(model), atol=TOLERANCE)


@pytest.mark.slow
def test_every_group_loses_as_many():
  model = _biased_against(_model(GROUPED, layers=1), [0, 4])
  smaller, ledger = _compress(model, {'prune_experts': {'ratio': 0.3, 'score': 'frequency'}})
  ffn = smaller.config.layers[0].ffn
  assert (ffn.experts, ffn.router) == (4, GROUPED.router)
  assert {row['event'] for row in ledger.to_rows()} == {'experts removed, of 6: 0, 4'}
  np.testing.assert_allclose(_logits(smaller), _logits(model), atol=TOLERANCE)


def test_a_group_loses_its_lowest_though_all_of_the_lowest_are_in_another():
  scores_E = np.array([1.0, 2, 3, 7, 6, 8])
  np.testing.assert_array_equal(expert_pruning.best(scores_E, GROUPED.router, 4), [1, 2, 3, 5])


@pytest.mark.parametrize(
  'step, why',
  [
    ({'prune_experts': {'ratio': 0.75}}, 'cannot choose 2 experts of 1'),
    ({'merge_experts': {'ratio': 1.0}}, 'ratio is a share of the experts'),
    ({'prune_experts': {'ratio': 0.9}}, 'no expert of layer 0 would stay'),
  ],
)
def test_a_share_that_cannot_go_is_refused(step, why):
  with pytest.raises(ValueError, match=why):
    _compress(_model(PLAIN, layers=1), step)


def test_a_dense_model_has_no_experts(tiny):
  with pytest.raises(ValueError, match='no layer of the model has experts'):
    _compress(tiny(layers=1), {'prune_experts': {}})


@pytest.mark.slow
def test_copies_with_channels_in_another_order_are_merged_without_a_change():
  """Experts 2 and 3 are 0 and 1 with other orders of channels, and nearly the same router."""
  ffn = RoutedConfig(experts=4, width=8, router=Router(choices=1, renormalize=True), bias=True)
  model, rng = _model(ffn, layers=1), np.random.default_rng(2)
  net = model.layers[0].ffn
  for e, of in ((2, 0), (3, 1)):
    order = rng.permutation(8)
    for path, param in parameters(net).items():
      w = np.array(param.get_value())
      if path == 'router.weight':
        w[:, e] = w[:, of] + rng.normal(0, 1e-3, 16)
      elif path == 'down.weight':
        w[e] = w[of][order]
      else:
        w[e] = w[of] if path == 'down.bias' else w[of][..., order]
      param.set_value(jnp.asarray(w))
  step = {'merge_experts': {'ratio': 0.5, 'similarity': 'outputs'}}
  smaller, ledger = _compress(model, step)
  (row,) = ledger.to_rows()
  pairs = row['event'].removeprefix('experts merged into others, of 4: ').split(', ')
  assert sorted(tuple(sorted(map(int, pair.split(' + ')))) for pair in pairs) == [(0, 2), (1, 3)]
  np.testing.assert_allclose(_logits(smaller), _logits(model), atol=TOLERANCE)


def test_merging_is_the_average_by_use_in_the_best_order_of_all():
  ffn = RoutedConfig(experts=3, width=4, router=Router(choices=1))
  model, rows_E = _model(ffn, layers=1), np.array([3.0, 0.0, 1.0])
  found = expert_merging.merged(model, 0, [[0, 2], [1]], rows_E)
  take = lambda name: np.float64(parameters(model)[f'layers.0.ffn.{name}'].get_value())
  gate, up, down = (take(f'{name}.weight') for name in ('gate', 'up', 'down'))
  fit = lambda order: sum(
    (a[0] * b).sum()
    for a, b in ((gate, gate[2][:, order]), (up, up[2][:, order]), (down, down[2][order]))
  )
  order = list(max(itertools.permutations(range(4)), key=lambda order: fit(list(order))))
  expected = {
    'gate.weight': np.stack([0.75 * gate[0] + 0.25 * gate[2][:, order], gate[1]]),
    'up.weight': np.stack([0.75 * up[0] + 0.25 * up[2][:, order], up[1]]),
    'down.weight': np.stack([0.75 * down[0] + 0.25 * down[2][order], down[1]]),
    'router.weight': take('router.weight') @ np.array([[0.75, 0], [0, 1], [0.25, 0]]),
  }
  assert {path.removeprefix('layers.0.ffn.') for path in found} == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[f'layers.0.ffn.{name}'], value, atol=TOLERANCE)
