"""Balance in training: losses and biases against numpy layer by layer, and that tokens spread."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import logsumexp, softmax

from model import checkpoint, stacked
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import RoutedConfig
from model.train import loop, optimizer
from model.train import step as step_lib
from model.train.data import Batch, PackedDataset
from model.train.loop import FitConfig
from model.train.objectives import CrossEntropy, Models, Network
from model.train.routing import Balanced
from model.train.step import StepConfig, Task
from model.transformer import Context, Transformer, parameters
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


def _model(layers=3, dense=True, **changes) -> Transformer:
  """Routed layers after a dense one, whose routers prefer the first experts."""
  routed = dataclasses.replace(LAYER, ffn=dataclasses.replace(ROUTED, **changes))
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


def _read(model, tokens_BT):
  """What each feed-forward network reads."""
  context, x_BTD, found = Context.of(model.config, tokens_BT), model.embed(tokens_BT), []
  for block in model.layers:
    x_BTD, _, z_BTD = context.run_and_read(block, x_BTD)
    found.append(z_BTD)
  return found


def _by_hand(model, batch):
  """The losses of each routed layer in float64, of the tokens with a label."""
  mask, found = np.asarray(batch.labels_BT >= 0).ravel(), []
  for block, z_BTD in zip(model.layers, jax.jit(lambda t: _read(model, t))(batch.tokens_BT)):
    if isinstance(block.layer.ffn, RoutedConfig):
      router, z_TD = block.ffn.router, np.float64(z_BTD).reshape(mask.size, -1)[mask]
      logits_TE = z_TD @ np.float64(router.weight.get_value()) + np.float64(router.bias.get_value())
      scores_TE = softmax(logits_TE, 1)
      if block.ffn.choice_bias is not None:
        scores_TE = scores_TE + np.float64(block.ffn.choice_bias.get_value())
      chosen = np.argsort(-scores_TE, 1)[:, :CHOICES]
      load_E = np.bincount(chosen.ravel(), minlength=EXPERTS)
      mean_E = softmax(logits_TE, 1).mean(0)
      found.append(
        {
          'balance_loss': EXPERTS * (load_E / load_E.sum() * mean_E).sum(),
          'z_loss': np.square(logsumexp(logits_TE, 1)).mean(),
          'max_violation': load_E.max() / load_E.mean() - 1,
          'load': load_E,
        }
      )
  return found


def test_losses_and_loads_are_those_of_every_routed_layer(rng):
  model, batch = _model(), _batch(rng)
  objective = Balanced(balance=0.3, z=0.02)
  found = jax.jit(lambda batch: _sums(model, batch, objective))(batch)
  plain = jax.jit(lambda batch: _sums(model, batch, CrossEntropy()))(batch)['loss']
  layers, tokens = _by_hand(model, batch), int((batch.labels_BT >= 0).sum())
  reported = objective.report(jax.tree.map(lambda value: value / tokens, found))
  assert list(reported['experts']) == ['layers.1.ffn', 'layers.2.ffn'] and len(layers) == 2
  for name in ('balance_loss', 'z_loss', 'max_violation'):
    expected = [layer[name] for layer in layers]
    own = [float(layer[name]) for layer in reported['experts'].values()]
    np.testing.assert_allclose(own, expected, rtol=TOLERANCE)
    assert float(reported[name]) == pytest.approx(np.mean(expected), rel=TOLERANCE), name
  for layer, used in zip(layers, found['experts'].values()):
    np.testing.assert_array_equal(used['load'], layer['load'])
  extra = sum(0.3 * layer['balance_loss'] + 0.02 * layer['z_loss'] for layer in layers)
  assert float(found['cross_entropy']) == pytest.approx(float(plain), rel=TOLERANCE)
  assert float(found['loss']) == pytest.approx(float(plain) + tokens * extra, rel=TOLERANCE)


@pytest.mark.parametrize('remat', ['none', 'block'])
@pytest.mark.quick(remat=('block',))
@pytest.mark.slow
def test_a_loop_over_the_layers_gives_the_same_losses_and_gradients(rng, remat):
  model, batch, objective = (
    _model(layers=2, dense=False),
    _batch(rng),
    Balanced(balance=0.3, z=0.02),
  )

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


def _run(model, batch, objective, updates=1, config=None, tx=None):
  """The state after some updates, and what each of them reported."""
  tx = tx or optimizer.make(
    optimizer.OptimizerConfig(steps=updates, learning_rate=2e-2, decay='constant')
  )
  setup, state, frozen = step_lib.init(model, tx, Task(objective=objective), config)
  step, found = step_lib.make_step(setup, state), []
  for _ in range(updates):
    state, metrics = step(state, frozen, batch)
    found.append(jax.tree.map(np.asarray, metrics))
  return state, found


def _trained(model, batch, objective):
  return _run(model, batch, objective, 40, StepConfig(accumulation=2))[1]


@pytest.mark.slow
def test_training_learns_and_spreads_the_tokens_over_the_experts(rng):
  model, batch = _model(layers=1, dense=False), _batch(rng, rows=16)
  with_loss = _trained(model, batch, Balanced(balance=0.3))
  without = _trained(model, batch, Balanced(balance=0.0, z=0.0))
  assert with_loss[-1]['cross_entropy'] < 0.3 * with_loss[0]['cross_entropy']
  assert with_loss[0]['max_violation'] > 0.5
  assert with_loss[-1]['max_violation'] < without[-1]['max_violation'] / 2
  assert with_loss[-1]['balance_loss'] < 1.05


@pytest.mark.slow
def test_micro_batches_have_the_losses_and_gradients_of_the_batch(rng):
  """The balance loss of each part with the part's own load would be another, as shown."""
  model, objective = _model(layers=1, dense=False), Balanced(balance=3.0, z=0.1)
  batch = _batch(rng)
  labels_BT = batch.labels_BT.at[:3, 2:].set(-1)  # some parts have fewer labels
  batch = dataclasses.replace(batch, labels_BT=labels_BT)
  sgd = optax.sgd(1.0)
  expected, (whole,) = _run(model, batch, objective, tx=sgd)
  found, (parts,) = _run(model, batch, objective, config=StepConfig(accumulation=4), tx=sgd)
  assert float(parts['loss']) == pytest.approx(float(whole['loss']), rel=TOLERANCE)
  for a, b in zip(jax.tree.leaves(parts['experts']), jax.tree.leaves(whole['experts'])):
    np.testing.assert_allclose(a, b, rtol=TOLERANCE)
  for path, b in expected.trained.items():
    scale = np.abs(b - parameters(model)[path].get_value()).max()
    np.testing.assert_allclose(found.trained[path], b, atol=TOLERANCE * scale + 1e-6, err_msg=path)
  part = lambda i: jax.tree.map(lambda a: a[i::4], batch)
  one = jax.jit(lambda piece: _sums(model, piece, objective)['loss'])
  sums = [one(part(i)) for i in range(4)]
  own = float(sum(sums)) / int((batch.labels_BT >= 0).sum())
  assert own > float(whole['loss']) + 0.01


