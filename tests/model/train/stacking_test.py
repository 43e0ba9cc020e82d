"""Training with layers in loops: stacked once before the first update, and ordinary at the end."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from model import adapters, presets, sharding, stacked
from model.adapters import AdapterConfig
from model.train import loop
from model.train import step as step_lib
from model.train.data import PackedDataset
from model.train.distill import TEACHER, Distillation
from model.train.features import Hidden, Relations
from model.train.loop import FitConfig
from model.train.optimizer import OptimizerConfig
from model.train.partition import Selection
from model.train.step import StepConfig, Task
from model.transformer import Transformer, linears, parameters
from ops import quantized

TOLERANCE = 1e-4  # of the largest entry of an array: float32 sums in another order
CONFIG = presets.preset('tiny-llama').replace(vocab_size=32)


def _model(depth=4, seed=0):
  config = CONFIG.replace(layers=CONFIG.layers[:1] * depth)
  return Transformer(config, rngs=nnx.Rngs(seed))


def _dataset():
  rng = np.random.default_rng(0)
  documents = [rng.integers(1, 32, rng.integers(5, 30)) for _ in range(40)]
  return PackedDataset.from_ids(documents, eos_id=0, seq_len=16, batch_size=4)


def _qlora(model):
  quantize = jax.jit(lambda w_IO: quantized.quantize(w_IO, 'nf4', group_size=8))
  for linear in linears(model).values():
    linear.weight.set_value(quantize(linear.weight.get_value()))
  return adapters.attach(model, AdapterConfig(rank=2, alpha=4.0), key=jax.random.key(1))


def _distillation(teacher):
  features = (Hidden(weight=0.5), Relations(heads=2, student_layer=2, teacher_layer=1))
  return Task(objective=Distillation(features=features), references={TEACHER: teacher})


TASKS = {
  'one layer': (lambda: _model(3), Task(selection=Selection(value=('layers.2.*', 'final_norm.*')))),
  'adapters': (lambda: _qlora(_model(3)), Task(selection=Selection(value=()))),
  'distillation': (lambda: _model(3), _distillation(_model(3, seed=5))),
}


def _learned(model, task, **step):
  config = FitConfig(
    optimizer=OptimizerConfig(steps=3, learning_rate=1e-2, eps=1e-4), step=StepConfig(**step)
  )
  return loop.fit(model, _dataset(), config, task=task, progress=False)


@pytest.mark.parametrize('name', TASKS)
@pytest.mark.quick(name=('one layer',))
def test_a_run_in_loops_ends_as_one_without(name):
  make, task = TASKS[name]
  want, got = (_learned(make(), task, **step) for step in ({}, {'scan': True, 'remat': 'block'}))
  assert not stacked.has_stacks(got.model)
  for a, b in zip(got.records, want.records, strict=True):
    assert a['loss'] == pytest.approx(b['loss'], rel=TOLERANCE)
  found, start = parameters(got.model), parameters(make())
  for path, param in parameters(want.model).items():
    arrays = [jax.tree.leaves(where[path].get_value()) for where in (found, start)]
    for ours, theirs, before in zip(arrays[0], jax.tree.leaves(param.get_value()), arrays[1]):
      scale = float(np.abs(theirs).max()) + 1e-12
      np.testing.assert_allclose(ours / scale, theirs / scale, atol=TOLERANCE, err_msg=path)
      frozen = name == 'one layer' and not path.startswith(('layers.2', 'final_norm'))
      assert not frozen or np.array_equal(ours, before), path


def test_layers_are_apart_where_other_arrays_of_them_are_trained():
  task = Task(selection=Selection(value=('layers.2.ffn.up.*',)))
  setup, state, frozen = step_lib.init(_model(), optax.sgd(1.0), task, StepConfig(scan=True))
  model = setup.model(state.trained, frozen)
  assert [getattr(layer, 'repeats', 1) for layer in model.layers] == [2, 1, 1]
  assert list(state.trained) == ['layers.1.ffn.up.weight']


def test_the_state_has_as_many_arrays_at_any_depth():
  config = StepConfig(remat='block')
  states = [step_lib.init(_model(depth), optax.adam(1.0), None, config)[1] for depth in (2, 6)]
  assert len(jax.tree.leaves(states[0])) == len(jax.tree.leaves(states[1]))


def test_stacks_keep_the_places_of_their_layers_on_a_mesh():
  mesh, model = sharding.make_mesh(data=2, fsdp=2, model=2), _model()
  sharding.shard(model, mesh)
  _, state, _ = step_lib.init(model, optax.adam(1.0), None, StepConfig(scan=True))
  up = state.trained['layers.0.blocks.0.ffn.up.weight']
  assert up.sharding.spec == PartitionSpec(None, 'fsdp', 'model')
