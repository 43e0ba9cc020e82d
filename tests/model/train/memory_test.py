"""Tests the memory plan against the compiler's own figures and against formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import presets, sharding
from model.train import adam8bit, memory, optimizer
from model.train import step as step_lib
from model.train.data import PackedDataset
from model.train.optimizer import OptimizerConfig
from model.train.partition import Selection
from model.train.step import StepConfig, Task
from model.transformer import Transformer, linears
from ops import lora, quantized

RANK = 3


_nf4 = jax.jit(lambda w_IO: quantized.quantize(w_IO, 'nf4', group_size=8))


def _model(adapters=False):
  model = Transformer(presets.preset('tiny-llama'), rngs=nnx.Rngs(0))
  for path, linear in linears(model).items() if adapters else ():
    if path != 'head':
      w = _nf4(linear.weight.get_value())
      inputs, outputs = w.shape
      a_IR, b_RO = jnp.ones((inputs, RANK)), jnp.zeros((RANK, outputs))
      linear.weight.set_value(lora.LoraTensor(w, a_IR, b_RO, 1.0))
  return model


@functools.cache
def _batch(rows=8, length=32):
  ids = [np.arange(1, 200) % 250]
  return PackedDataset.from_ids(ids, eos_id=0, seq_len=length, batch_size=rows).batch(0)


def _compiled(model, name, selection, batch):
  config = OptimizerConfig(name=name, steps=10, learning_rate=1e-3)
  tx = optimizer.make(config)
  setup, state, frozen = step_lib.init(model, tx, Task(selection=selection), StepConfig())
  compiled = step_lib.make_step(setup, state).lower(state, frozen, batch).compile()
  return tx, state, frozen, compiled


@pytest.mark.parametrize('name, adapters', [('adam8bit', False), ('adamw', True)])
@pytest.mark.quick(name=('adamw',))
def test_arguments_are_those_of_the_compiled_update(name, adapters):
  selection = Selection(value=()) if adapters else Selection()
  tx, state, frozen, compiled = _compiled(_model(adapters), name, selection, _batch())
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (state, frozen, _batch()))
  (trained, step), frozen, batch = (shapes[0].trained, shapes[0].step), *shapes[1:]
  opt_state = memory.optimizer_state(tx, trained), step
  found = memory.plan(
    trained=trained, frozen=frozen, opt_state=opt_state, batch=batch, compiled=compiled
  )
  analysis = compiled.memory_analysis()
  assert found.arguments == analysis.argument_size_in_bytes
  assert found.gradients == found.trained == 4 * sum(a.size for a in state.trained.values())
  assert found.total >= analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
  assert found.activations > 0
  before = memory.plan(trained=trained, frozen=frozen, opt_state=opt_state, batch=batch)
  assert before == dataclasses.replace(found, activations=None)
  assert before.total < found.total


def test_adapters_take_the_bytes_of_the_formula():
  model = _model(adapters=True)
  _, state, frozen = step_lib.init(
    model,
    optimizer.make(OptimizerConfig(steps=2, learning_rate=1)),
    Task(selection=Selection(value=())),
  )
  found = memory.plan(
    trained=state.trained, frozen=frozen, opt_state=state.opt_state, batch=_batch()
  )
  layer, width = model.config.layers[0], model.config.width
  mixer = layer.mixer
  heads, keys = mixer.query_heads * mixer.head_width, mixer.kv_heads * mixer.head_width
  sides = 2 * (width + heads) + 2 * (width + keys) + 3 * (width + layer.ffn.width)
  numbers = RANK * sides * len(model.config.layers)
  assert found.trained == 4 * numbers
  assert found.optimizer == 8 * numbers + 2 * 4  # and the counts of Adam and of the schedule
  assert found.batch == 4 * 4 * 8 * 32


@pytest.mark.slow
def test_eight_bit_moments_are_in_the_plan():
  _, state, _ = step_lib.init(
    _model(), optimizer.make(OptimizerConfig(name='adam8bit', steps=2, learning_rate=1))
  )
  want = sum(adam8bit.state_bytes(a.shape) for a in state.trained.values())
  assert memory.nbytes(state.opt_state) == want + 2 * 4


@pytest.mark.slow
def test_sharded_arrays_count_the_share_of_a_device():
  mesh = sharding.make_mesh(data=1, fsdp=2, model=4)
  model = _model()
  sharding.shard(model, mesh)
  batch = jax.device_put(_batch(), sharding.batch_sharding(mesh))
  _, state, frozen, compiled = _compiled(model, 'adamw', Selection(), batch)
  found = memory.plan(
    trained=state.trained,
    frozen=frozen,
    opt_state=(state.opt_state, state.step),
    batch=batch,
    compiled=compiled,
  )
  assert found.arguments == compiled.memory_analysis().argument_size_in_bytes
  assert found.trained < sum(a.nbytes for a in state.trained.values()) / 2


def test_a_plan_is_said_in_words():
  plan = memory.MemoryPlan(trained=2_000_000, frozen=0, optimizer=4_000_000, batch=0, gradients=1)
  assert str(plan).startswith('trained 2.0 MB, frozen 0.0 MB, optimizer 4.0 MB')
  assert str(plan).endswith('in all 6.0 MB') and 'activations' not in str(plan)