@pytest.mark.parametrize('way', [{}, {'accumulation': 2, 'remat': 'block'}], ids=str)
@pytest.mark.quick(way=({'accumulation': 2, 'remat': 'block'},))
def test_an_update_moves_the_biases_by_the_load_of_the_batch_alone(rng, way):
  """Once, whatever is computed again; by no gradient, optimizer or weight decay."""
  model, batch = _model(layers=2, dense=False, choice_bias=True), _batch(rng)
  for block in model.layers:
    block.ffn.choice_bias.set_value(jnp.asarray([0.2, -0.2, 0.1, -0.1]))
  before = {f'layers.{l}.ffn.choice_bias': np.float32([0.2, -0.2, 0.1, -0.1]) for l in (0, 1)}
  expected = {}
  for (path, bias_E), layer in zip(before.items(), _by_hand(model, batch)):
    moved_E = bias_E + 0.05 * np.sign(layer['load'].mean() - layer['load'])
    expected[path] = moved_E - moved_E.mean()
  objective = Balanced(balance=0.1, bias_rate=0.05)
  state, _ = _run(model, batch, objective, config=StepConfig(**way))
  assert not set(state.buffers) & set(state.trained)
  if way:  # both layers are in one array
    (biases_LE,) = state.buffers.values()
    np.testing.assert_allclose(biases_LE, np.stack(list(expected.values())), atol=1e-6)
  else:
    assert set(state.buffers) == set(expected)
    for path, bias_E in expected.items():
      np.testing.assert_allclose(state.buffers[path], bias_E, atol=1e-6)
  assert Balanced().updated(before, {'experts': {}}) == before  # without a rate they stay


@pytest.mark.slow
def test_biases_of_stacked_layers_move_as_those_of_plain_ones(rng):
  model, batch = _model(choice_bias=True), _batch(rng)
  objective = Balanced(balance=0.0, bias_rate=0.05)
  plain, _ = _run(model, batch, objective)
  state, (metrics,) = _run(stacked.stack(model), batch, objective, config=StepConfig(scan=True))
  (path,) = state.buffers
  assert path == 'layers.1.blocks.0.ffn.choice_bias'
  np.testing.assert_array_equal(state.buffers[path], np.stack(list(plain.buffers.values())))
  assert metrics['experts']['layers.1.blocks.0.ffn']['load'].shape == (2, EXPERTS)


