"""Slopes of gates against finite differences and against gradients of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.compress import gates

# Central differences of a float32 loss of order 5; the step is in the gate.
STEP, TOLERANCE = 0.05, 3e-3


class Case:
  """A model, one row of tokens, its loss, and the gradients by weights and by gates."""

  def __init__(self, model):
    self.model = model
    self.tokens_BT = np.random.default_rng(3).integers(
      0, model.config.vocab_size, (3, 12), np.int32
    )
    self.loss = jax.jit(gates.GatedLoss.of(model))
    self.values, self.open = gates.values_of(model), gates.ones(model.config)
    self._both = jax.jit(jax.grad(gates.GatedLoss.of(model), argnums=(0, 1)))
    self.by_weights, self.slopes = self.gradients(0)

  def gradients(self, row):
    return self._both(self.values, self.open, self.tokens_BT[row : row + 1])


@pytest.fixture(scope='module', params=['qwen3', 'gpt2'])
def case(request, tiny_of):
  return Case(tiny_of(request.param))


def test_the_slope_of_every_kind_of_gate_is_that_of_finite_differences(case):
  for unit, l, i in (('F', 0, 5), ('F', 1, 17), ('K', 1, 1), ('D', 0, 11), ('D', 0, 30)):
    losses = []
    for sign in (1, -1):
      opened = jax.tree.map(lambda gate: gate, case.open)
      opened[unit][l] = opened[unit][l].at[i].add(sign * STEP)
      losses.append(float(case.loss(case.values, opened, case.tokens_BT[:1])))
    expected = (losses[0] - losses[1]) / (2 * STEP)
    assert float(case.slopes[unit][l][i]) == pytest.approx(expected, abs=TOLERANCE), (unit, l, i)


def test_open_gates_change_nothing(case, logits_of):
  tokens_BT = case.tokens_BT[:1]
  log_p_BTV = jax.nn.log_softmax(jnp.asarray(logits_of(case.model, tokens_BT))[:, :-1])
  expected = -float(jnp.take_along_axis(log_p_BTV, tokens_BT[:, 1:, None], -1).mean())
  found = float(case.loss(case.values, case.open, tokens_BT))
  assert found == pytest.approx(expected, abs=1e-5)


def test_a_slope_is_the_sum_of_weights_times_gradients(case):
  """By the chain rule, over the rows of the matrix that reads the unit."""
  for l, layer in enumerate(case.model.config.layers):
    paths = f'layers.{l}.ffn.down.weight', f'layers.{l}.attention.output.weight'
    products = [np.asarray(case.values[p] * case.by_weights[p], np.float64) for p in paths]
    np.testing.assert_allclose(case.slopes['F'][l], products[0].sum(1), atol=1e-5)
    expected_K = products[1].reshape(layer.mixer.kv_heads, -1).sum(1)
    np.testing.assert_allclose(case.slopes['K'][l], expected_K, atol=1e-5)


def test_magnitudes_are_averaged_over_rows(case):
  found = gates.slopes(case.model, case.tokens_BT)
  each = [case.gradients(row)[1] for row in range(3)]
  for unit in ('F', 'K', 'D'):
    expected = np.mean([np.abs(one[unit][0]) for one in each], 0)
    np.testing.assert_allclose(found[unit][0], expected, rtol=1e-3, atol=1e-6)
