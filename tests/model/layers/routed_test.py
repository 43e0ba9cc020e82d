"""Routed layers against loops in float64, and what follows from their config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import config as configs
from model import kv_cache, sharding, transformer, units
from model.compress import gates, pipeline, recipe
from model.config import ModelConfig
from model.eval import cost
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import RoutedConfig
from model.layers.wiring import Activated, Edge, Gated, Normed
from model.transformer import Transformer
from ops.linear import dense
from ops.moe import Router

# Float32 sums in another order, of values of order 1.
TOLERANCE = 1e-5
# Of central differences: the third derivative times STEP^2 / 6, and rounding of a loss near 5.
STEP, SLOPE = 0.02, 1e-4
MIXTRAL = RoutedConfig(experts=4, width=24, router=Router(choices=2, renormalize=True))
QWEN = RoutedConfig(
  experts=5, width=16, router=Router(choices=3), shared_width=48, shared_gate=True
)
DEEPSEEK = RoutedConfig(
  experts=4,
  width=16,
  router=Router(choices=2, score='sigmoid', groups=2, group_limit=1, renormalize=True, scale=2.5),
  shared_width=32,
)
BIASED = RoutedConfig(
  experts=3,
  width=16,
  router=Router(choices=1),
  activation='relu',
  gated=False,
  bias=True,
  router_bias=True,
  shared_width=8,
  shared_gate=True,
)
GPT_OSS = RoutedConfig(
  experts=4,
  width=16,
  router=Router(choices=2, score='softmax_of_chosen'),
  activation='quick_gelu',
  bias=True,
  router_bias=True,
  limit=0.5,
  up_offset=1.0,
  shared_width=8,
)
KINDS = {
  'mixtral': MIXTRAL,
  'qwen': QWEN,
  'deepseek': DEEPSEEK,
  'biased': BIASED,
  'gpt_oss': GPT_OSS,
}
MIXER = AttentionConfig(query_heads=2, kv_heads=1, head_width=16)


def _config(*ffns) -> ModelConfig:
  layers = tuple(LayerConfig(mixer=MIXER, ffn=ffn) for ffn in ffns)
  return ModelConfig(family='llama', vocab_size=40, width=32, layers=layers, max_positions=32)


MIXED = _config(QWEN, FeedForwardConfig(width=48))


def _model(config) -> Transformer:
  """A model with weights of order 1 / sqrt(width), and biases that are not zero."""
  model, rng = Transformer(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for path, param in transformer.parameters(model).items():
    value = param.get_value()
    if 'norm' not in path:
      param.set_value(jnp.asarray(rng.standard_normal(value.shape) / 5, value.dtype))
  return model


@pytest.fixture
def tokens_BT(rng):
  return rng.integers(0, 40, (3, 9), np.int32)


def _logits(model, tokens_BT):
  return np.asarray(_run(*nnx.split(model), tokens_BT))


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


def _act(name, x):
  steep = {'quick_gelu': 1.702, 'silu': 1.0}
  return np.maximum(x, 0) if name == 'relu' else x / (1 + np.exp(-steep[name] * x))


def _network(config, values, prefix, x_D, e=None):
  """One expert, or the shared experts, of one token."""
  take = lambda name: values[name] if e is None else values[name][e]
  apply = lambda layer, x: (
    x @ take(f'{prefix}{layer}.weight') + (take(f'{prefix}{layer}.bias') if config.bias else 0)
  )
  up = apply('up', x_D)
  if not config.gated:
    return apply('down', _act(config.activation, up))
  gate, limit = apply('gate', x_D), config.limit or np.inf
  up = np.clip(up, -limit, limit) + config.up_offset
  return apply('down', _act(config.activation, np.minimum(gate, limit)) * up)


def _by_hand(config, values, x_D):
  score_E = x_D @ values['router.weight'] + values.get('router.bias', 0)
  if config.router.score == 'sigmoid':
    score_E = 1 / (1 + np.exp(-score_E))
  else:
    score_E = np.exp(score_E) / np.exp(score_E).sum()
  open_E = np.ones(config.experts, bool)
  if config.router.groups > 1:
    parts = score_E.reshape(config.router.groups, -1)
    open_E = np.repeat(parts.max(1) == parts.max(), parts.shape[1])
  chosen = np.argsort(-np.where(open_E, score_E, -1))[: config.router.choices]
  weights = score_E[chosen] * config.router.scale
  if config.router.renormalize or config.router.score == 'softmax_of_chosen':
    weights = weights / score_E[chosen].sum()
  y_D = sum(w * _network(config, values, '', x_D, e) for w, e in zip(weights, chosen, strict=True))
  if config.shared_width:
    shared_D = _network(config, values, 'shared.', x_D)
    if config.shared_gate:
      gate = x_D @ values['shared_gate.weight'] + values.get('shared_gate.bias', 0)
      shared_D = shared_D / (1 + np.exp(-gate))
    y_D = y_D + shared_D
  return y_D


@pytest.mark.parametrize('name', KINDS)
def test_the_module_is_a_loop_over_tokens_and_their_experts(rng, name):
  ffn = _model(_config(KINDS[name])).layers[0].ffn
  values = {p: np.float64(v.get_value()) for p, v in transformer.parameters(ffn).items()}
  x_BTD = np.float32(rng.standard_normal((2, 7, 32)))
  y_BTD = jax.jit(lambda x: ffn(x))(x_BTD)
  expected = [_by_hand(KINDS[name], values, np.float64(x_D)) for x_D in x_BTD.reshape(14, 32)]
  np.testing.assert_allclose(np.reshape(y_BTD, (14, 32)), expected, atol=10 * TOLERANCE)


def test_a_token_decodes_as_it_was_read(tokens_BT):
  model = _model(MIXED)
  expected_BTV = _logits(model, tokens_BT)
  graphdef, state = nnx.split(model)

  @jax.jit
  def step(state, tokens_B1, positions_B1, cache):
    model = nnx.merge(graphdef, state)
    x, cache = model.hidden(tokens_B1, positions_BT=positions_B1, cache=cache)
    return model.logits(x), cache

  cache = kv_cache.init(MIXED, 3, 9, jnp.float32)
  for t in range(9):
    positions_B1 = jnp.full((3, 1), t, jnp.int32)
    logits, cache = step(state, tokens_BT[:, t : t + 1], positions_B1, cache)
    np.testing.assert_allclose(logits[:, 0], expected_BTV[:, t], atol=10 * TOLERANCE)


def test_the_config_is_written_and_read():
  config = _config(*KINDS.values())
  assert configs.from_json(configs.to_json(config)) == config
  assert configs.to_json(config)['layers'][0]['ffn']['router']['choices'] == 2


def test_the_wiring_of_experts_and_shared_experts():
  normed, routed, shared = QWEN.edges('ffn')
  networks = ('ffn.gate', 'ffn.up', 'ffn.shared.gate', 'ffn.shared.up')
  scores = ('ffn.router', 'ffn.shared_gate')
  assert normed == Edge(producer='ffn_norm', through=Normed(), consumers=scores + networks)
  assert routed == Edge(producer='ffn.up', through=Gated(gate='ffn.gate'), consumers=('ffn.down',))
  through = Gated(gate='ffn.shared.gate')
  assert shared == Edge(producer='ffn.shared.up', through=through, consumers=('ffn.shared.down',))
  assert BIASED.edges('ffn')[1].through == Activated(function='relu')
  assert 'a limit or an offset' in GPT_OSS.edges('ffn')[1].obstacle
  for name, ffn in KINDS.items():
    block = transformer.abstract(_config(ffn)).layers[0]
    wiring, layers = block.layer.wiring, transformer.linears(block)
    assert sorted(layers) == sorted(layer for stage in wiring.stages for layer in stage), name
    writers = {layer for layer, linear in layers.items() if linear.axes[-1] == 'D'}
    assert writers == {write.layer for write in wiring.writes}, name


def test_parameters_flops_and_bytes_by_hand():
  expert, shared = 3 * 32 * 16, 3 * 32 * 48
  router, attention, dense_ffn = 32 * 5 + 32, 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48
  rest = shared + router + dense_ffn + 2 * attention
  count = cost.parameters(MIXED)
  assert count.non_embedding == 5 * expert + rest + 5 * 32
  assert count.total - count.active == 2 * expert
  assert cost.decode_flops_per_token(MIXED, 4).linear == 2 * (3 * expert + rest)
  values = {
    p: v.get_value() for p, v in transformer.parameters(transformer.abstract(MIXED)).items()
  }
  weights = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), values)
  cache = cost.kv_cache_bytes(MIXED, 4)
  read = cost.decode_bytes_per_token(MIXED, weights, 4)
  assert read - cache == 4 * (count.active - 39 * 32)  # one row of the embedding
  # A bias of experts is read with them, that of the router whole.
  biased = _config(BIASED)
  idle = cost.parameters(biased).total - cost.parameters(biased).active
  assert idle == 2 * (2 * 32 * 16 + 16 + 32)


def test_a_batch_that_chooses_at_random_touches_so_many_experts(rng):
  path, draws = 'layers.0.ffn.up.weight', 4000
  assert cost.touched(MIXED, 'layers.1.ffn.up.weight', 4) == 1  # that one is dense
  for rows in (1, 2, 4):
    chosen = np.argsort(rng.random((draws, rows, 5)), axis=-1)[..., :3]  # 3 of 5 each
    distinct = np.mean([len(np.unique(draw)) for draw in chosen]) / 5
    # Five standard errors of a share whose spread is below 1 / 4.
    assert cost.touched(MIXED, path, rows) == pytest.approx(distinct, abs=5 / 4 / draws**0.5)
  values = {
    p: v.get_value() for p, v in transformer.parameters(transformer.abstract(MIXED)).items()
  }
  weights = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), values)
  one, two = (cost.decode_bytes_per_step(MIXED, weights, 4, batch=b) for b in (1, 2))
  expert, extra = 3 * 32 * 16, 5 * (0.4 - 0.16)  # experts that a second row adds
  row, cache = 4 * 32, cost.kv_cache_bytes(MIXED, 4)
  assert two - one == pytest.approx(4 * extra * expert + row + cache, abs=3)


def test_channels_are_removed_from_experts_and_not_from_shared_ones(tokens_BT):
  config = _config(QWEN, QWEN)
  model, kept = _model(config), np.array([0, 3, 4, 7, 8, 9, 12, 15])
  for block in model.layers:  # the channels that go have no effect
    gone = jnp.asarray(np.setdiff1d(np.arange(16), kept))
    param = block.ffn.down.weight
    param.set_value(param.get_value().at[:, gone].set(0))
  smaller = units.build(*units.cut(model, units.Kept(channels={0: kept, 1: kept})))
  assert smaller.config == _config(*[dataclasses.replace(QWEN, width=8)] * 2)
  np.testing.assert_allclose(
    _logits(smaller, tokens_BT), _logits(model, tokens_BT), atol=10 * TOLERANCE
  )


def test_slopes_of_gates_are_those_of_finite_differences(tokens_BT):
  model = _model(_config(QWEN))
  loss, values, opened = gates.GatedLoss.of(model), gates.values_of(model), gates.ones(model.config)
  call = jax.jit(jax.value_and_grad(loss, argnums=1))
  slopes = call(values, opened, tokens_BT)[1]
  for unit, i in (('F', 5), ('F', 11), ('K', 0)):
    moved = [{**opened, unit: [opened[unit][0].at[i].add(step)]} for step in (STEP, -STEP)]
    a, b = (float(call(values, gate, tokens_BT)[0]) for gate in moved)
    assert float(slopes[unit][0][i]) == pytest.approx((a - b) / (2 * STEP), abs=SLOPE)


def test_a_recipe_compresses_experts_and_leaves_decisions_exact(tokens_BT):
  model = _model(MIXED)
  steps = [{'round_to_nearest': {'format': 'int8', 'group_size': 16}}]
  parsed = recipe.parse({'name': 'x', 'steps': steps})
  compressed, ledger = pipeline.compress(model, parsed, tokens_BT)
  before, after = transformer.matrices(model), transformer.matrices(compressed)
  decide = {'layers.0.ffn.router', 'layers.0.ffn.shared_gate'}
  assert set(transformer.matching_layers(model, ['layers.*'])) == set(before) - decide - {'head'}
  exact = {path for path, w in after.items() if isinstance(w, jax.Array)}
  assert exact == decide | {'head'}
  for path in exact:
    np.testing.assert_array_equal(after[path], before[path])
  assert {row.layer for row in ledger.layers} >= {'layers.0.ffn.up', 'layers.0.ffn.shared.up'}
  for path in set(after) - exact:
    step = np.abs(np.asarray(before[path])).max() / 127
    assert np.abs(np.asarray(dense(after[path]) - before[path])).max() < 4 * step, path


def test_experts_are_divided_among_devices(tokens_BT):
  model = _model(_config(DEEPSEEK))
  expected = _logits(model, tokens_BT)
  sharding.shard(model, sharding.make_mesh(expert=4, model=2))
  ffn = model.layers[0].ffn
  spec = lambda linear: tuple(linear.weight.get_value().sharding.spec)
  assert spec(ffn.up) == ('expert', None, 'model') and spec(ffn.shared.up) == (None, 'model')
  np.testing.assert_allclose(_logits(model, tokens_BT), expected, atol=10 * TOLERANCE)


@pytest.mark.parametrize(
  'fields, why',
  [
    ({'experts': 0}, 'number of experts must be an integer of at least 1'),
    ({'width': 0}, 'width of an expert must be'),
    ({'shared_gate': True}, 'there is nothing to gate'),
    ({'activation': 'swish'}, "activation 'swish' is not one of"),
    ({'experts': 1}, 'cannot choose 2 experts of 1'),
    ({'router': Router(choices=1, chooser='expert')}, 'which a decoder must not see'),
  ],
)
def test_bad_configs_are_refused(fields, why):
  with pytest.raises(ValueError, match=why):
    dataclasses.replace(MIXTRAL, **fields)
