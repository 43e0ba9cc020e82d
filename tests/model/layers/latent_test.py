"""Latent attention: equal to other heads at full rank, and its two forms to each other."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import kv_cache, sharding, units
from model.config import ModelConfig, from_json, to_json
from model.eval import cost
from model.layers.basic import StreamConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.latent import LatentConfig
from model.transformer import Transformer, linears, parameters
from ops import masks, rope

# Both add the same products in another order, in float32; outputs are of order 1.
TOLERANCE = 1e-5
D, VOCABULARY, LENGTH = 32, 50, 20
HALF_ULP = 2.0**-11  # of a scale in float16, as a share of it
DEEPSEEK = LatentConfig(
  query_heads=4,
  kv_heads=4,
  still_width=6,
  rotary_width=4,
  value_width=8,
  rank=16,
  query_rank=12,
  qkv_bias=True,
)
# As a conversion makes it: no norms, groups with rotated keys of their own, some of the pairs.
CONVERTED = LatentConfig(
  query_heads=4,
  kv_heads=2,
  still_width=4,
  rotary_width=4,
  value_width=12,
  rank=10,
  shared_rotary=False,
  pairs=(0, 2),
  full_rotary_width=8,
  latent_norms=False,
)
MIXERS = {
  'deepseek': DEEPSEEK,
  'converted': CONVERTED,
  'still': dataclasses.replace(DEEPSEEK, rotary_width=0),
  'turned': dataclasses.replace(CONVERTED, still_width=0),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ('still', 'turned')]
mixers = pytest.mark.parametrize('name', ['deepseek', 'converted', *SLOW])


def _config(mixer, layers=2) -> ModelConfig:
  layer = LayerConfig(mixer=mixer, ffn=FeedForwardConfig(width=24))
  return ModelConfig(
    family='llama', vocab_size=VOCABULARY, width=D, layers=(layer,) * layers, max_positions=64
  )


def _model(mixer, layers=2) -> Transformer:
  """A model in which no parameter has its initial value."""
  model, rng = Transformer(_config(mixer, layers), rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for param in parameters(model).values():
    value = param.get_value()
    param.set_value(jnp.asarray(value + 0.2 * rng.standard_normal(value.shape), value.dtype))
  return model


@functools.partial(jax.jit, static_argnums=0)
def _whole(graphdef, state, tokens_BT):
  return nnx.merge(graphdef, state)(tokens_BT)


@functools.partial(jax.jit, static_argnums=0)
def _part(graphdef, state, tokens_BT, positions_BT, caches):
  own = nnx.merge(graphdef, state)
  x_BTD, caches = own.hidden(tokens_BT, positions_BT=positions_BT, cache=caches)
  return own.logits(x_BTD), caches


def _logits(model, tokens_BT):
  return np.asarray(_whole(*nnx.split(model), tokens_BT))


def _step(model):
  """The compiled (tokens_BT, positions_BT, caches) -> (logits_BTV, caches)."""
  return functools.partial(_part, *nnx.split(model))


def _fed(model, tokens_BT, lengths, format='float'):
  """Logits of tokens that are fed to a cache in parts of these lengths, and the caches."""
  step = _step(model)
  caches, at, found = kv_cache.init(model.config, len(tokens_BT), 32, format=format), 0, []
  for length in lengths:
    part = tokens_BT[:, at : at + length]
    positions_BT = np.broadcast_to(np.arange(at, at + length, dtype=np.int32), part.shape)
    logits_BTV, caches = step(part, positions_BT, caches)
    found.append(logits_BTV)
    at += length
  return np.concatenate(found, 1), caches


@pytest.fixture(scope='module')
def tokens_BT():
  return np.random.default_rng(1).integers(0, VOCABULARY, (2, LENGTH), np.int32)


def _columns(width, count, rotary):
  """The columns of heads in the order of a latent's heads: what does not rotate comes first."""
  own = np.r_[np.arange(rotary, width), np.arange(rotary)]
  return (np.arange(count)[:, None] * width + own).reshape(-1)


