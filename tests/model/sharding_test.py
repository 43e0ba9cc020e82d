"""Tests the shardings of arrays, and that results do not depend on the mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from model import kv_cache, presets, sharding, transformer
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.train import step as step_lib
from model.train.data import Batch
from model.transformer import Transformer
from ops import lora, quantized, sparse
from ops.linear import map_values

# Float32 sums in another order; logits are of order 1.
TOLERANCE = 1e-5
LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=4, kv_heads=2, head_width=8),
  ffn=FeedForwardConfig(width=64, bias=True),
)
CONFIG = ModelConfig(family='llama', vocab_size=48, width=32, layers=(LAYER,), max_positions=16)
MESHES = {
  '8 data': {'data': 8},
  '2 x 2 x 2': {'data': 2, 'fsdp': 2, 'model': 2},
  '8 model': {'model': 8},
}
TOKENS = np.arange(64).reshape(8, 8) * 5 % 48


def _pruned(w):
  return sparse.compress(w, sparse.n_of_m_mask(jnp.abs(w), 2, 4), 2, 4)


def _quantized(name, **options):
  return lambda w: quantized.quantize(w, name, **options)


KINDS = {
  'attention.query': _quantized('int4', group_size=16, symmetric=False),
  'attention.key': _quantized('nvfp4'),
  'attention.value': _quantized('mxfp4'),
  'attention.output': _quantized('nf4', group_size=16, double=True),
  'ffn.gate': _pruned,
  'ffn.up': lambda w: map_values(_quantized('int8'), _pruned(w)),
  'ffn.down': lambda w: lora.LoraTensor(
    quantized.quantize(w, 'int4', group_size=16), jnp.ones((64, 2)) / 8, jnp.ones((2, 32)) / 8, 0.5
  ),
}


@functools.cache
def _made(kind):
  model = Transformer(CONFIG, rngs=nnx.Rngs(0))
  for path, param in transformer.parameters(model).items():
    value = param.get_value()
    if value.ndim == 2:  # large enough for every trait to show
      value = value * 8
    if kind == 'compressed' and path.removeprefix('layers.0.').removesuffix('.weight') in KINDS:
      value = jax.jit(KINDS[path.removeprefix('layers.0.').removesuffix('.weight')])(value)
    param.set_value(value)
  return model


def _logits(model, tokens):
  graphdef, state = nnx.split(model)
  return jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))(state, tokens)


@functools.cache
def _on_one_device(kind):
  return np.asarray(_logits(_made(kind), TOKENS))


@pytest.mark.parametrize('shape', MESHES)
@pytest.mark.parametrize('kind', ['plain', 'compressed'])
@pytest.mark.quick(shape=('2 x 2 x 2',))
def test_the_forward_pass_matches_that_of_one_device(kind, shape):
  mesh, model = sharding.make_mesh(**MESHES[shape]), nnx.clone(_made(kind))
  sharding.shard(model, mesh)
  logits = _logits(model, jax.device_put(TOKENS, sharding.batch_sharding(mesh)))
  assert len(logits.sharding.device_set) == 8
  np.testing.assert_allclose(logits, _on_one_device(kind), atol=TOLERANCE)


@pytest.mark.slow
def test_a_training_step_matches_that_of_one_device():
  positions = np.broadcast_to(np.arange(8, dtype=np.int32)[None], (8, 8))
  batch = Batch(
    tokens_BT=TOKENS,
    labels_BT=np.roll(TOKENS, -1, 1),
    segments_BT=np.ones((8, 8), np.int32),
    positions_BT=positions,
  )
  optimizer = optax.sgd(0.1, momentum=0.9)

  def updated(model, batch):
    traces = []
    note = optax.stateless(lambda updates, params: traces.append(None) or updates)
    setup, state, frozen = step_lib.init(model, optax.chain(optimizer, note))
    places = jax.tree.map(lambda a: a.sharding, state)
    step = step_lib.make_step(setup, state)
    for _ in range(2):
      state, metrics = step(state, frozen, batch)
    assert len(traces) == 1
    return state, metrics, places

  expected, expected_metrics, _ = updated(_made('plain'), batch)
  mesh, model = sharding.make_mesh(**MESHES['2 x 2 x 2']), nnx.clone(_made('plain'))
  sharding.shard(model, mesh)
  state, metrics, places = updated(model, jax.device_put(batch, sharding.batch_sharding(mesh)))
  assert jax.tree.map(lambda a: a.sharding, state) == places
  assert float(metrics['loss']) == pytest.approx(float(expected_metrics['loss']), rel=TOLERANCE)
  for a, b in zip(jax.tree.leaves(state.trained), jax.tree.leaves(expected.trained), strict=True):
    np.testing.assert_allclose(a, b, atol=TOLERANCE)


def test_every_parameter_has_the_expected_sharding():
  mesh, model = sharding.make_mesh(**MESHES['2 x 2 x 2']), nnx.clone(_made('plain'))
  sharding.shard(model, mesh)
  specs = {
    path: tuple(param.get_value().sharding.spec)
    for path, param in transformer.parameters(model).items()
  }
  assert specs == {
    'embedding.table': ('model', 'fsdp'),
    'layers.0.attention_norm.scale': (),
    'layers.0.attention.query.weight': ('fsdp', 'model'),
    'layers.0.attention.key.weight': ('fsdp', 'model'),
    'layers.0.attention.value.weight': ('fsdp', 'model'),
    'layers.0.attention.output.weight': ('model', 'fsdp'),
    'layers.0.ffn_norm.scale': (),
    'layers.0.ffn.gate.weight': ('fsdp', 'model'),
    'layers.0.ffn.gate.bias': ('model',),
    'layers.0.ffn.up.weight': ('fsdp', 'model'),
    'layers.0.ffn.up.bias': ('model',),
    'layers.0.ffn.down.weight': ('model', 'fsdp'),
    'layers.0.ffn.down.bias': ('fsdp',),
    'final_norm.scale': (),
    'head.weight': ('fsdp', 'model'),
  }


def test_the_arrays_of_a_weight_are_sharded_like_its_matrix():
  mesh, w = sharding.make_mesh(fsdp=2, model=4), _made('compressed').layers[0].ffn.down.weight
  places = sharding.weight_shardings(mesh, w.get_value(), ('F', 'D'))
  assert places.base.values.spec == PartitionSpec('model', 'fsdp')
  assert places.base.scales.spec == PartitionSpec('model', 'fsdp')  # four groups of inputs
  assert places.a_IR.spec == PartitionSpec('model', None)
  assert places.b_RO.spec == PartitionSpec(None, 'fsdp')
  double = _made('compressed').layers[0].attention.output.weight.get_value()
  places = sharding.weight_shardings(mesh, double, ('N', 'D'))
  assert places.scales.codes.spec == PartitionSpec(None, 'fsdp')  # two groups, four ways
  assert places.scales.scales.spec == PartitionSpec(None, None)
  assert places.scales.offset.spec == PartitionSpec()


def test_axes_that_do_not_divide_are_replicated():
  mesh = sharding.make_mesh(fsdp=2, model=4)
  spec = lambda letters, shape: sharding.sharding(mesh, letters, shape).spec
  assert spec('DF', (6, 8)) == PartitionSpec('fsdp', 'model')
  assert spec('DF', (5, 8)) == PartitionSpec(None, 'model')
  assert spec('DF', (6, 6)) == PartitionSpec('fsdp', None)
  assert spec('B_', (3, 8)) == PartitionSpec(None, None)
  one = sharding.make_mesh(devices=jax.devices()[:1])
  assert sharding.sharding(one, 'DF', (4, 4)).is_fully_replicated
  config = CONFIG.replace(vocab_size=47)
  model = Transformer(config, rngs=nnx.Rngs(0))
  sharding.shard(model, mesh)
  assert model.embedding.table.get_value().sharding.spec == PartitionSpec(None, 'fsdp')
  assert model.head.weight.get_value().sharding.spec == PartitionSpec('fsdp', None)


def test_a_mesh_needs_enough_devices():
  with pytest.raises(ValueError, match='a 2 x 2 x 4 x 1 x 1 mesh needs 16 devices, not 8'):
    sharding.make_mesh(data=2, fsdp=2, model=4)
  with pytest.raises(ValueError, match='needs 2 devices, not 1'):
    sharding.make_mesh(data=2, devices=jax.devices()[:1])
  assert sharding.make_mesh(data=2).devices.shape == (2, 1, 1, 1, 1)


def test_all_letters_are_in_the_alphabet():
  from ops import axes

  assert set(sharding.RULES) - {'_'} <= set(axes.ALPHABET)
  with pytest.raises(ValueError, match='zip'):
    sharding.sharding(sharding.make_mesh(data=8), 'DF', (4,))


@pytest.mark.parametrize('format', [*kv_cache.FORMATS, 'int8+h2o16'])
def test_a_mesh_divides_the_rows_and_the_heads_of_caches(format):
  mesh = sharding.make_mesh(data=2, model=2)
  config = presets.preset('tiny-gemma2')
  alone = kv_cache.init(config, 4, 64, format=format)
  found = kv_cache.init(config, 4, 64, format=format, mesh=mesh)
  for cache, one in zip(found, alone):
    for a, like, letters in zip(*map(jax.tree.leaves, (cache, one, cache.letters()))):
      np.testing.assert_array_equal(a, like)
      parts = [{'B': 2, 'K': 2}.get(letter, 1) for letter in letters]
      own = a.sharding.shard_shape(a.shape)
      assert own == tuple(size // part for size, part in zip(a.shape, parts))
