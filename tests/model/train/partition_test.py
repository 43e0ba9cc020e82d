"""What is trained and what stays, by roles and layers, on every weight type."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from model import native
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.train import partition as parting
from model.train import step as step_lib
from model.train.data import Batch
from model.train.partition import Selection, partition
from model.train.step import Task
from model.transformer import Transformer, linears, parameters
from ops import adapter_starts, masked, quantized, sparse

WIDTH, RANK, UPDATES = 16, 2, 3


def _model():
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=8), ffn=FeedForwardConfig(width=32)
  )
  config = ModelConfig(
    family='llama', vocab_size=32, width=WIDTH, layers=(layer,) * 2, max_positions=64
  )
  return Transformer(config, rngs=nnx.Rngs(0))


def _replaced(change):
  """A model whose blocks' matrices are changed."""
  model, change = _model(), jax.jit(change)
  for path, linear in linears(model).items():
    if path.startswith('layers.'):
      linear.weight.set_value(change(linear.weight.get_value()))
  return model


def _pruned(w_IO):
  return jnp.where(sparse.unstructured_mask(jnp.abs(w_IO), 0.5, per_output=True), w_IO, 0)


def _two_of_four(w_IO):
  return sparse.compress(w_IO, sparse.n_of_m_mask(jnp.abs(w_IO), 2, 4), 2, 4)


def _adapted(fn):
  return lambda w_IO: adapter_starts.zero(fn(w_IO), RANK, scale=2.0, key=jax.random.key(0))


nf4 = lambda w_IO: quantized.quantize(w_IO, 'nf4', group_size=16, double=True)
MODELS = {
  'dense': (lambda w: w, Selection()),
  'lora': (_adapted(lambda w: w), Selection(value=())),
  'qlora': (_adapted(nf4), Selection(value=())),
  'adapters and norms over nf4': (_adapted(nf4), Selection(value=('*norm*',))),
  'scales of nf4': (
    lambda w: quantized.quantize(w, 'int8'),
    Selection(value=(), scale=('layers.1.*',)),
  ),
  'masked': (lambda w: masked.masked(_pruned(w)), Selection()),
  'lora over masked': (_adapted(lambda w: masked.masked(_pruned(w))), Selection(value=())),
  '2:4': (_two_of_four, Selection()),
  'the second block': (lambda w: w, Selection(value=('layers.1.*',))),
}


def _batch(rng):
  tokens = rng.integers(0, 32, (4, 9)).astype(np.int32)
  positions = np.broadcast_to(np.arange(8, dtype=np.int32), (4, 8))
  return Batch(tokens[:, :-1], tokens[:, 1:], positions, np.ones((4, 8), np.int32))


def _bytes(arrays):
  return {name: np.asarray(array).tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.quick(name=('adapters and norms over nf4', 'scales of nf4', 'lora over masked', '2:4'))
def test_every_array_is_on_one_side_and_the_model_comes_back(name):
  change, selection = MODELS[name]
  model = _replaced(change)
  structure, trained, frozen = partition(model, selection)
  assert not trained.keys() & frozen.keys()
  arrays, _ = native.flatten(model)
  assert arrays.keys() == trained.keys() | frozen.keys()
  assert all(arrays[name] is array for name, array in {**trained, **frozen}.items())
  again, _ = native.flatten(structure.model(arrays))
  assert _bytes(again) == _bytes(arrays)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.quick(name=('scales of nf4', 'lora over masked'))
def test_an_update_changes_what_is_trained_and_nothing_else(rng, name):
  change, selection = MODELS[name]
  model, batch = _replaced(change), _batch(rng)
  before = _bytes(native.flatten(model)[0])
  optimizer = optax.adam(1e-2, eps=1e-20)  # the gradients of a fresh model's queries are tiny
  setup, state, frozen = step_lib.init(model, optimizer, Task(selection=selection))
  step = step_lib.make_step(setup, state)
  losses = []
  for _ in range(UPDATES):
    state, metrics = step(state, frozen, batch)
    losses.append(float(metrics['loss']))
  after = native.flatten(setup.model(state.trained, frozen))[0]
  changed = {name for name, array in _bytes(after).items() if array != before[name]}
  assert changed == set(state.trained)
  assert losses[-1] < losses[0]
  for name, array in frozen.arrays.items():
    assert after[name].dtype == array.dtype
  assert _bytes(native.flatten(model)[0]) == before


def test_the_state_of_an_adapter_is_that_of_the_adapter_alone():
  model = _replaced(_adapted(nf4))
  optimizer = optax.adam(1e-3)
  _, state, _ = step_lib.init(model, optimizer, Task(selection=Selection(value=())))
  sizes = [sum(w.get_value().shape) * RANK for path, w in parameters(model).items() if _block(path)]
  floats = 3 * sum(sizes)  # a value and two moments each
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == 4 * floats + 2 * 4  # two counters


def _block(path):
  return path.startswith('layers.') and path.endswith('.weight')


@pytest.mark.parametrize('name', ['masked', '2:4'])
@pytest.mark.quick(name=('2:4',))
def test_zeros_stay_zero_under_a_mask_and_in_n_of_m(rng, name):
  change, selection = MODELS[name]
  model = _replaced(change)
  setup, state, frozen = step_lib.init(model, optax.adam(1e-2), Task(selection=selection))
  step = step_lib.make_step(setup, state)
  for _ in range(UPDATES):
    state, _ = step(state, frozen, _batch(rng))
  trained = linears(setup.model(state.trained, frozen))
  for path, linear in linears(model).items():
    if path.startswith('layers.'):
      zeros = np.asarray(linear.weight.get_value().dense()) == 0
      now = np.asarray(trained[path].weight.get_value().dense())
      assert zeros.mean() == pytest.approx(0.5)
      np.testing.assert_array_equal(now == 0, zeros)


def test_what_cannot_be_trained_is_named():
  codes = _replaced(nf4)
  with pytest.raises(ValueError, match=r'layers\.0\.\S+\.values holds codes \(uint8\), which'):
    partition(codes, Selection())
  with pytest.raises(ValueError, match=r'layers\.0\.\S+\.scales\.codes is int8: only'):
    partition(codes, Selection(value=(), scale=('layers.0.*',)))
  with pytest.raises(ValueError, match=r'nothing to train'):
    partition(codes, Selection(value=()))
  with pytest.raises(ValueError, match=r"no parameter matches 'layers\.7\.\*'; there are"):
    partition(codes, Selection(value=('layers.7.*',)))
  with pytest.raises(ValueError, match=r'layers\.0\.\S+weight is pruned .* `masked\.masked`'):
    partition(_replaced(_pruned), Selection())
  partition(_replaced(_pruned), Selection(value=('*norm*',)))  # pruned weights may stay frozen


def test_the_arrays_have_the_order_of_the_state():
  model = _replaced(_adapted(nf4))
  state = nnx.split(model)[1]
  found = list(parting.leaves(state))
  assert [leaf.array for leaf in found] == jax.tree.leaves(state)
  assert len({leaf.name for leaf in found}) == len(found)