@pytest.mark.parametrize('kv_heads', [4, 2])
def test_at_full_rank_it_is_grouped_attention(rng, kv_heads):
  width, rotary = 12, 4
  stream = StreamConfig(width=D, depth=1, norm='rms', norm_eps=1e-5, norm_offset=0.0)
  heads = AttentionConfig(
    query_heads=4, kv_heads=kv_heads, head_width=width, rotary_width=rotary, qkv_bias=False
  )
  own = LatentConfig(
    query_heads=4,
    kv_heads=kv_heads,
    still_width=width - rotary,
    rotary_width=rotary,
    value_width=width,
    rank=D,
    shared_rotary=False,
    latent_norms=False,
  )
  attention, latent = (c.build(stream, rngs=nnx.Rngs(0), dtype=jnp.float32) for c in (heads, own))
  for matrix in linears(attention).values():
    matrix.weight.set_value(10 * matrix.weight.get_value())
  key_DKH = attention.key.weight.get_value().reshape(D, kv_heads, width)
  flat = lambda w: w.reshape(D, -1)
  latent.query.weight.set_value(attention.query.weight.get_value()[:, _columns(width, 4, rotary)])
  latent.kv_down.weight.set_value(jnp.eye(D))
  latent.rotary_key.weight.set_value(flat(key_DKH[..., :rotary]))
  latent.key_up.weight.set_value(flat(key_DKH[..., rotary:]))
  latent.value_up.weight.set_value(attention.value.weight.get_value())
  latent.output.weight.set_value(attention.output.weight.get_value())
  x_BTD = jnp.asarray(rng.normal(size=(2, LENGTH, D)), jnp.float32)
  mask = masks.causal(2, LENGTH)
  angles = rope.cos_sin(mask.q_positions_BT, rope.RopeConfig(theta=100.0), rotary)
  weights = jnp.asarray(rng.normal(size=x_BTD.shape), jnp.float32)

  def value_and_slope(module):
    graphdef, state = nnx.split(module)
    run = lambda x: nnx.merge(graphdef, state)(x, angles, mask)[0]
    y_BTD, pull = jax.vjp(jax.jit(run), x_BTD)
    return y_BTD, *pull(weights)

  for expected, found in zip(value_and_slope(attention), value_and_slope(latent)):
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@mixers
def test_tokens_one_by_one_and_in_chunks_equal_a_whole_prompt(tokens_BT, name):
  model = _model(MIXERS[name])
  expected = _logits(model, tokens_BT)
  for lengths in ([LENGTH], [9, 11], [12] + [1] * 8):  # chunks of both forms
    found, _ = _fed(model, tokens_BT, lengths)
    np.testing.assert_allclose(found, expected, atol=10 * TOLERANCE, rtol=0)
  assert np.abs(expected).max() > 1


def test_the_form_changes_within_the_lengths_of_these_tests():
  assert [DEEPSEEK.absorbs(n) for n in (1, 9, 11, 12, 20)] == [True, True, True, False, False]
  assert [CONVERTED.absorbs(n) for n in (1, 6, 7)] == [True, True, False]


@mixers
def test_a_token_does_not_see_what_comes_after_it(tokens_BT, name):
  model, half = _model(MIXERS[name]), LENGTH // 2
  other = tokens_BT.copy()
  other[:, half:] = (other[:, half:] + 7) % VOCABULARY
  for run in (_logits, lambda model, t: _fed(model, t, [half + 2, LENGTH - half - 2])[0]):
    one, two = run(model, tokens_BT), run(model, other)
    np.testing.assert_array_equal(one[:, :half], two[:, :half])
    assert np.abs(one[:, half:] - two[:, half:]).max() > 0.1


