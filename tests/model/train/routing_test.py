"""Balance losses in training: against numpy layer by layer, and that they spread the tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import logsumexp, softmax

from model import stacked
from model.config import ModelConfig
from model.layers.attention import AttentionConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.routed import RoutedConfig
from model.train import optimizer
from model.train import step as step_lib
from model.train.data import Batch
from model.train.objectives import CrossEntropy, Models, Network
from model.train.routing import Balanced
from model.train.step import StepConfig, Task
from model.transformer import Context, Transformer
from ops.moe import Router

# Float32 sums in another order, relative.
TOLERANCE = 1e-4
EXPERTS, CHOICES = 4, 2
ROUTED = RoutedConfig(
  experts=EXPERTS,
  width=12,
  router=Router(choices=CHOICES, renormalize=True),
  router_bias=True,
  shared_width=8,
)
LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=8), ffn=FeedForwardConfig(width=24)
)


def _model(layers=3, dense=True) -> Transformer:
  """Routed layers after a dense one, whose routers prefer the first experts."""
  routed = dataclasses.replace(LAYER, ffn=ROUTED)
  config = ModelConfig(
    family='llama',
    vocab_size=32,
    width=16,
    layers=(LAYER,) * dense + (routed,) * (layers - dense),
    max_positions=64,
  )
  model = Transformer(config, rngs=nnx.Rngs(0))
  for block in model.layers[dense:]:
    block.ffn.router.weight.set_value(30 * block.ffn.router.weight.get_value())
    block.ffn.router.bias.set_value(jnp.asarray([3.0, 2.0, 0.0, 0.0]))
  return model


def _batch(rng, rows=8, length=12) -> Batch:
  """Rows that count upwards; some labels are missing."""
  start_B = rng.integers(0, 32, (rows, 1))
  tokens_BT = (start_B + np.arange(length)) % 32
  labels_BT = np.where(rng.random((rows, length)) < 0.8, (tokens_BT + 1) % 32, -1)
  return Batch(jnp.int32(tokens_BT), jnp.int32(labels_BT), None, None)


def _sums(model, batch, objective, remat=None):
  models = Models(Network(model, 64, remat), {}, {}, jax.random.key(0))
  return objective(models, batch)


def _by_hand(model, batch):
  """The losses of each routed layer in float64, of the tokens with a label."""
  context, x_BTD = Context.of(model.config, batch.tokens_BT), model.embed(batch.tokens_BT)
  mask, found = np.asarray(batch.labels_BT >= 0).ravel(), []
  for block in model.layers:
    x_BTD, z_BTD = context.run_and_read(block, x_BTD)
    if block.layer.ffn == ROUTED:
      router, z_TD = block.ffn.router, np.float64(z_BTD).reshape(mask.size, -1)[mask]
      logits_TE = z_TD @ np.float64(router.weight.get_value()) + np.float64(router.bias.get_value())
      chosen = np.argsort(-logits_TE, 1)[:, :CHOICES]
      load_E = np.bincount(chosen.ravel(), minlength=EXPERTS)
      mean_E = softmax(logits_TE, 1).mean(0)
      found.append(
        {
          'balance_loss': EXPERTS * (load_E / load_E.sum() * mean_E).sum(),
          'z_loss': np.square(logsumexp(logits_TE, 1)).mean(),
          'max_violation': load_E.max() / load_E.mean() - 1,
        }
      )
  return found


def test_the_sums_are_those_of_every_routed_layer(rng):
  model, batch = _model(), _batch(rng)
  objective = Balanced(balance=0.3, z=0.02)
  found = jax.jit(lambda batch: _sums(model, batch, objective))(batch)
  plain = _sums(model, batch, CrossEntropy())['loss']
  layers, tokens = _by_hand(model, batch), int((batch.labels_BT >= 0).sum())
  assert len(layers) == 2
  for name in ('balance_loss', 'z_loss', 'max_violation'):
    expected = tokens * np.mean([layer[name] for layer in layers])
    assert float(found[name]) == pytest.approx(expected, rel=TOLERANCE), name
  extra = sum(0.3 * layer['balance_loss'] + 0.02 * layer['z_loss'] for layer in layers)
  assert float(found['cross_entropy']) == pytest.approx(float(plain), rel=TOLERANCE)
  assert float(found['loss']) == pytest.approx(float(plain) + tokens * extra, rel=TOLERANCE)


@pytest.mark.parametrize('remat', ['none', 'block'])
def test_a_loop_over_the_layers_gives_the_same_losses_and_gradients(rng, remat):
  model, batch, objective = _model(), _batch(rng), Balanced(balance=0.3, z=0.02)

  def value_and_grad(model, remat):
    graphdef, state = nnx.split(model)
    loss = lambda state: _sums(nnx.merge(graphdef, state), batch, objective, remat)['loss']
    value, slopes = jax.jit(jax.value_and_grad(loss))(state)
    return value, nnx.merge(graphdef, slopes)

  expected, slopes = value_and_grad(model, None)
  found, looped = value_and_grad(stacked.stack(model), remat)
  assert float(found) == pytest.approx(float(expected), rel=TOLERANCE)
  for a, b in zip(
    jax.tree.leaves(nnx.state(stacked.unstack(looped))),
    jax.tree.leaves(nnx.state(slopes)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * np.abs(b).max())


def _trained(model, batch, objective, updates=40):
  config = optimizer.OptimizerConfig(steps=updates, learning_rate=2e-2, decay='constant')
  setup, state, frozen = step_lib.init(
    model, optimizer.make(config), Task(objective=objective), StepConfig(accumulation=2)
  )
  step, found = step_lib.make_step(setup, state), []
  for _ in range(updates):
    state, metrics = step(state, frozen, batch)
    found.append({name: float(value) for name, value in metrics.items()})
  return found


def test_training_learns_and_spreads_the_tokens_over_the_experts(rng):
  model, batch = _model(layers=1, dense=False), _batch(rng, rows=16)
  with_loss = _trained(model, batch, Balanced(balance=0.3))
  without = _trained(model, batch, Balanced(balance=0.0, z=0.0))
  assert with_loss[-1]['cross_entropy'] < 0.3 * with_loss[0]['cross_entropy']
  assert with_loss[0]['max_violation'] > 0.5
  assert with_loss[-1]['max_violation'] < without[-1]['max_violation'] / 2
  assert with_loss[-1]['balance_loss'] < 1.05


def test_a_dense_model_has_nothing_to_balance():
  config = _model(layers=1).config
  with pytest.raises(ValueError, match='no layer of the model has experts'):
    Balanced().check(config, {})
  with pytest.raises(ValueError, match='balance must be a number of at least 0, not -1'):
    Balanced(balance=-1)
