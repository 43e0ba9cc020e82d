"""Experts on several devices against one, the collectives of the compiled programs, and drops."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from model import expert_parallel, sharding
from model.config import ModelConfig
from model.expert_parallel import AllToAll, Buffered, DispatchConfig, Psum
from model.layers.basic import StreamConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import Dropless, Routed, RoutedConfig
from model.train import step as step_lib
from model.train.data import Batch
from model.train.routing import Balanced
from model.train.step import StepConfig, Task
from model.transformer import Context, Transformer
from ops.moe import Router

# Float32 sums in another order, of values and gradients of order 1.
TOLERANCE = 1e-5
EXPERTS, CHOICES, WIDTH, ROWS, LENGTH, UPDATES = 8, 2, 16, 8, 6, 20
TOKENS = ROWS * LENGTH
ROUTED = RoutedConfig(
  experts=EXPERTS,
  width=12,
  router=Router(choices=CHOICES, renormalize=True),
  bias=True,
  choice_bias=True,
  shared_width=8,
)
STREAM = StreamConfig(width=WIDTH, depth=1, norm='rms', norm_eps=1e-6, norm_offset=0.0)


@functools.cache
def _ffn() -> Routed:
  """A layer whose experts have very different loads, and biases that are not zero."""
  ffn, rng = Routed(ROUTED, STREAM, rngs=nnx.Rngs(0), dtype=jnp.float32), np.random.default_rng(3)
  for param in jax.tree.leaves(nnx.state(ffn), is_leaf=lambda x: isinstance(x, nnx.Variable)):
    shape = param.get_value().shape
    param.set_value(jnp.asarray(rng.standard_normal(shape) / 3, jnp.float32))
  ffn.choice_bias.set_value(jnp.asarray([0.3, 0.1] + [0.0] * (EXPERTS - 3) + [-0.9], jnp.float32))
  return ffn


def _x_BTD():
  return jnp.asarray(np.random.default_rng(4).standard_normal((ROWS, LENGTH, WIDTH)), jnp.float32)


def _on(ffn, config, **mesh):
  """The layer on a mesh, and its inputs."""
  devices = sharding.make_mesh(**mesh)
  placed = nnx.clone(ffn)
  sharding.shard(placed, devices)
  model = _model_config(ROUTED)
  expert_parallel.use(placed, expert_parallel.make(config, model, devices))
  axes = expert_parallel.batch_axes(config)
  return placed, jax.device_put(_x_BTD(), sharding.batch_sharding(devices, axes))


def _compiled(ffn, x_BTD):
  """The compiled function that returns outputs and gradients, and its arguments."""
  graphdef, state = nnx.split(ffn)

  def run(state, x_BTD):
    y_BTD, back = jax.vjp(lambda s, x: nnx.merge(graphdef, s)(x), state, x_BTD)
    return y_BTD, back(jnp.cos(y_BTD))

  return jax.jit(run).lower(state, x_BTD).compile(), (state, x_BTD)


@functools.cache
def _expected():
  program, arguments = _compiled(_ffn(), _x_BTD())
  return jax.tree.map(np.asarray, program(*arguments))


MORE = [
  pytest.param(name, devices, marks=pytest.mark.slow)
  for name, devices in [('psum', 'all'), ('all_to_all', 2), ('all_to_all', 'all')]
]
STRATEGIES = {'psum': DispatchConfig(), 'all_to_all': DispatchConfig(strategy='all_to_all')}


@pytest.mark.parametrize('name, devices', [('psum', 4), ('all_to_all', 8), *MORE])
def test_outputs_gradients_and_collectives(name, devices):
  mesh = {'expert': 2, 'model': 2, 'fsdp': 2} if devices == 'all' else {'expert': devices}
  program, arguments = _compiled(*_on(_ffn(), STRATEGIES[name], **mesh))
  for a, b in zip(jax.tree.leaves(program(*arguments)), jax.tree.leaves(_expected()), strict=True):
    np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE)
  if devices != 'all':
    found = _collectives(program.as_text())
    for kind, sizes in _formula(name, devices).items():
      assert found[kind] == sizes
    assert not found.keys() & {'all-gather', 'collective-permute', 'reduce-scatter'}


def _formula(name, devices):
  """Bytes per device of each all-reduce of activations, or of each all-to-all."""
  if name == 'psum':
    return {'all-reduce': [4 * TOKENS * CHOICES, 4 * TOKENS * WIDTH, 4 * TOKENS * WIDTH]}
  rows = TOKENS // devices  # the capacity without a factor: all tokens of a device
  return {'all-to-all': [4 * EXPERTS * rows * WIDTH] * 4}


def _collectives(text):
  """The bytes of each array that collectives among several devices send, by the kind of those.

  Those of gradients of parameters, which are the batch's and not the experts', are left out.
  """
  found = {}
  kinds = 'all-reduce|all-to-all|all-gather|reduce-scatter|collective-permute'
  for line in text.splitlines():
    match = re.search(rf'= (.*?) ({kinds})\((.*)', line)
    if match is None or _group_size(line) == 1:
      continue
    shapes = [
      tuple(map(int, filter(None, dims.split(','))))
      for dims in re.findall(r'f32\[([\d,]*)\]', match[1])
    ]
    if match[2] == 'all-to-all':
      sizes = [sum(map(math.prod, shapes))]
    else:
      sizes = [math.prod(shape) for shape in shapes if shape[:1] == (TOKENS,)]
    if sizes:
      found.setdefault(match[2], []).extend(4 * size for size in sizes)
  return {kind: sorted(sizes) for kind, sizes in found.items()}


def _group_size(line):
  """How many devices take part in a collective, in each of the notations of HLO."""
  groups = re.search(r'replica_groups=(.*?)(, [a-z]|$)', line)[1]
  if groups.startswith('{{'):
    return len(groups[2:].split('}')[0].split(','))
  if groups.startswith('['):
    return int(re.match(r'\[\d+,(\d+)\]', groups)[1])
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
  used = re.findall(r"'(\w+)'", groups.rpartition('{')[2])
  return math.prod(int(sizes[axis]) for axis in used)


def _model_config(*ffns) -> ModelConfig:
  mixer = AttentionConfig(query_heads=2, kv_heads=1, head_width=8)
  layers = tuple(LayerConfig(mixer=mixer, ffn=ffn) for ffn in ffns)
  return ModelConfig(family='llama', vocab_size=32, width=WIDTH, layers=layers, max_positions=32)


def _batch() -> Batch:
  rng = np.random.default_rng(5)
  tokens_BT = (rng.integers(0, 32, (ROWS, 1)) + np.arange(LENGTH)) % 32
  labels_BT = np.where(rng.random((ROWS, LENGTH)) < 0.8, (tokens_BT + 1) % 32, -1)
  return Batch(np.int32(tokens_BT), np.int32(labels_BT), None, None)


def _updated(config, mesh=None, updates=UPDATES, **step):
  """The state after some updates and what they reported, on a mesh or on one device."""
  model, batch = Transformer(_model_config(ROUTED), rngs=nnx.Rngs(0)), _batch()
  if mesh is not None:
    sharding.shard(model, mesh)
    axes = expert_parallel.batch_axes(config)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh, axes))
  setup, state, frozen = step_lib.init(
    model,
    optax.sgd(0.3, momentum=0.9),
    Task(objective=Balanced(balance=0.3, bias_rate=0.01)),
    StepConfig(dispatch=config, **step),
  )
  step, found = step_lib.make_step(setup, state), []
  for _ in range(updates):
    state, metrics = step(state, frozen, batch)
    found.append(jax.tree.map(np.asarray, metrics))
  return state, found


@functools.cache
def _on_one_device():
  state, found = _updated(DispatchConfig())
  return jax.tree.map(np.asarray, (state.trained, state.buffers)), found


@pytest.mark.parametrize(
  'name, step', [('psum', {'accumulation': 2}), ('all_to_all', {'remat': 'block'})]
)
@pytest.mark.quick(name=('all_to_all',))
@pytest.mark.slow
def test_updates_are_those_of_one_device(name, step):
  (trained, buffers), expected = _on_one_device()
  state, found = _updated(STRATEGIES[name], sharding.make_mesh(data=2, expert=2), **step)
  up = state.trained['layers.0.ffn.up.weight']
  assert up.sharding.spec[0] == 'expert' and up.addressable_shards[0].data.shape[0] == EXPERTS // 2
  assert found[0]['loss'] - found[-1]['loss'] > 0.5
  for one, same in zip(found, expected):
    assert one['loss'] == pytest.approx(float(same['loss']), rel=TOLERANCE)
    np.testing.assert_array_equal(*(m['experts']['layers.0.ffn']['load'] for m in (one, same)))
  for path, array in trained.items():
    np.testing.assert_allclose(state.trained[path], array, atol=TOLERANCE, err_msg=path)
  for path, array in buffers.items():
    np.testing.assert_allclose(state.buffers[path], array, atol=1e-6, err_msg=path)


@jax.jit
def _all_rows(x_TD, sizes_E):
  return _ffn().experts(x_TD, sizes_E)


def _kept_by_hand(experts_TX, rows, order):
  pairs = [(t, x) for t in range(len(experts_TX)) for x in range(CHOICES)]
  pairs.sort(key=lambda pair: pair if order == 'token' else pair[::-1])
  kept_TX, taken = np.zeros(experts_TX.shape, bool), np.zeros(EXPERTS, int)
  for t, x in pairs:
    kept_TX[t, x] = taken[experts_TX[t, x]] < rows
    taken[experts_TX[t, x]] += 1
  return kept_TX


@pytest.mark.parametrize('order', ['token', 'choice'])
@pytest.mark.parametrize('devices', [1, 4])
@pytest.mark.quick(devices=(4,))
def test_a_tight_capacity_drops_and_counts_what_finds_no_room(order, devices):
  """Against every expert on every token, with the choices that are counted by hand per device."""
  config = DispatchConfig(strategy='all_to_all', capacity_factor=0.6, drop_order=order)
  ffn, x_BTD = _on(_ffn(), config, expert=devices, devices=jax.devices()[:devices])
  assert isinstance(ffn.dispatcher, Buffered if devices == 1 else AllToAll)
  x_TD = np.asarray(x_BTD).reshape(TOKENS, WIDTH)
  routing = _ffn().route(jnp.asarray(x_TD))
  rows = math.ceil(0.6 * (TOKENS // devices) * CHOICES / EXPERTS)
  parts = np.split(np.asarray(routing.experts_TX), devices)
  kept_TX = np.concatenate([_kept_by_hand(part, rows, order) for part in parts])
  assert 0.1 < 1 - kept_TX.mean() < 0.9
  np.testing.assert_array_equal(ffn.dispatcher.kept(routing.experts_TX, EXPERTS), kept_TX)
  y_TD = np.asarray(_ffn().shared(jnp.asarray(x_TD)))
  for e in range(EXPERTS):
    one = _all_rows(x_TD, TOKENS * np.eye(EXPERTS, dtype=np.int32)[e])
    mine_TX = kept_TX & (np.asarray(routing.experts_TX) == e)
    y_TD = y_TD + (np.asarray(routing.weights_TX) * mine_TX).sum(1)[:, None] * np.asarray(one)
  graphdef, state = nnx.split(ffn)
  found = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, x_BTD)
  np.testing.assert_allclose(np.reshape(found, (TOKENS, WIDTH)), y_TD, atol=TOLERANCE)


@pytest.mark.slow
def test_drops_are_reported_and_only_training_has_any():
  config = DispatchConfig(capacity_factor=0.5)
  metrics = _updated(config, updates=1)[1][0]
  model = Transformer(_model_config(ROUTED), rngs=nnx.Rngs(0))
  context = Context.of(model.config, _batch().tokens_BT)
  _, _, z_BTD = context.run_and_read(model.layers[0], model.embed(_batch().tokens_BT))
  experts_TX = np.asarray(model.layers[0].ffn.route(z_BTD.reshape(TOKENS, WIDTH)).experts_TX)
  kept_TX = _kept_by_hand(experts_TX, math.ceil(0.5 * TOKENS * CHOICES / EXPERTS), 'token')
  mask_T = _batch().labels_BT.reshape(-1) >= 0
  expected = (~kept_TX)[mask_T].mean()
  assert expected > 0.1 and metrics['dropped'] == pytest.approx(expected, rel=TOLERANCE)
  assert _on_one_device()[1][0]['dropped'] == 0
  assert isinstance(model.layers[0].ffn.dispatcher, Dropless)  # as in evaluation and decoding


@pytest.mark.parametrize(
  'config, mesh, why',
  [
    (DispatchConfig(), {'expert': 3}, 'the 8 experts of layer 1 do not divide among 3 devices'),
    (DispatchConfig(capacity_factor=1.0), {'expert': 2}, "'psum' drops nothing"),
  ],
)
def test_what_does_not_fit_a_mesh_is_refused_before_any_work(config, mesh, why):
  model = _model_config(FeedForwardConfig(width=8), ROUTED)
  with pytest.raises(ValueError, match=why):
    expert_parallel.make(config, model, sharding.make_mesh(**mesh))


def test_experts_are_never_replicated_silently():
  with pytest.raises(ValueError, match='8 experts do not divide among 3 devices'):
    sharding.shard(_ffn(), sharding.make_mesh(expert=3))


def test_options_that_make_no_sense_are_refused():
  with pytest.raises(ValueError, match="strategy 'ring' is not one of"):
    DispatchConfig(strategy='ring')
  with pytest.raises(ValueError, match='capacity_factor must be above 0, not 0'):
    DispatchConfig(capacity_factor=0.0)
  ffn, x_BTD = _on(_ffn(), DispatchConfig(), data=8)
  assert isinstance(ffn.dispatcher, Psum)
  with pytest.raises(ValueError, match='6 tokens do not divide among 8 devices'):
    ffn(x_BTD[:1])