@pytest.mark.parametrize('format', ['float', 'int8'])
def test_rows_of_different_lengths_do_not_touch_each_other(tokens_BT, format):
  model = _model(DEEPSEEK, layers=1)
  step = _step(model)
  lengths, padded = np.array([4, 13]), tokens_BT[:, :13].copy()
  positions_BT = np.minimum(np.arange(13, dtype=np.int32)[None], lengths[:, None] - 1)
  padded[0, 4:] = 9
  caches = kv_cache.init(model.config, 2, 32, format=format)
  _, caches = step(padded, positions_BT, caches)
  next_BT = np.stack([tokens_BT[b, [n]] for b, n in enumerate(lengths)])
  together, _ = step(next_BT, lengths[:, None].astype(np.int32), caches)
  for b, n in enumerate(lengths):
    alone, _ = _fed(model, tokens_BT[b : b + 1, : n + 1], [n, 1], format)
    np.testing.assert_allclose(together[b, 0], alone[0, -1], atol=10 * TOLERANCE)


def test_an_int8_cache_rounds_by_half_a_step_of_one_scale(tokens_BT):
  model = _model(DEEPSEEK, layers=1)
  (_, (exact,)), (logits, (coded,)) = (
    _fed(model, tokens_BT, [LENGTH - 1, 1], format) for format in ('float', 'int8')
  )
  x = np.float64(exact.tokens.floats(jnp.float32))[:, :LENGTH]
  scales = (np.abs(x).max(-1, keepdims=True) / 127).astype(np.float16).astype(np.float64)
  stored = np.float64(coded.tokens.floats(jnp.float32))[:, :LENGTH]
  # The two were computed in programs of their own, so a code may be one step away at a tie.
  assert (np.abs(stored - x) <= (0.5 + 127 * HALF_ULP) * scales + TOLERANCE).all()
  assert np.abs(stored - x).max() > 0.25 * scales.max()
  assert coded.tokens.codes_BSKH.shape == (2, 32, 1, DEEPSEEK.cached)
  expected = _fed(model, tokens_BT, [LENGTH - 1, 1])[0]
  assert 0 < np.abs(logits - expected).max() < 0.1


def test_the_last_token_reads_what_int8_stored(tokens_BT):
  """Attention to the decoded cache, by the expanded form in float64."""
  model = _model(dataclasses.replace(DEEPSEEK, query_rank=None, qkv_bias=False), layers=1)
  _, (coded,) = _fed(model, tokens_BT, [LENGTH - 1, 1], 'int8')
  own, c = model.layers[0].attention, model.config.layers[0].mixer
  w = {name: np.float64(linear.weight.get_value()) for name, linear in linears(own).items()}
  x_BTD = model.layers[0].mixer_input(model.embed(tokens_BT))
  mask = masks.causal(2, LENGTH)
  angles = rope.cos_sin(mask.q_positions_BT, model.config.rope, c.rotary_width)
  q_BTNH, _, _ = own._read(x_BTD, angles)
  stored = np.float64(coded.tokens.floats(jnp.float32))[:, :LENGTH, 0]
  latents, turned = stored[..., : c.rank], stored[..., c.rank :]
  k = (latents @ w['key_up']).reshape(2, LENGTH, 4, -1)
  v = (latents @ w['value_up']).reshape(2, LENGTH, 4, -1)
  expected = np.zeros((2, 4, c.value_width))
  for b in range(2):
    for n in range(4):
      keys = np.concatenate([k[b, :, n], turned[b]], -1)
      scores = keys @ np.float64(q_BTNH[b, -1, n]) / c.head_width**0.5
      p = np.exp(scores - scores.max())
      expected[b, n] = p @ v[b, :, n] / p.sum()
  positions = np.full((2, 1), LENGTH - 1, np.int32)
  found = own._absorbed(q_BTNH[:, -1:], coded, jnp.asarray(positions))
  np.testing.assert_allclose(found[:, 0], expected, atol=TOLERANCE)


def test_there_is_no_4_bit_cache_of_latents():
  with pytest.raises(ValueError, match="no cache of latents in the format 'int4'; use float, bf16"):
    kv_cache.init(_config(DEEPSEEK), 1, 32, format='int4')


