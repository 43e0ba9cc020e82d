"""Balance losses against numpy and their exact values, and statistics against counting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ops import balance, moe
from ops.moe import Router, Routing

TOKENS, EXPERTS, CHOICES = 48, 6, 2
SAME_FLOAT32 = 1e-6


route = jax.jit(moe.route, static_argnums=1)
_usage = jax.jit(functools.partial(balance.usage, score='softmax'))
statistics, z_loss = jax.jit(balance.statistics), jax.jit(balance.z_loss)


def _routed(rng, tokens=TOKENS, score='softmax'):
  logits_TE = jnp.asarray(2 * rng.standard_normal((tokens, EXPERTS)), jnp.float32)
  return logits_TE, route(logits_TE, Router(choices=CHOICES, score=score))


@jax.jit
def _loss(logits_TE, routing, mask_T=None):
  load_E = balance.load(routing.experts_TX, logits_TE.shape[1], mask_T)
  return balance.balance_loss(balance.probabilities(logits_TE, 'softmax'), load_E, mask_T)


def test_even_use_costs_1_and_collapse_the_experts_over_the_choices():
  even_TX = jnp.stack([jnp.arange(TOKENS) % EXPERTS, (jnp.arange(TOKENS) + 1) % EXPERTS], 1)
  p_TE = jnp.full((TOKENS, EXPERTS), 1 / EXPERTS)
  assert balance.balance_loss(p_TE, balance.load(even_TX, EXPERTS)) == pytest.approx(1)
  same_TX = jnp.tile(jnp.asarray([[3, 1]]), (TOKENS, 1))
  p_TE = jnp.zeros((TOKENS, EXPERTS)).at[:, jnp.asarray([1, 3])].set(0.5)
  collapsed = balance.balance_loss(p_TE, balance.load(same_TX, EXPERTS))
  assert collapsed == pytest.approx(EXPERTS / CHOICES)


def test_one_layer_is_transformers_loss_divided_by_the_choices(rng):
  logits_TE, routing = _routed(rng)
  theirs = load_balancing_loss_func((torch.tensor(np.asarray(logits_TE)),), EXPERTS, CHOICES)
  assert _loss(logits_TE, routing) == pytest.approx(float(theirs) / CHOICES, rel=1e-5)


def test_two_layers_that_collapse_on_different_experts_cost_the_most():
  """Pooled over layers, as in transformers, they would look balanced."""
  logits = [np.float32([[9, -9]] * 8), np.float32([[-9, 9]] * 8)]
  pooled = load_balancing_loss_func(tuple(map(torch.tensor, logits)), 2, 1)
  own = [_loss(jnp.asarray(x), route(jnp.asarray(x), Router(choices=1))) for x in logits]
  np.testing.assert_allclose(np.mean(own), 2, rtol=1e-5)
  assert float(pooled) == pytest.approx(1, rel=1e-5)


def test_padding_changes_nothing(rng):
  logits_TE, routing = _routed(rng)
  more_TE = jnp.concatenate([logits_TE, jnp.asarray(rng.standard_normal((9, EXPERTS)) * 5)])
  more_TE = more_TE.astype(jnp.float32)
  routed = route(more_TE, Router(choices=CHOICES))
  mask_T = jnp.arange(TOKENS + 9) < TOKENS
  assert _loss(more_TE, routed, mask_T) == pytest.approx(float(_loss(logits_TE, routing)), rel=1e-5)
  z = z_loss(logits_TE)
  assert z_loss(more_TE, mask_T) == pytest.approx(float(z), rel=1e-5)
  own = statistics(_usage(logits_TE, routing))
  masked = statistics(_usage(more_TE, routed, mask_T=mask_T))
  np.testing.assert_allclose([masked[k] for k in own], list(own.values()), rtol=1e-5)


def test_micro_batches_with_the_load_of_the_batch_give_its_loss_and_gradient(rng):
  logits_TE, routing = _routed(rng)
  load_E = sum(balance.load(part, EXPERTS) for part in jnp.split(routing.experts_TX, 4))
  np.testing.assert_array_equal(load_E, balance.load(routing.experts_TX, EXPERTS))

  def parts(logits_TE):
    p = [balance.probabilities(x, 'softmax') for x in jnp.split(logits_TE, 4)]
    return sum(balance.balance_loss(x, load_E) for x in p) / 4

  whole = lambda x: balance.balance_loss(balance.probabilities(x, 'softmax'), load_E)
  (a, slope_a), (b, slope_b) = (jax.jit(jax.value_and_grad(fn))(logits_TE) for fn in (parts, whole))
  assert a == pytest.approx(float(b), rel=1e-6)
  np.testing.assert_allclose(slope_a, slope_b, atol=SAME_FLOAT32)
  alone = np.mean([_loss(*_part(logits_TE, i)) for i in range(4)])
  assert alone > float(b)  # balance within each part is a stronger demand


def _part(logits_TE, i):
  part_TE = jnp.split(logits_TE, 4)[i]
  return part_TE, route(part_TE, Router(choices=CHOICES))


def test_the_gradient_of_the_balance_loss_takes_choices_from_full_experts():
  logits_TE = jnp.tile(jnp.asarray([[2.0, 1.0, 0.0, 0.0]]), (8, 1))
  slope_TE = jax.grad(lambda x: _loss(x, route(x, Router(choices=1))))(logits_TE)
  assert (slope_TE[:, 0] > 0).all() and (slope_TE[:, 1:] < 0).all()


def test_the_z_loss_in_float64(rng):
  logits_TE, _ = _routed(rng)
  expected = np.mean(np.log(np.exp(np.float64(logits_TE)).sum(1)) ** 2)
  assert z_loss(logits_TE) == pytest.approx(expected, rel=1e-5)


def test_probabilities_of_sigmoids_add_up_to_one(rng):
  logits_TE, _ = _routed(rng)
  s_TE = 1 / (1 + np.exp(-np.float64(logits_TE)))
  expected = s_TE / s_TE.sum(1, keepdims=True)
  found = balance.probabilities(logits_TE, 'sigmoid')
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_bias_evens_the_load_out_without_changing_weights(rng):
  """Tokens like the first experts; updates of the bias alone bring the loads together."""
  logits_TE = jnp.asarray(
    rng.standard_normal((512, EXPERTS)) - 0.5 * np.arange(EXPERTS), jnp.float32
  )
  router, bias_E = Router(choices=CHOICES, score='sigmoid'), jnp.zeros(EXPERTS)

  def update(bias_E, _):
    load_E = balance.load(route(logits_TE, router, bias_E).experts_TX, EXPERTS)
    return balance.updated_bias(bias_E, load_E, 0.002), balance.max_violation(load_E)

  bias_E, violation = jax.lax.scan(update, bias_E, length=400)
  assert violation[0] > 0.5 and violation[-1] < violation[0] / 5
  assert jnp.mean(bias_E) == pytest.approx(0, abs=1e-6)
  routing = route(logits_TE, router, bias_E)
  scores_TE = 1 / (1 + np.exp(-np.float64(logits_TE)))
  expected_TX = np.take_along_axis(scores_TE, np.asarray(routing.experts_TX), axis=1)
  np.testing.assert_allclose(routing.weights_TX, expected_TX, atol=SAME_FLOAT32)


def test_one_update_of_the_bias_moves_by_the_rate():
  found = balance.updated_bias(jnp.asarray([0.5, -0.5, 0.0]), jnp.asarray([9.0, 3.0, 3.0]), 0.1)
  moved = np.array([0.4, -0.4, 0.1])
  np.testing.assert_allclose(found, moved - moved.mean(), atol=SAME_FLOAT32)


def test_statistics_are_counted(rng):
  logits_TE, _ = _routed(rng)
  experts_TX = np.stack([np.zeros(TOKENS, int), 1 + np.arange(TOKENS) % 4], 1)  # 5 is never chosen
  weights_TX = np.float32(rng.random((TOKENS, CHOICES)))
  routing = Routing(experts_TX=jnp.asarray(experts_TX), weights_TX=jnp.asarray(weights_TX))
  kept_TX = rng.random((TOKENS, CHOICES)) < 0.8
  kept_TX[0] = False

  def usage(part):
    own = jax.tree.map(lambda a: a[part], routing)
    return _usage(logits_TE[part], own, kept_TX=jnp.asarray(kept_TX[part]))

  parts = usage(slice(0, 17)), usage(slice(17, None))
  found = statistics(jax.tree.map(jnp.add, *parts))  # the usages of parts add up
  p_TE = np.exp(np.float64(logits_TE))
  p_TE /= p_TE.sum(1, keepdims=True)
  load_E = np.bincount(experts_TX.ravel(), minlength=EXPERTS)
  mean_E = p_TE.mean(0)
  expected = {
    'max_violation': load_E.max() / load_E.mean() - 1,
    'dead': 1,
    'token_entropy': -(p_TE * np.log(p_TE)).sum(1).mean(),
    'mean_entropy': -(mean_E * np.log(mean_E)).sum(),
    'top_weight': weights_TX[:, 0].mean(),
    'z': np.sqrt(np.mean(np.log(np.exp(np.float64(logits_TE)).sum(1)) ** 2)),
    'dropped': 1 - kept_TX.mean(),
  }
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert found[name] == pytest.approx(value, rel=1e-4), name
