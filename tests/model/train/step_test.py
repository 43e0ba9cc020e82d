"""Tests the compiled update against a plain gradient of all logits, and against its split forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.train import step as step_lib
from model.train.data import PackedDataset
from model.train.step import StepConfig
from model.transformer import Transformer, parameters
from ops import activations, quantized, sparse

# Float32 sums in another order, relative to gradients of about 0.1.
TOLERANCE = {'rtol': 1e-4, 'atol': 1e-6}
BFLOAT16_LOSS = 2e-2  # 8 bits of mantissa over two layers, in nats


def _model(vocab_size=32, tied=False):
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=8), ffn=FeedForwardConfig(width=24)
  )
  config = ModelConfig(
    family='llama',
    vocab_size=vocab_size,
    width=16,
    layers=(layer,) * 2,
    max_positions=64,
    tied=tied,
  )
  return Transformer(config, rngs=nnx.Rngs(0))


def _batch(rng, rows=8, length=12):
  """Builds packed documents whose label counts differ a lot from row to row."""
  documents = [rng.integers(1, 32, rng.integers(1, 20)) for _ in range(40)]
  dataset = PackedDataset.from_ids(documents, eos_id=0, seq_len=length, batch_size=rows)
  batch = dataset.batch(0)
  labels = batch.labels_BT.copy()
  for row in range(rows):
    labels[row, : row * length // rows] = -1
  return jax.tree.map(jnp.asarray, dataclasses.replace(batch, labels_BT=labels))


def _updated(model, batch, config, optimizer=None, updates=1, task=None):
  optimizer = optimizer or optax.sgd(1.0)
  setup, state, frozen = step_lib.init(model, optimizer, task, config)
  step = step_lib.make_step(setup, state)
  for _ in range(updates):
    state, metrics = step(state, frozen, batch)
  return state, metrics


def _values(model):
  return {path: param.get_value() for path, param in parameters(model).items()}


def _named(graphdef, params):
  return _values(nnx.merge(graphdef, params))


def _assert_close(got, want):
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **TOLERANCE)


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.quick(tied=(True,))
def test_the_gradient_equals_that_of_unchunked_logits(rng, tied):
  model, batch = _model(tied=tied), _batch(rng)
  graphdef, params = nnx.split(model)

  def mean_loss(params):
    logits = nnx.merge(graphdef, params)(
      batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT
    )
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch.labels_BT, 0))
    real = batch.labels_BT >= 0
    return jnp.sum(jnp.where(real, nll, 0.0)) / jnp.sum(real)

  loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
  state, metrics = _updated(model, batch, StepConfig(loss_chunk=16))
  moved = jax.tree.map(jnp.subtract, _values(model), state.trained)
  _assert_close(moved, _named(graphdef, gradient))
  assert metrics['loss'] == pytest.approx(float(loss), rel=1e-5)
  assert metrics['grad_norm'] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
  assert int(metrics['tokens']) == int(jnp.sum(batch.labels_BT >= 0))
  assert int(state.step) == 1


@pytest.mark.parametrize('n', [2, 4, 8])
@pytest.mark.quick(n=(4,))
def test_accumulation_equals_one_big_batch(rng, n):
  model, batch = _model(), _batch(rng)
  counts = np.asarray(jnp.sum(batch.labels_BT >= 0, axis=1))
  assert len(set(counts)) > 4  # so that a mean of means would differ
  whole, whole_metrics = _updated(model, batch, StepConfig())
  parts, parts_metrics = _updated(model, batch, StepConfig(accumulation=n))
  _assert_close(parts.trained, whole.trained)
  for name in whole_metrics:
    assert float(parts_metrics[name]) == pytest.approx(float(whole_metrics[name]), rel=1e-5)


@pytest.mark.parametrize('how', [{'scan': True}, {'remat': 'block'}, {'remat': 'dots'}])
@pytest.mark.quick(how=({'remat': 'dots'},))
def test_loops_and_rematerialization_give_the_same_update(rng, how):
  model, batch = _model(), _batch(rng)
  plain, _ = _updated(model, batch, StepConfig())
  state, _ = _updated(model, batch, StepConfig(**how))
  in_layers = {name: a for name, a in plain.trained.items() if name.startswith('layers.')}
  first = {name.replace('layers.0.', 'layers.0.blocks.0.') for name in in_layers if '.0.' in name}
  assert state.trained.keys() == first | (plain.trained.keys() - in_layers.keys())
  for name in first:
    layers = [name.replace('layers.0.blocks.0.', f'layers.{l}.') for l in range(2)]
    np.testing.assert_allclose(
      state.trained[name], jnp.stack([plain.trained[layer] for layer in layers]), **TOLERANCE
    )


def test_packed_documents_have_the_same_loss_as_alone(rng):
  model = _model()
  documents = [rng.integers(1, 32, size) for size in (3, 5, 4, 7)]
  together = PackedDataset.from_ids(documents, eos_id=0, seq_len=30, batch_size=1)
  alone = [PackedDataset.from_ids([d], eos_id=0, seq_len=30, batch_size=1) for d in documents]
  setup, state, frozen = step_lib.init(model, optax.sgd(1.0))
  key = jax.random.key(0)
  nll = lambda dataset: float(setup.sums(state.trained, frozen, dataset.batch(0), key)['loss'])
  assert nll(together) == pytest.approx(sum(map(nll, alone)), rel=1e-5)


def test_mixed_precision_keeps_float32_masters(rng):
  model, batch = _model(), _batch(rng)
  rate = 1e-5  # lost against weights near 1 in bfloat16, kept in float32
  state, metrics = _updated(
    model, batch, StepConfig(compute_dtype='bfloat16'), optax.sgd(rate), updates=3
  )
  exact, exact_metrics = _updated(model, batch, StepConfig(), optax.sgd(rate), updates=3)
  before = _values(model)
  assert {leaf.dtype for leaf in state.trained.values()} == {jnp.dtype('float32')}
  assert float(metrics['loss']) != float(exact_metrics['loss'])
  assert float(metrics['loss']) == pytest.approx(float(exact_metrics['loss']), abs=BFLOAT16_LOSS)
  scale = lambda arrays: np.asarray(arrays['final_norm.scale'])
  moved, want = scale(state.trained) - scale(before), scale(exact.trained) - scale(before)
  assert np.abs(want).max() > 0 and np.corrcoef(moved, want)[0, 1] > 0.9


def _noting(optimizer, traces: list) -> optax.GradientTransformation:
  """An optimizer that adds to a list whenever its update is traced."""
  note = lambda updates, params: traces.append(None) or updates
  return optax.chain(optimizer, optax.stateless(note))


def test_init_copies_parameters_and_the_step_donates_its_state(rng):
  model, traces = _model(), []
  setup, state, frozen = step_lib.init(model, _noting(optax.adam(1e-3), traces))
  step = step_lib.make_step(setup, state)
  new, _ = step(state, frozen, _batch(rng))
  assert all(leaf.is_deleted() for leaf in state.trained.values())
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.split(model)[1]))
  step(new, frozen, _batch(rng))
  assert len(traces) == 1


def test_sharded_parameters_and_batches_give_the_same_update(rng):
  batch = _batch(rng)
  config = StepConfig(accumulation=2)
  optimizer = optax.adam(1e-2)
  want, _ = _updated(_model(), batch, config, optimizer, updates=2)
  mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def place(leaf):
    spec = PartitionSpec(None, 'model') if leaf.ndim == 2 else PartitionSpec()
    return jax.device_put(leaf, NamedSharding(mesh, spec))

  graphdef, params = nnx.split(_model())
  model = nnx.merge(graphdef, jax.tree.map(place, params))
  traces = []
  setup, state, frozen = step_lib.init(model, _noting(optimizer, traces), config=config)
  placed = jax.tree.map(lambda x: x.sharding, state)
  step = step_lib.make_step(setup, state)
  batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec('data')))
  for _ in range(2):
    state, _ = step(state, frozen, batch)
  assert jax.tree.map(lambda x: x.sharding, state) == placed and len(traces) == 1
  for got, expected in zip(jax.tree.leaves(state.trained), jax.tree.leaves(want.trained)):
    # Adam divides by the gradient's size, so rounding errors count most where that is near zero.
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_weights_without_gradients_are_named():
  model = _model()
  model.layers[1].ffn.up.weight = nnx.Param(jnp.zeros((16, 24), jnp.int8))
  with pytest.raises(ValueError, match=r'layers\.1\.ffn\.up\.weight.* is int8'):
    step_lib.init(model, optax.sgd(1.0))


def test_fp8_codes_are_not_trained():
  model = _model()
  up = model.layers[1].ffn.up.weight
  up.set_value(quantized.quantize(up.get_value(), 'fp8_e4m3'))
  with pytest.raises(ValueError, match=r'ffn\.up\.weight\.values holds codes \(float8_e4m3fn\)'):
    step_lib.init(model, optax.sgd(1.0))


@pytest.mark.parametrize('wrap', [lambda w: w, activations.quantize_activations])
def test_pruned_layers_are_not_trained(wrap):
  model = _model()
  down = model.layers[0].ffn.down.weight
  w_IO = down.get_value()
  mask_IO = sparse.unstructured_mask(jnp.abs(w_IO), 0.25, per_output=True)
  down.set_value(wrap(jnp.where(mask_IO, w_IO, 0)))
  with pytest.raises(ValueError, match=r'layers\.0\.ffn\.down\.weight is pruned'):
    step_lib.init(model, optax.sgd(1.0))


def test_zeros_that_are_initial_values_are_trained():
  model = _model()
  block = model.layers[0]
  block.ffn.down.weight.set_value(jnp.zeros_like(block.ffn.down.weight.get_value()))
  up = block.ffn.up.weight
  up.set_value(up.get_value().at[:3].set(0))  # of 16 inputs
  block.attention_norm.scale.set_value(jnp.zeros_like(block.attention_norm.scale.get_value()))
  model.embedding.table.set_value(model.embedding.table.get_value().at[:20].set(0))
  step_lib.init(model, optax.sgd(1.0))


def test_bad_settings_are_named(rng):
  with pytest.raises(ValueError, match="compute_dtype 'float64'"):
    StepConfig(compute_dtype='float64')
  with pytest.raises(ValueError, match="remat 'all' is not one of none, block, dots"):
    StepConfig(remat='all')
  with pytest.raises(ValueError, match='at least 1, not 0'):
    StepConfig(accumulation=0)
  with pytest.raises(ValueError, match='8 rows does not divide into 3'):
    _updated(_model(), _batch(rng), StepConfig(accumulation=3))