@pytest.mark.parametrize('format', ['float', 'bf16', 'int8'])
def test_a_token_takes_as_many_bytes_as_the_formula_says(format):
  one, more = (kv_cache.init(_config(DEEPSEEK), 1, n, format=format) for n in (32, 33))
  size = lambda caches: sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
  numbers = 16 + 4
  bytes_of_token = {'float': 4 * numbers, 'bf16': 2 * numbers, 'int8': numbers + 2}[format]
  assert size(more) - size(one) == 2 * bytes_of_token
  assert cost.kv_cache_bytes(_config(DEEPSEEK), 1) == 2 * 2 * numbers


@pytest.mark.parametrize('name', ['deepseek', 'converted'])
@pytest.mark.quick(name=('converted',))
def test_devices_share_its_heads(tokens_BT, name):
  model = _model(MIXERS[name], layers=1)
  expected, _ = _fed(model, tokens_BT, [19, 1])
  mesh = sharding.make_mesh(model=2, fsdp=2)
  sharding.shard(model, mesh)
  axes = {path: linear.weight.get_value().sharding.spec for path, linear in linears(model).items()}
  assert axes['layers.0.attention.value_up'] == jax.sharding.PartitionSpec(None, 'model')
  assert axes['layers.0.attention.kv_down'] == jax.sharding.PartitionSpec('fsdp', None)
  found, caches = _fed(model, tokens_BT, [19, 1])
  np.testing.assert_allclose(found, expected, atol=10 * TOLERANCE)
  placed = kv_cache.init(model.config, 4, 32, mesh=mesh)[0]
  assert placed.tokens.x_BSKH.sharding.spec[0] == ('data', 'fsdp')
  assert caches[0].letters().tokens.x_BSKH == 'BSKH'


@pytest.mark.parametrize('name', MIXERS)
def test_its_config_is_written_and_read(name):
  config = _config(MIXERS[name])
  assert from_json(to_json(config)) == config
  assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize('name', ['deepseek', 'converted'])
@pytest.mark.quick(name=('deepseek',))
def test_heads_that_hand_on_nothing_can_be_removed(tokens_BT, name):
  model = _model(MIXERS[name])
  kv_heads, width = MIXERS[name].kv_heads, MIXERS[name].copies * MIXERS[name].value_width
  for block in model.layers:
    output = block.attention.output.weight
    output.set_value(output.get_value().at[:width].set(0))
  kept = np.arange(1, kv_heads)
  smaller = units.build(*units.cut(model, units.Kept(heads={0: kept, 1: kept})))
  assert smaller.config.layers[0].mixer.query_heads == (kv_heads - 1) * MIXERS[name].copies
  np.testing.assert_allclose(
    _logits(smaller, tokens_BT), _logits(model, tokens_BT), atol=10 * TOLERANCE
  )


def test_the_published_break_even_of_the_two_forms():
  lite = LatentConfig(
    query_heads=16, kv_heads=16, still_width=128, rotary_width=64, value_width=128, rank=512
  )
  assert (lite.absorbs(170), lite.absorbs(171)) == (True, False)
  assert lite.cached == 576
  # Scores and sums over the vectors of the cache.
  assert lite.decode_flops(1000) == 2 * 16 * (576 + 576) * 1000
  # Of a prompt, 192 wide keys and values that are filled up to them; half of the pairs.
  assert lite.prefill_flops(999) == 2 * 16 * (192 + 192) * 500


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'kv_heads': 3}, '4 query heads do not divide into 3'),
    ({'rank': 0}, 'rank must be an integer of at least 1, not 0'),
    ({'query_rank': 0}, 'query_rank must be an integer of at least 1'),
    ({'still_width': 0, 'rotary_width': 0}, 'a head needs elements'),
    ({'still_width': -1}, 'still_width must be an integer of at least 1, not -1'),
    ({'pairs': (0, 1)}, 'belong together'),
    ({'pairs': (1, 0), 'full_rotary_width': 8}, 'pairs must be 2 increasing numbers'),
    ({'pairs': (0, 4), 'full_rotary_width': 8}, 'a rope of 8 elements has no such pairs'),
  ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(DEEPSEEK, **changes)