def test_the_bias_has_no_gradient_and_is_in_no_weight(rng):
  model, batch = _model(layers=1, dense=False, choice_bias=True), _batch(rng)
  graphdef, state = nnx.split(model)
  loss = lambda state: _sums(nnx.merge(graphdef, state), batch, Balanced())['loss']
  slopes = nnx.merge(graphdef, jax.jit(jax.grad(loss))(state)).layers[0].ffn
  np.testing.assert_array_equal(slopes.choice_bias.get_value(), 0)
  assert np.abs(slopes.router.weight.get_value()).max() > 0
  ffn, x_BTD = model.layers[0].ffn, jnp.asarray(rng.standard_normal((1, 5, 16)), jnp.float32)
  of_ffn, _ = nnx.split(ffn)
  run = jax.jit(lambda state: nnx.merge(of_ffn, state)(x_BTD))
  expected_BTD = run(nnx.state(ffn))
  ffn.choice_bias.set_value(jnp.full(EXPERTS, 0.7))  # changes no choice
  np.testing.assert_array_equal(run(nnx.state(ffn)), expected_BTD)
  ffn.choice_bias.set_value(jnp.asarray([0.0, 0.0, 5.0, 5.0]))  # changes all of them
  routing = ffn.route(x_BTD[0])
  assert set(np.ravel(routing.experts_TX)) == {2, 3}
  scores_TE = softmax(np.float64(ffn.scores(x_BTD[0])), 1)[:, 2:]
  expected_TX = -np.sort(-scores_TE / scores_TE.sum(1, keepdims=True), 1)
  np.testing.assert_allclose(-np.sort(-routing.weights_TX, 1), expected_TX, rtol=TOLERANCE)


def test_the_bias_is_saved_resumed_and_left_by_evaluation(rng, tmp_path):
  model = _model(layers=1, dense=False, choice_bias=True)
  documents = [[(start + i) % 31 for i in range(40)] for start in range(12)]
  data = PackedDataset.from_ids(documents, eos_id=31, seq_len=12, batch_size=4, seed=0)
  task = Task(objective=Balanced(balance=0.0, bias_rate=0.01))

  def fit(folder, data=data):
    config = FitConfig(
      optimizer=optimizer.OptimizerConfig(steps=4, learning_rate=1e-2), checkpoint_every=2
    )
    return loop.fit(model, data, config, task=task, folder=folder, progress=False)

  bias_E = fit(tmp_path / 'run').model.layers[0].ffn.choice_bias.get_value()
  assert np.abs(bias_E).max() > 0.005
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')
  resumed = fit(tmp_path / 'run')
  np.testing.assert_array_equal(resumed.model.layers[0].ffn.choice_bias.get_value(), bias_E)
  assert len(resumed.records[-1]['experts']['layers.0.ffn']['load']) == EXPERTS
  loop.mean_nll(resumed.model, data)
  np.testing.assert_array_equal(resumed.model.layers[0].ffn.choice_bias.get_value(), bias_E)
  checkpoint.save(tmp_path / 'model', resumed.model)
  loaded = checkpoint.load(tmp_path / 'model')
  np.testing.assert_array_equal(loaded.layers[0].ffn.choice_bias.get_value(), bias_E)


@pytest.mark.slow
def test_the_bias_evens_out_the_load(rng):
  model, batch = _model(layers=1, dense=False, choice_bias=True), _batch(rng, rows=16)
  found = _trained(model, batch, Balanced(balance=0.0, z=0.0, bias_rate=0.02))
  assert found[0]['max_violation'] > 0.5 and found[-1]['max_violation'] < 0.2


def test_layers_that_collapse_on_different_experts_are_not_balanced(rng):
  """Each layer has its own loss, E / k; pooled, two such layers look even."""
  model, batch = _model(layers=2, dense=False), _batch(rng)
  for block, far in zip(model.layers, ([60, 60, -60, -60], [-60, -60, 60, 60])):
    block.ffn.router.bias.set_value(jnp.asarray(far, jnp.float32))
    block.ffn.router.weight.set_value(jnp.zeros((16, EXPERTS)))
  objective, tokens = Balanced(), int((batch.labels_BT >= 0).sum())
  sums = jax.jit(lambda batch: _sums(model, batch, objective))(batch)
  reported = objective.report(jax.tree.map(lambda value: value / tokens, sums))
  for layer in reported['experts'].values():
    assert float(layer['balance_loss']) == pytest.approx(EXPERTS / CHOICES, rel=TOLERANCE)
    assert float(layer['dead']) == 2
  loads = [layer['load'] for layer in reported['experts'].values()]
  np.testing.assert_allclose(sum(loads) / 2, 1 / EXPERTS)


def test_a_dense_model_has_nothing_to_balance():
  config = _model(layers=1).config
  with pytest.raises(ValueError, match='no layer of the model has experts'):
    Balanced().check(config, {})
  with pytest.raises(ValueError, match='balance must be a number of at least 0, not -1'):
    Balanced(balance=-1)
  with pytest.raises(ValueError, match='a routed layer has no choice_bias'):
    Balanced(bias_rate=0.1).check(_model().config, {})
