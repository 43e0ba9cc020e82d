"""Tests 8-bit Adam against numpy, its memory by formula, and its quality beside float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from model import presets
from model.train import adam8bit, loop
from model.train.data import PackedDataset
from model.train.optimizer import OptimizerConfig
from model.train.run_folder import RunFolder
from model.transformer import Transformer
from ops import blockwise

DECAYS, EPS = (0.9, 0.95), 1e-8
SHAPES = {'matrix': (16, 700), 'vector': (5000,), 'small': (4095,), 'stack': (2, 8, 256)}
TX = adam8bit.scale_by_adam8bit(*DECAYS, EPS)
update = jax.jit(TX.update)  # compiled once for all tests
O1 = 5e-3  # the loss after training, relative to float32 Adam's


def _encode(x, signed):
  """Codes and scales by a search over the table, block by block."""
  values = blockwise.table(signed)
  bounds = (values[:-1] + values[1:]) / np.float32(2)
  out = np.empty_like(x)
  flat, rows = x.reshape(-1, x.shape[-1]), out.reshape(-1, x.shape[-1])
  for r in range(len(flat)):
    for start in range(0, x.shape[-1], 256):
      block = flat[r, start : start + 256]
      largest = np.abs(block).max()
      scaled = block * (np.float32(1) / max(largest, np.float32(1e-38)))
      codes = np.searchsorted(bounds, np.clip(scaled, -1, 1), side='left')
      if not signed:
        codes[(block > 0) & (codes == 0)] = 1
      rows[r, start : start + 256] = values[codes] * largest
  return out


def _by_numpy(gradients):
  """The directions of the updates of one array, each moment rounded after each update."""
  shape = gradients[0].shape
  m, v, (b1, b2) = np.zeros(shape, np.float32), np.zeros(shape, np.float32), DECAYS
  directions = []
  for n, g in enumerate(gradients, 1):
    m = np.float32(b1) * m + np.float32(1 - b1) * g
    v = np.float32(b2) * v + np.float32(1 - b2) * g * g
    m_hat, v_hat = m / np.float32(1 - b1**n), v / np.float32(1 - b2**n)
    directions.append(m_hat / (np.sqrt(v_hat) + np.float32(EPS)))
    if m.size >= 4096:
      m, v = _encode(m, True), _encode(v, False)
  return directions


def _gradients(rng, count=4):
  scale = lambda shape: np.exp(rng.normal(size=shape) * 2)
  make = lambda shape: (rng.normal(size=shape) * scale(shape)).astype(np.float32)
  return [{name: make(shape) for name, shape in SHAPES.items()} for _ in range(count)]


def _run(gradients, place=lambda x: x):
  params = {name: place(jnp.zeros(shape)) for name, shape in SHAPES.items()}
  state, directions = TX.init(params), []
  for gradient in gradients:
    gradient = {name: place(jnp.asarray(g)) for name, g in gradient.items()}
    direction, state = update(gradient, state)
    directions.append(direction)
  return directions, state


def test_updates_equal_numpy(rng):
  gradients = _gradients(rng)
  directions, state = _run(gradients)
  for name in SHAPES:
    want = _by_numpy([g[name] for g in gradients])
    for got, expected in zip(directions, want):
      # A sum that is rounded in another order may fall on the other side of a bound between two
      # codes; that changes a few elements by one code.
      wrong = ~np.isclose(got[name], expected, rtol=1e-4, atol=1e-6)
      assert wrong.mean() < 1e-3
  assert isinstance(state.first['small'], jax.Array) and state.first['small'].dtype == jnp.float32
  assert int(state.count) == len(gradients)


def test_an_element_whose_gradients_stop_moves_on_by_a_bounded_amount():
  # The square of a gradient that is 3000 times smaller than the largest is below the smallest code.
  g = jnp.full((16, 256), 1e-6).at[:, 0].set(3e-3)
  directions, _ = _run_one([g, *[jnp.zeros_like(g)] * 30])
  assert max(float(jnp.abs(d).max()) for d in directions) < 10


def _run_one(gradients):
  state, directions = TX.init(gradients[0]), []
  for g in gradients:
    direction, state = update(g, state)
    directions.append(direction)
  return directions, state


@pytest.mark.parametrize('shape', [*SHAPES.values(), (1024, 1024), (49_152, 576), (3, 1)])
def test_state_bytes_follow_the_formula(shape):
  tx = adam8bit.scale_by_adam8bit()
  state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(shape, jnp.float32))
  found = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.first, state.second)))
  assert found == adam8bit.state_bytes(shape)
  if shape == (1024, 1024):
    assert found / math.prod(shape) == 2 + 8 / 256


def test_no_float32_copy_of_all_moments_is_held():
  # 32 matrices: their moments would take 64 of them in float32.
  tx = optax.chain(adam8bit.scale_by_adam8bit(), optax.scale(-1e-3))
  params = {f'w{i}': jax.ShapeDtypeStruct((512, 512), jnp.float32) for i in range(32)}
  state = jax.eval_shape(tx.init, params)

  def step(params, gradients, state):
    updates, state = tx.update(gradients, state)
    return optax.apply_updates(params, updates), state

  compiled = jax.jit(step, donate_argnums=(0, 2)).lower(params, params, state).compile()
  memory, one = compiled.memory_analysis(), 4 * 512 * 512
  stored = 32 * adam8bit.state_bytes((512, 512)) + 4  # and the count
  assert memory.argument_size_in_bytes == 2 * 32 * one + stored
  assert memory.output_size_in_bytes - memory.alias_size_in_bytes < one
  assert memory.temp_size_in_bytes < 8 * one


@pytest.mark.slow
def test_sharded_state_is_that_of_one_device(rng):
  gradients = _gradients(rng, 3)
  mesh = jax.make_mesh((2, 4), ('x', 'y'), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def place(x):
    spec = PartitionSpec('x', 'y') if x.ndim == 2 else PartitionSpec(*[None] * (x.ndim - 1))
    return jax.device_put(x, NamedSharding(mesh, spec))

  _, one = _run(gradients)
  _, many = _run(gradients, place)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_restored_state_goes_on_bit_for_bit(rng, tmp_path):
  gradients = [{k: jnp.asarray(v) for k, v in g.items()} for g in _gradients(rng, 4)]
  want, _ = _run(gradients)
  _, state = _run(gradients[:2])
  with RunFolder(tmp_path / 'run', {'x': 1}) as run:
    run.restore(state)
    run.save(2, state)
  with RunFolder(tmp_path / 'run', {'x': 1}) as run:
    state, _ = run.restore(TX.init({name: jnp.zeros(shape) for name, shape in SHAPES.items()}))
  for n in (2, 3):
    got, state = update(gradients[n], state)
    jax.tree.map(np.testing.assert_array_equal, got, want[n])


def _trained_loss(name):
  """The mean loss of the last updates of a small language model."""
  config = presets.preset('tiny-llama').replace(vocab_size=64)
  rng = np.random.default_rng(0)
  following = rng.integers(0, 63, (63, 3))  # each token has three successors
  documents = []
  for _ in range(60):
    ids = [int(rng.integers(63))]
    while len(ids) < 80:
      ids.append(int(following[ids[-1], rng.integers(3)]))
    documents.append(ids)
  dataset = PackedDataset.from_ids(documents, eos_id=63, seq_len=32, batch_size=8)
  fit = loop.FitConfig(
    optimizer=OptimizerConfig(name=name, steps=120, learning_rate=5e-3, warmup_steps=5)
  )
  model = Transformer(config, rngs=nnx.Rngs(0))
  records = loop.fit(model, dataset, fit, progress=False).records
  return records[0]['loss'], float(np.mean([record['loss'] for record in records[-15:]]))


@pytest.mark.slow
def test_training_ends_where_float32_adam_ends():
  first, codes = _trained_loss('adam8bit')
  _, floats = _trained_loss('adamw')
  assert floats < 0.6 * first  # it did learn
  assert codes == pytest.approx(floats, rel=O1)


def test_the_direction_is_adams_but_for_rounding(rng):
  gradients = _gradients(rng, 6)
  directions, _ = _run(gradients)
  tx = optax.scale_by_adam(*DECAYS, EPS)
  state = tx.init(jax.tree.map(jnp.asarray, gradients[0]))
  update = jax.jit(tx.update)
  for gradient in gradients:
    want, state = update(jax.tree.map(jnp.asarray, gradient), state)
  got = directions[-1]
  np.testing.assert_allclose(got['small'], want['small'], rtol=1e-4, atol=1e-6)
  for name in ('matrix', 'vector', 'stack'):
    correlation = np.corrcoef(np.ravel(got[name]), np.ravel(want[name]))[0, 1]
    assert correlation > 0.99
