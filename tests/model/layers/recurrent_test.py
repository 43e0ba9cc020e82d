"""Recurrent mixers against their formulas over all pairs of tokens, and their caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import kv_cache, sharding, transformer
from model.config import ModelConfig, from_json, to_json
from model.eval import cost
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers import linear
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.delta import GatedDeltaConfig
from model.transformer import Transformer
from ops import masks, rope

WIDTH, LENGTH = 16, 90  # more than a chunk
DELTA = GatedDeltaConfig(key_heads=2, value_heads=4, key_width=6, value_width=5)
MIXERS = {
  'linear': linear.linear_attention(2, 6, 5),
  'retnet': linear.retnet(2, 6, 5),
  'gla': linear.gla(2, 6, 5),
  'gated_delta': DELTA,
}
kinds = pytest.mark.parametrize('kind', MIXERS)
# Float32 sums in another order, of values of order 1.
TOLERANCE = 1e-5


def _config(mixer, depth=1) -> ModelConfig:
  layer = LayerConfig(mixer=mixer, ffn=FeedForwardConfig(width=24))
  return ModelConfig(
    family='llama', vocab_size=40, width=WIDTH, layers=(layer,) * depth, max_positions=256
  )


@functools.cache
def _split(kind):
  """A model in which every parameter differs from its initial value, as structure and state."""
  model, rng = Transformer(_config(MIXERS[kind]), rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for path, param in transformer.parameters(model).items():
    value = param.get_value()
    noise = rng.normal(size=value.shape) * (0.3 if value.ndim > 1 else 0.1)
    if 'log_decay' not in path:
      param.set_value(value + jnp.asarray(noise, value.dtype))
  return nnx.split(model)


@functools.cache
def _programs(kind):
  """(logits of rows, logits and cache of tokens at positions)."""
  graphdef, state = _split(kind)

  @jax.jit
  def whole(state, tokens_BT, segments_BT=None):
    return nnx.merge(graphdef, state)(tokens_BT, segments_BT=segments_BT)

  @jax.jit
  def step(state, tokens_BT, positions_BT, cache):
    model = nnx.merge(graphdef, state)
    x_BTD, cache = model.hidden(tokens_BT, positions_BT=positions_BT, cache=cache)
    return model.logits(x_BTD), cache

  run = lambda *given: np.asarray(whole(state, *map(jnp.asarray, given)))
  return run, lambda *given: step(state, *given)


def _tokens(rows=2, length=LENGTH, seed=0):
  return np.random.default_rng(seed).integers(0, 40, (rows, length)).astype(np.int32)


def _silu(x):
  return x / (1 + np.exp(-x))


def _by_hand(kind, module, x_BTD):
  """The output of a mixer by the formulas of the papers, pair by pair of tokens, in float64."""
  params = {p: np.float64(v.get_value()) for p, v in transformer.parameters(module).items()}
  x = np.float64(x_BTD)
  of = lambda name, x=x: x @ params[f'{name}.weight'] + params.get(f'{name}.bias', 0)
  split = lambda a, width: a.reshape(*a.shape[:2], -1, width)
  q, k = (split(of(one), 6) for one in ('query', 'key'))
  v, (batch, length) = split(of('value'), 5), x.shape[:2]
  if kind == 'retnet':
    cos, sin = rope.cos_sin(masks.causal(batch, length).q_positions_BT, rope.RopeConfig(), 6)
    q, k = (np.float64(rope.rotate(jnp.float32(a), cos, sin)) for a in (q, k))
  if kind == 'linear':
    q, k = (np.where(a > 0, a + 1, np.exp(np.minimum(a, 0))) for a in (q, k))
  decay = np.ones((batch, length, 2, 6))
  if kind == 'retnet':
    decay *= (1 - 2.0 ** -(5 + np.arange(2)))[:, None]
  if kind == 'gla':
    logits = of('decay_out', of('decay_in'))
    decay = split((1 / (1 + np.exp(-logits))) ** (1 / 16), 6)
  y = np.zeros((batch, length, 2, 5))
  for b, t, n in np.ndindex(batch, length, 2):
    passed = np.ones(6)  # the decays after token s up to t
    weights = np.zeros(t + 1)
    for s in range(t, -1, -1):
      weights[s] = np.sum(q[b, t, n] * k[b, s, n] * passed)
      passed = passed * decay[b, s, n]
    weights = weights / weights.sum() if kind == 'linear' else weights / 6**0.5
    y[b, t, n] = weights @ v[b, : t + 1, n]
  if kind != 'linear':
    y /= np.sqrt(np.square(y).mean(-1, keepdims=True) + 1e-5)
    y = y * params['head_norm.scale'] * _silu(split(of('gate'), 5))
  return y.reshape(batch, length, -1) @ params['output.weight']


@pytest.mark.parametrize('kind', ['linear', 'retnet', 'gla'])
def test_the_module_computes_the_formula(rng, kind):
  block = nnx.merge(*_split(kind)).layers[0]
  x_BTD = rng.normal(size=(2, 20, WIDTH)).astype(np.float32)
  mask = masks.causal(2, 20)
  width = block.attention.config.rotated
  angles = width and rope.cos_sin(mask.q_positions_BT, rope.RopeConfig(), width)
  y_BTD, _ = jax.jit(lambda x: block.attention(x, angles, mask))(x_BTD)
  expected = _by_hand(kind, block.attention, x_BTD)
  np.testing.assert_allclose(y_BTD, expected, atol=TOLERANCE * np.abs(expected).max())


@kinds
def test_decoding_in_any_pieces_is_the_forward_pass(kind):
  """Padded rows of different lengths, pieces across chunks, tokens one by one."""
  run, step = _programs(kind)
  tokens_BT, lengths_B = _tokens(), np.array([71, 5])
  expected = run(tokens_BT)
  cache = kv_cache.init(_config(MIXERS[kind]), 2, 128)
  positions_BT = np.minimum(np.arange(80)[None], lengths_B[:, None] - 1).astype(np.int32)
  spoilt_BT = np.where(np.arange(80)[None] < lengths_B[:, None], tokens_BT[:, :80], 39)
  logits, cache = step(spoilt_BT, positions_BT, cache)
  for b, length in enumerate(lengths_B):
    np.testing.assert_allclose(logits[b, :length], expected[b, :length], atol=TOLERANCE)
  for length in (1, 1, 3, 1, 3):
    at_BT = lengths_B[:, None] + np.arange(length, dtype=np.int32)[None]
    piece_BT = np.take_along_axis(tokens_BT, at_BT, 1)
    logits, cache = step(piece_BT, at_BT.astype(np.int32), cache)
    wanted = np.take_along_axis(expected, at_BT[..., None], 1)
    np.testing.assert_allclose(logits, wanted, atol=TOLERANCE)
    lengths_B = lengths_B + length


@kinds
@pytest.mark.quick(kind=('linear', 'gated_delta'))
def test_packed_documents_are_those_alone(kind):
  run, _ = _programs(kind)
  tokens_BT, ends = _tokens(), (0, 1, 3, 66, 90)
  segments_BT = np.repeat(np.arange(4), np.diff(ends))[None].repeat(2, 0)
  packed = run(tokens_BT, segments_BT)
  for begin, end in zip(ends[:-1], ends[1:]):
    alone = run(np.pad(tokens_BT[:, begin:end], ((0, 0), (0, LENGTH - end + begin))))
    np.testing.assert_allclose(packed[:, begin:end], alone[:, : end - begin], atol=TOLERANCE)


@kinds
def test_a_suffix_changes_nothing_before_it_and_rows_keep_to_themselves(kind):
  run, _ = _programs(kind)
  tokens_BT, others_BT = _tokens(), _tokens(seed=1)
  expected = run(tokens_BT)
  for cut in (1, 64, 70):
    mixed_BT = np.concatenate([tokens_BT[:, :cut], others_BT[:, cut:]], 1)
    found = run(mixed_BT)
    np.testing.assert_array_equal(found[:, :cut], expected[:, :cut])
    assert np.abs(found[:, -1] - expected[:, -1]).max() > 1e-4  # it remembers so far
  for b in range(2):
    np.testing.assert_allclose(run(tokens_BT[b : b + 1]), expected[b : b + 1], atol=TOLERANCE)


@kinds
@pytest.mark.quick(kind=('retnet', 'gated_delta'))
def test_a_cache_begins_anew_at_position_0_and_takes_rows_of_others(kind):
  _, step = _programs(kind)
  tokens_BT, config = _tokens(length=6), _config(MIXERS[kind])
  positions = lambda start, length, rows=2: np.broadcast_to(
    np.arange(start, start + length, dtype=np.int32), (rows, length)
  )
  fresh = kv_cache.init(config, 2, 32)
  first, used = step(tokens_BT[:, :3], positions(0, 3), fresh)
  again, anew = step(tokens_BT[:, :3], positions(0, 3), used)
  np.testing.assert_array_equal(again, first)
  jax.tree.map(np.testing.assert_array_equal, anew, used)
  one = kv_cache.init(config, 1, 32)
  _, one = step(tokens_BT[1:, :3], positions(0, 3, 1), one)
  joined = kv_cache.insert(used, 0, one)
  rows_BT = tokens_BT[[1, 1]]
  found, _ = step(rows_BT[:, 3:], positions(3, 3), joined)
  np.testing.assert_allclose(found[0], found[1], atol=TOLERANCE)


@kinds
@pytest.mark.quick(kind=('gla', 'gated_delta'))
def test_a_cache_has_the_size_of_no_context_and_meshes_divide_it(kind):
  mixer, config = MIXERS[kind], _config(MIXERS[kind])
  held = lambda caches: sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
  heads, values = (4, 5) if mixer is DELTA else (2, 5 + mixer.normalized)
  state, rest = 4 * heads * 6 * values, 2 * 3 * (6 * 2 * 2 + 5 * 4) * (mixer is DELTA)
  for format in kv_cache.FORMATS:
    caches = kv_cache.init(config, 1, 10_000, jnp.bfloat16, format)
    assert held(caches) == state + rest == cost.kv_cache_bytes(config, 7, jnp.bfloat16, format)
    assert caches[0].state_BNHZ.dtype == jnp.float32 and caches[0].capacity is None
  assert cost.kv_bytes_per_token(config) == 0
  flops = cost.decode_flops_per_token(config, 9).attention
  conv = 2 * 4 * (2 * 12 + 20) if mixer is DELTA else 0
  assert flops == (6 if mixer is DELTA else 4) * heads * 6 * values + conv
  assert cost.prefill_flops_per_token(config, 999).attention == flops
  (placed,) = kv_cache.init(config, 4, 8, mesh=sharding.make_mesh(data=2, model=2))
  for a, letters in zip(jax.tree.leaves(placed), jax.tree.leaves(placed.letters())):
    ways = [{'B': 2, 'K': 2, 'N': 2}.get(letter, 1) for letter in letters]
    assert a.sharding.shard_shape(a.shape) == tuple(n // way for n, way in zip(a.shape, ways))


@kinds
def test_configs_survive_json(kind):
  assert from_json(to_json(_config(MIXERS[kind]))) == _config(MIXERS[kind])


def test_gates_of_attention_multiply_what_heads_find(rng):
  config = _config(AttentionConfig(query_heads=2, kv_heads=1, head_width=8, gated=True))
  block = Transformer(config, rngs=nnx.Rngs(0)).layers[0]
  plain = Transformer(
    _config(AttentionConfig(query_heads=2, kv_heads=1, head_width=8)), rngs=nnx.Rngs(0)
  ).layers[0]
  gated, attention = block.attention, plain.attention
  for name in ('query', 'key', 'value'):
    weight = getattr(gated, name).weight.get_value()
    getattr(attention, name).weight.set_value(weight)
  attention.output.weight.set_value(jnp.eye(WIDTH))
  x_BTD, mask = jnp.asarray(rng.normal(size=(2, 9, WIDTH)), jnp.float32), masks.causal(2, 9)
  found_BTN = np.float64(attention(x_BTD, None, mask)[0])
  gate_BTN = 1 / (1 + np.exp(-np.float64(x_BTD) @ np.float64(gated.gate.weight.get_value())))
  expected = found_BTN * gate_BTN @ np.float64(gated.output.weight.get_value())
  np.testing.assert_allclose(gated(x_BTD, None, mask)[0], expected, atol=1e-7)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: linear.gla(0, 6, 5), 'heads must be an integer of at least 1, not 0'),
    (lambda: linear.LinearConfig(heads=1, key_width=2, value_width=2, decay='slow'), "'slow'"),
    (
      lambda: linear.LinearConfig(
        heads=1, key_width=2, value_width=2, normalized=True, rotates=True
      ),
      'set one of normalized and rotates',
    ),
    (
      lambda: GatedDeltaConfig(key_heads=2, value_heads=3, key_width=4, value_width=4),
      '3 value heads do not divide into 2 key heads',
    ),
  ],
)
def test_bad_fields_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
