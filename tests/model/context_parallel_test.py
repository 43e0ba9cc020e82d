"""Rows divided among devices against one device, and what the compiled programs send."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from model import context_parallel, sharding
from model.config import ModelConfig
from model.context_parallel import Divided
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.linformer import LinformerConfig
from model.train import loop
from model.train import step as step_lib
from model.train.data import Batch, PackedDataset
from model.train.distill import Distillation
from model.train.step import StepConfig, Task
from model.transformer import Transformer
from ops import masks, patterns
from ops.attention import attention

# Float32 sums in another order, relative to the largest entry of an array.
TOLERANCE = 1e-5
ROWS, LENGTH, QUERY_HEADS, KV_HEADS, HEAD = 2, 64, 4, 2, 8
UPDATES = 10


def _packed(rng, rows, length):
  """Documents of one to many tokens: their positions and segments, [rows, length]."""
  begins = rng.random((rows, length)) < 0.12
  begins[:, 0] = True
  place = np.arange(length)[None]
  starts = np.maximum.accumulate(np.where(begins, place, 0), 1)
  return np.int32(place - starts), np.int32(np.cumsum(begins, 1))


def _mask(kind, pattern):
  pattern = None if pattern is None else patterns.parse(pattern)
  if kind == 'whole':
    return masks.causal(ROWS, LENGTH, pattern=pattern)
  marks = _packed(np.random.default_rng(7), ROWS, LENGTH)
  if kind == 'zigzag':
    order = context_parallel.zigzag(LENGTH, 4)
    marks = [mark[:, order] for mark in marks]
  return masks.packed(*map(jnp.asarray, marks), pattern=pattern)


def _arrays():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  q, k, v = (draw(ROWS, LENGTH, n, HEAD) for n in (QUERY_HEADS, KV_HEADS, KV_HEADS))
  return q, k, v, draw(QUERY_HEADS)


def _program(fn, mask, *arrays):
  """The compiled function that gives the outputs and the gradients of an attention."""

  def run(q, k, v, sinks):
    attend = lambda *x: fn(*x[:3], mask, scale=0.4, softcap=8.0, sinks_N=x[3])
    y, back = jax.vjp(attend, q, k, v, sinks)
    return y, back(jnp.cos(y))

  return jax.jit(run).lower(*(arrays or _arrays())).compile()


def _assert_close(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=TOLERANCE * np.abs(b).max(), rtol=0)


@pytest.mark.parametrize(
  'strategy, mesh, kind, pattern',
  [
    ('gather', {'context': 8}, 'packed', None),
    pytest.param(
      'gather', {'context': 2, 'model': 4}, 'whole', 'window5+first3', marks=pytest.mark.slow
    ),  # heads do not divide
    pytest.param(
      'ring', {'context': 2, 'data': 2, 'model': 2}, 'whole', None, marks=pytest.mark.slow
    ),
    ('ring', {'context': 4}, 'zigzag', 'window9x2+every8'),
    pytest.param('ring', {'context': 8}, 'packed', 'window5+first3', marks=pytest.mark.slow),
    ('halo', {'context': 2, 'fsdp': 2}, 'whole', 'window33'),  # all of the neighbour
    pytest.param(
      'halo', {'context': 4, 'model': 2}, 'packed', 'window5+first3', marks=pytest.mark.slow
    ),
    ('halo', {'context': 8}, 'whole', 'window9+first12'),  # first tokens on two devices
    pytest.param('halo', {'context': 4}, 'packed', 'window1', marks=pytest.mark.slow),
  ],
)
def test_values_and_gradients_are_those_of_one_device(strategy, mesh, kind, pattern):
  mask = _mask(kind, pattern)
  found = _program(Divided(sharding.make_mesh(**mesh), strategy), mask)(*_arrays())
  expected = _program(functools.partial(attention, impl='reference'), mask)(*_arrays())
  _assert_close(found, expected)


SENT = {  # numbers per element of a key or value and device, forward and backward
  'gather': lambda devices: {'all-gather': LENGTH, 'reduce-scatter': LENGTH // devices},
  'ring': lambda devices: {
    'collective-permute': ((devices - 1) + (devices - 1) + devices) * LENGTH // devices
  },
  'halo': lambda devices: {'collective-permute': 2 * (9 - 1)},
}


@pytest.mark.parametrize('strategy, devices', [('gather', 4), ('ring', 4), ('halo', 4)])
def test_what_is_sent_follows_the_formula(strategy, devices):
  mesh = sharding.make_mesh(context=devices)
  mask = _mask('whole', 'window9' if strategy == 'halo' else None)
  places = [sharding.batch_sharding(mesh)] * 3 + [sharding.sharding(mesh, 'N', (QUERY_HEADS,))]
  arrays = [jax.device_put(a, place) for a, place in zip(_arrays(), places)]
  text = _program(Divided(mesh, strategy), mask, *arrays).as_text()
  found, expected = _sent(text), SENT[strategy](devices)
  if 'all-reduce' in found:  # how XLA:CPU writes a reduce-scatter
    expected['all-reduce'] = expected.pop('reduce-scatter') * devices
  assert found == {kind: 2 * n * ROWS * KV_HEADS * HEAD for kind, n in expected.items()}


def _sent(text):
  """Numbers of keys and values that collectives give a device; loops count each round."""
  bodies = re.findall(r'body=%?([\w.\-]+).*?known_trip_count":\{"n":"(\d+)"', text)
  rounds, found, name = {body: int(n) for body, n in bodies}, {}, None
  kinds = 'all-reduce|all-to-all|all-gather|reduce-scatter|collective-permute'
  for line in text.splitlines():
    if line and not line.startswith((' ', '}')):
      name = re.match(r'(?:ENTRY )?%?([\w.\-]+)', line)[1]
    match = re.search(rf'= (.*?) ({kinds})(?:-start)?\(', line)
    for dims in re.findall(r'f32\[([\d,]+)\]', match[1]) if match else ():
      shape = tuple(map(int, dims.split(',')))
      if len(shape) >= 4:
        found[match[2]] = found.get(match[2], 0) + math.prod(shape) * rounds.get(name, 1)
  return found


def test_a_ring_never_holds_all_keys():
  """Temporary memory for values and gradients, against the keys, values and gradients of all."""
  devices, length, used = 8, 4096, {}
  mesh = sharding.make_mesh(context=devices)
  shape, place = (1, length, 4, 16), sharding.batch_sharding(mesh)
  array, mask = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place), masks.causal(1, length)
  whole = 4 * 4 * math.prod(shape)
  for strategy in ('gather', 'ring'):
    fn = functools.partial(Divided(mesh, strategy), scale=0.25)
    loss = lambda q, k, v, fn=fn: jnp.sum(jnp.sin(fn(q, k, v, mask)))
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(array, array, array).compile()
    used[strategy] = program.memory_analysis().temp_size_in_bytes
  assert used['ring'] < whole < used['gather']
  assert used['gather'] - used['ring'] > whole * (1 - 2 / devices)


def _model_config(*mixers, family='llama') -> ModelConfig:
  layers = tuple(LayerConfig(mixer=mixer, ffn=FeedForwardConfig(width=24)) for mixer in mixers)
  return ModelConfig(family=family, vocab_size=48, width=16, layers=layers, max_positions=64)


def _mixer(**options):
  return AttentionConfig(query_heads=4, kv_heads=2, head_width=8, **options)


WINDOWS = _model_config(_mixer(sparse=patterns.parse('window3+first2')))
MIXED = _model_config(_mixer(window=4), _mixer(sinks=True))
ALL_KEYS = _model_config(_mixer(softcap=5.0))


@functools.cache
def _batch(length=32) -> Batch:
  rng = np.random.default_rng(5)
  tokens_BT = np.int32((rng.integers(0, 48, (4, 1)) + np.arange(length + 1) * 5) % 48)
  positions_BT, segments_BT = _packed(rng, 4, length)
  ends_BT = np.roll(positions_BT, -1, 1) == 0
  labels_BT = np.where(ends_BT, -1, tokens_BT[:, 1:])
  return Batch(tokens_BT[:, :-1], np.int32(labels_BT), segments_BT, positions_BT)


def _updated(config, batch, mesh=None, references=(), **step):
  """The trained arrays after some updates and what they reported, on a mesh or on one device."""
  models = [Transformer(each, rngs=nnx.Rngs(i)) for i, each in enumerate((config, *references))]
  if mesh is not None:
    mesh = sharding.make_mesh(**mesh)
    for model in models:
      sharding.shard(model, mesh)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
  task = Task()
  if references:
    task = Task(objective=Distillation(), references={'teacher': models[1]})
  optimizer = optax.sgd(0.3, momentum=0.9)
  setup, state, frozen = step_lib.init(models[0], optimizer, task, StepConfig(**step))
  update = step_lib.make_step(setup, state).lower(state, frozen, batch).compile()
  gathered = re.findall(r'= f32\[(\d+,\d+,[\d,]+)\]\S* all-gather\(', update.as_text())
  assert all(shape.endswith(',2,8') for shape in gathered)  # keys and values alone
  found = []
  for _ in range(UPDATES):
    state, metrics = update(state, frozen, batch)
    found.append(float(metrics['loss']))
  return jax.tree.map(np.asarray, state.trained), found


@functools.cache
def _on_one_device(config, whole, references=()):
  return _updated(config, _rows(whole), references=references)


def _rows(whole):
  batch = _batch()
  return Batch(batch.tokens_BT, batch.labels_BT, None, None) if whole else batch


@pytest.mark.parametrize(
  'config, strategy, mesh, step',
  [
    (MIXED, 'auto', {'context': 8}, {'accumulation': 2, 'loss_chunk': 32}),
    pytest.param(
      ALL_KEYS, 'ring', {'context': 4, 'model': 2}, {'remat': 'block'}, marks=pytest.mark.slow
    ),
    pytest.param(WINDOWS, 'halo', {'context': 4, 'data': 2}, {}, marks=pytest.mark.slow),
    pytest.param(
      ALL_KEYS, 'auto', {'context': 2, 'data': 2}, {'loss_chunk': 16}, marks=pytest.mark.slow
    ),
  ],
)
@pytest.mark.slow
def test_updates_are_those_of_one_device(config, strategy, mesh, step):
  whole = strategy == 'ring'  # a batch without positions and segments
  expected, losses = _on_one_device(config, whole)
  _assert_learned(_updated(config, _rows(whole), mesh, context=strategy, **step), expected, losses)


@pytest.mark.slow
def test_a_teacher_is_divided_too():
  expected, losses = _on_one_device(ALL_KEYS, False, (WINDOWS,))
  _assert_learned(_updated(ALL_KEYS, _batch(), {'context': 4}, (WINDOWS,)), expected, losses)


def _assert_learned(found, expected, losses):
  assert losses[-1] < 0.9 * losses[0]
  np.testing.assert_allclose(found[1], losses, rtol=TOLERANCE)
  for path, array in expected.items():
    np.testing.assert_allclose(found[0][path], array, atol=TOLERANCE, err_msg=path)


def test_held_out_text_is_divided_too():
  rng = np.random.default_rng(3)
  ids = [rng.integers(1, 48, length) for length in rng.integers(3, 60, 30)]
  data = PackedDataset.from_ids(ids, eos_id=0, seq_len=32, batch_size=4)
  model = Transformer(ALL_KEYS, rngs=nnx.Rngs(0))
  expected = loop.mean_nll(model, data)
  sharding.shard(model, sharding.make_mesh(context=2))
  assert loop.mean_nll(model, data) == pytest.approx(expected, rel=TOLERANCE)
  with pytest.raises(ValueError, match='32 tokens of a row do not divide among 3 devices'):
    _plan(ALL_KEYS, devices=3).placed(data.batch(0))


def _plan(*configs, strategy='auto', devices=4):
  mesh = sharding.make_mesh(context=devices)
  return context_parallel.plan(strategy, configs, mesh, sharding.RULES['B'])


def test_auto_takes_a_halo_where_it_reaches_and_else_what_moves_and_holds_least():
  assert _plan(WINDOWS).picks(32) == {'halo'}
  assert _plan(WINDOWS).picks(8) == {'halo'}  # 3 - 1 keys of a window, 2 of a device
  assert _plan(WINDOWS).picks(4) == {'ring'}
  assert _plan(ALL_KEYS).picks(32) == {'ring'}
  assert _plan(ALL_KEYS, devices=2).picks(32) == {'gather'}  # two query heads a key/value head
  assert _plan(ALL_KEYS, devices=1).picks(33) == set()


def test_zigzag_gives_devices_equal_work():
  order = context_parallel.zigzag(16, 4).reshape(4, 4)
  np.testing.assert_array_equal(
    order, [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
  )
  assert set((order + 1).sum(1)) == {16 * 17 // 8}  # keys that the queries of a device see
  batch = jax.jit(_plan(ALL_KEYS).placed)(_batch())
  order = context_parallel.zigzag(32, 4)
  for name in ('tokens_BT', 'labels_BT', 'segments_BT', 'positions_BT'):
    np.testing.assert_array_equal(getattr(batch, name), getattr(_batch(), name)[:, order])
  for kept in (_plan(WINDOWS), _plan(ALL_KEYS, WINDOWS), _plan(ALL_KEYS, devices=1)):
    assert kept.placed(_batch()) is _batch()  # a teacher with windows counts too


LINFORMER = LinformerConfig(query_heads=4, kv_heads=2, head_width=8, window=8, chunk=4, summaries=1)


@pytest.mark.parametrize(
  'config, strategy, length, why',
  [
    (ALL_KEYS, 'ring', 30, '30 tokens of a row do not divide among 4 devices'),
    (ALL_KEYS, 'halo', 32, 'a halo brings the keys of a window, not all keys before a query'),
    (_model_config(_mixer(window=10)), 'halo', 32, 'a window of 10 keys reaches beyond the 8'),
    (
      _model_config(_mixer(sparse=patterns.parse('window4+every8'))),
      'halo',
      32,
      'not the pattern window4.every8',
    ),
    (_model_config(_mixer(), LINFORMER), 'auto', 32, r'mixer of layer 1 \(LinformerConfig\) needs'),
    (ALL_KEYS, 'rings', 32, "strategy 'rings' is not one of"),
  ],
)
def test_what_cannot_be_divided_is_refused(config, strategy, length, why):
  with pytest.raises(ValueError, match=why):
    _plan(config, strategy=strategy).picks(length)
