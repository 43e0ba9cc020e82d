"""Twenty updates of each kind of trained array on eight devices, against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from model import adapters, sharding
from model.adapters import AdapterConfig
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.train import step as step_lib
from model.train.data import Batch
from model.train.partition import Selection
from model.train.step import Task
from model.transformer import Transformer, linears
from ops import masked, quantized, sparse
from ops.linear import map_values

RELATIVE = 1e-5  # to the largest entry of an array: float32 sums in another order
UPDATES = 20
GAIN = 8  # of fresh matrices, whose gradients are small
TOKENS = np.arange(64).reshape(8, 8) * 5 % 48
LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=4, kv_heads=2, head_width=8), ffn=FeedForwardConfig(width=64)
)
CONFIG = ModelConfig(family='llama', vocab_size=48, width=32, layers=(LAYER,), max_positions=16)


def _two_of_four(w):
  return sparse.compress(w, sparse.n_of_m_mask(jnp.abs(w), 2, 4), 2, 4)


STORED = {
  'attention.query': lambda w: quantized.quantize(w, 'nf4', group_size=16, double=True),
  'attention.key': lambda w: quantized.quantize(w, 'int8'),
  'attention.output': lambda w: quantized.quantize(w, 'int4', group_size=16, symmetric=False),
  'ffn.up': lambda w: map_values(lambda v: quantized.quantize(v, 'int8'), _two_of_four(w)),
}
LEARNED = {
  'attention.value': lambda w: masked.masked(w, jnp.abs(w) > 0.1),
  'ffn.up': _two_of_four,
}
# Not `QatTensor`: its codes are found anew in each update, so the last bit of a sum may move one.
SCALED = {
  'attention.query': lambda w: quantized.quantize(w, 'int4', group_size=16),
  'ffn.down': lambda w: quantized.quantize(w, 'int8'),
}


def _model(kinds):
  model = Transformer(CONFIG, rngs=nnx.Rngs(0))
  for path, linear in linears(model).items():
    make = jax.jit(kinds.get(path.removeprefix('layers.0.'), lambda w: w))
    linear.weight.set_value(make(GAIN * linear.weight.get_value()))
  return model


def _adapted(kinds, **options):
  config = AdapterConfig(rank=2, alpha=4.0, **options)
  return adapters.attach(_model(kinds), config, key=jax.random.key(1))


PARTITIONS = {
  'values': (lambda: _model(LEARNED), Selection()),
  'part of the values': (lambda: _model({}), Selection(value=('layers.0.ffn.*', 'head.*'))),
  'adapters': (lambda: _adapted(STORED), Selection(value=())),
  'adapters with magnitudes': (lambda: _adapted({}, dora=True), Selection(value=())),
  'scales': (lambda: _model(SCALED), Selection(value=(), scale=('layers.*',))),
}


@functools.cache
def _batch():
  positions = np.broadcast_to(np.arange(8, dtype=np.int32)[None], (8, 8))
  return Batch(
    tokens_BT=TOKENS,
    labels_BT=np.roll(TOKENS, -1, 1),
    segments_BT=np.ones((8, 8), np.int32),
    positions_BT=positions,
  )


def _learned(model, selection, batch):
  rate = 1e-3 if selection.scale else 0.1  # a scale moves all weights of a group
  optimizer = optax.sgd(rate, momentum=0.9)
  setup, state, frozen = step_lib.init(model, optimizer, Task(selection=selection))
  update = step_lib.make_step(setup, state)
  before = jax.tree.map(np.asarray, state.trained)
  for _ in range(UPDATES):
    state, metrics = update(state, frozen, batch)
  return before, jax.tree.map(np.asarray, state.trained), float(metrics['loss'])


@pytest.mark.parametrize('kind', PARTITIONS)
@pytest.mark.quick(kind=('adapters with magnitudes',))
def test_a_mesh_learns_what_one_device_learns(kind):
  make, selection = PARTITIONS[kind]
  before, one, loss = _learned(make(), selection, _batch())
  mesh, model = sharding.make_mesh(data=2, fsdp=2, model=2), make()
  sharding.shard(model, mesh)
  batch = jax.device_put(_batch(), sharding.batch_sharding(mesh))
  _, eight, loss_of_eight = _learned(model, selection, batch)
  assert loss_of_eight == pytest.approx(loss, rel=RELATIVE)
  for name in one:
    moved = np.abs(one[name] - before[name]).max()
    assert moved > 100 * RELATIVE * np.abs(one[name]).max(), f'{name} did not learn'
    np.testing.assert_allclose(
      eight[name], one[name], atol=RELATIVE * np.abs(one[name]).max(), rtol=0, err_msg=name
    )
