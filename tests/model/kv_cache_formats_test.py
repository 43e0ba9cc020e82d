"""Tests the stored codes of quantized caches against numpy in float64, for all ways of feeding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kv_cache
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.paged import PAGE, PagedCache
from model.layers.mixers.sides import Floats
from model.layers.mixers.slots import SlotCache

B, K, H = 2, 2, 40  # 40 channels are 5 groups of 8
CAPACITY = 3 * PAGE
# A scale or minimum in float16 is off by at most this share of itself.
HALF_ULP = 2.0**-11
LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=K, kv_heads=K, head_width=H), ffn=FeedForwardConfig(width=8)
)
CONFIG = ModelConfig(family='llama', vocab_size=5, width=8, layers=(LAYER,), max_positions=99)
formats = pytest.mark.parametrize('format', ['int8', 'int4'])


def _empty(format, batch=B, capacity=CAPACITY, dtype=jnp.float32):
  return kv_cache.init(CONFIG, batch, capacity, dtype, format)[0]


def _draw(rng, length, batch=B):
  """Draws keys with a few large, offset channels, as in trained models, and plain values."""
  k = rng.normal(size=(batch, length, K, H))
  k[..., 3] = k[..., 3] * 5 + 30
  return k.astype(np.float32), rng.normal(size=(batch, length, K, H)).astype(np.float32)


@jax.jit
def _update(cache, k, v, positions_BT):
  """The cache with new tokens, and the keys and values that they see."""
  if isinstance(cache, PagedCache):
    return cache.update(k, v, positions_BT)
  new = cache.written(k, v, positions_BT)
  seen = (
    side.codes_BSKH.astype(jnp.float32) * side.scales_BSK.astype(jnp.float32)[..., None]
    for side in (new.keys, new.values)
  )
  return new, *(x.astype(k.dtype) for x in seen)


def _feed(cache, k, v, lengths):
  """Feeds all rows from slot 0 on, `lengths` tokens at a time; returns the last `update`."""
  start = 0
  for length in lengths:
    positions = np.broadcast_to(np.arange(start, start + length), (len(k), length))
    part = slice(start, start + length)
    cache, *seen = _update(cache, k[:, part], v[:, part], jnp.asarray(positions))
    start += length
  assert start == k.shape[1]
  return cache, *(np.asarray(x) for x in seen)


def _complete(cache, count):
  """Returns what is stored for the first `count` tokens: all of int8, whole pages of int4."""
  slots = count // PAGE if isinstance(cache, PagedCache) else count
  return [np.asarray(leaf)[:, :slots] for leaf in jax.tree.leaves((cache.keys, cache.values))]


def _assert_same(left, right):
  for a, b in zip(left, right, strict=True):
    np.testing.assert_array_equal(a, b)


def _grid(x, axis):
  """Computes textbook asymmetric 4-bit codes: (codes, scales, minima) along `axis`."""
  low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
  low = low.astype(np.float16).astype(np.float64)
  scale = ((high - low) / 15).astype(np.float16).astype(np.float64)
  return np.clip(np.round((x - low) / scale), 0, 15), scale, low


def _decoded(grid):
  return grid[0] * grid[1] + grid[2]


def test_int8_has_one_symmetric_scale_per_token_and_head(rng):
  k, v = _draw(rng, 7)
  cache, seen_k, seen_v = _feed(_empty('int8', capacity=7), k, v, [7])
  for x, side, seen in ((k, cache.keys, seen_k), (v, cache.values, seen_v)):
    x = x.astype(np.float64)
    scales = (np.abs(x).max(-1) / 127).astype(np.float16)
    np.testing.assert_array_equal(side.scales_BSK, scales)
    codes = np.clip(np.round(x / scales.astype(np.float64)[..., None]), -127, 127)
    np.testing.assert_array_equal(side.codes_BSKH, codes)
    # Half a step, plus the clipping of the largest value if the scale was rounded down.
    bound = (0.5 + 127 * HALF_ULP) * scales.astype(np.float64)[..., None]
    assert (np.abs(seen - x) <= bound).all()
    np.testing.assert_allclose(seen, codes * scales.astype(np.float64)[..., None], rtol=1e-6)


def test_int4_keys_are_coded_by_channel_and_values_by_token(rng):
  k, v = _draw(rng, 2 * PAGE)
  cache, *_ = _feed(_empty('int4'), k, v, [2 * PAGE])
  paged_k = k.astype(np.float64).reshape(B, 2, PAGE, K, H)
  grouped_v = v.astype(np.float64).reshape(B, 2, PAGE, K, 5, 8)
  for x, grid, side in (
    (paged_k, _grid(paged_k, 2), cache.keys),
    (grouped_v, _grid(grouped_v, 5), cache.values),
  ):
    codes, scales, minima = grid
    shape = (B, 2, PAGE, K, H)
    np.testing.assert_array_equal(side.scales[:, :2], scales.reshape(*side.scales[:, :2].shape))
    np.testing.assert_array_equal(side.minima[:, :2], minima.reshape(*side.minima[:, :2].shape))
    low, high = np.split(codes.reshape(shape).astype(np.uint8), 2, -1)
    np.testing.assert_array_equal(side.codes[:, :2], low + 16 * high)
    decoded = np.asarray(side.decode())[:, :2]
    np.testing.assert_allclose(decoded, _decoded(grid).reshape(shape), rtol=1e-5, atol=1e-5)
    bound = (0.5 + 15 * HALF_ULP) * scales + HALF_ULP * np.abs(minima)
    assert (np.abs(decoded.reshape(x.shape) - x) <= bound + 1e-5).all()
  # The large channel has a scale of its own: the others keep their resolution.
  assert np.median(cache.keys.scales[:, :2, ..., :3]) < 0.5


def test_an_int4_token_sees_its_own_page_exactly_and_earlier_pages_as_stored(rng):
  k, v = _draw(rng, CAPACITY)
  cache, count = _empty('int4'), 0
  pages = k.astype(np.float64).reshape(B, 3, PAGE, K, H)
  stored_k = _decoded(_grid(pages, 2)).reshape(B, CAPACITY, K, H)
  stored_v = _decoded(_grid(v.astype(np.float64).reshape(B, CAPACITY, K, 5, 8), 4)).reshape(v.shape)
  for length in (PAGE - 1, 1, 1, 9, 30, 1):
    now = slice(count, count + length)
    positions = jnp.asarray(np.broadcast_to(np.arange(count, count + length), (B, length)))
    cache, seen_k, seen_v = _update(cache, k[:, now], v[:, now], positions)
    edge, count = count // PAGE * PAGE, count + length
    for seen, exact, stored in ((seen_k, k, stored_k), (seen_v, v, stored_v)):
      np.testing.assert_array_equal(seen[:, edge:count], exact[:, edge:count])
      np.testing.assert_allclose(seen[:, :edge], stored[:, :edge], rtol=1e-5, atol=1e-5)
      assert edge == 0 or np.abs(seen[:, :edge] - exact[:, :edge]).max() > 0.01


@formats
@pytest.mark.parametrize('count', [PAGE - 1, 2 * PAGE, 75, CAPACITY])
@pytest.mark.quick(count=(PAGE - 1, 75))
def test_stored_codes_do_not_depend_on_how_tokens_are_fed(rng, format, count):
  k, v = _draw(rng, count)
  one_by_one, *_ = _feed(_empty(format), k, v, [1] * count)
  splits = ([count], [count - 9] + [1] * 9, [25, 1, count - 26], [min(count - 1, 40)])
  for lengths in splits:
    lengths = [*lengths, count - sum(lengths)] if sum(lengths) < count else lengths
    cache, *_ = _feed(_empty(format), k, v, lengths)
    _assert_same(_complete(cache, count), _complete(one_by_one, count))
    if format == 'int4' and count < CAPACITY:
      rest, edge = count % PAGE, count // PAGE * PAGE
      np.testing.assert_array_equal(cache.recent_k_BSKH[:, :rest], k[:, edge:])
      np.testing.assert_array_equal(cache.recent_v_BSKH[:, :rest], v[:, edge:])
      np.testing.assert_array_equal(cache.page_B, one_by_one.page_B)


@formats
@pytest.mark.parametrize('batch', [3, 9])  # unrolled, and mapped
def test_ragged_rows_equal_the_same_rows_alone(rng, format, batch):
  k, v = _draw(rng, CAPACITY, batch)
  lengths, steps = np.resize([1, 40, 63], batch), 3
  # Padded as in generation: one shape, and padding repeats the last position of its row.
  positions = np.minimum(np.arange(64)[None], lengths[:, None] - 1)
  padded = [np.array(x[:, :64]) for x in (k, v)]
  for x in padded:
    x[np.arange(64)[None] >= lengths[:, None]] = 1000.0
  together, *_ = _update(_empty(format, batch), *padded, jnp.asarray(positions))
  for step in range(steps):
    at = (lengths + step)[:, None]
    token = [np.take_along_axis(x, at[..., None, None], 1) for x in (k, v)]
    together, *seen = _update(together, *token, jnp.asarray(at))
  for b in range(3):
    count = lengths[b] + steps
    parts = [lengths[b]] + [1] * steps
    alone, *alone_seen = _feed(_empty(format, 1), k[b : b + 1, :count], v[b : b + 1, :count], parts)
    row = jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], together)
    _assert_same(_complete(row, count), _complete(alone, count))
    _assert_same([x[b, :count] for x in seen], [x[0, :count] for x in alone_seen])


@formats
def test_a_row_can_be_rewound(rng, format):
  k, v = _draw(rng, 70)
  cache, seen_k, _ = _feed(_empty(format), k, v, [70])
  put = lambda cache, at: _update(cache, k[:, :1], v[:, :1], jnp.full((B, 1), at))
  # Within the last page the values are exact; an earlier page is read as it was stored.
  _, within, _ = put(cache, 66)
  back, before, _ = put(cache, 40)
  if format == 'int8':
    np.testing.assert_array_equal(within[:, :66], seen_k[:, :66])
    np.testing.assert_array_equal(before[:, :40], seen_k[:, :40])
  else:
    np.testing.assert_array_equal(within[:, 64:66], k[:, 64:66])
    np.testing.assert_array_equal(within[:, :64], before[:, :64].at[:, 40].set(within[:, 40]))
    np.testing.assert_array_equal(before[:, 40], k[:, 0])
    np.testing.assert_allclose(before[:, 32:40], k[:, 32:40], atol=0.7)  # half a step
    # The tokens that follow are exact within the page.
    _, after, _ = put(back, 41)
    np.testing.assert_array_equal(after[:, 32:41], before[:, 32:41])


@formats
@pytest.mark.parametrize('value', [0.0, 3.0, -1e-7, 1e-3])
@pytest.mark.quick(value=(0.0, -1e-7))
def test_constant_groups_are_exact_up_to_float16(format, value):
  x = np.full((B, 2 * PAGE, K, H), value, np.float32)
  cache, *_ = _feed(_empty(format), x, x, [2 * PAGE])
  one = np.full((B, 1, K, H), value, np.float32)
  _, seen_k, seen_v = _update(cache, one, one, jnp.full((B, 1), 2 * PAGE))
  for seen in (seen_k, seen_v):
    # Near zero, float16 has steps of 2**-24; the code 127 multiplies an error of half a step.
    atol = 127 * 2.0**-25
    np.testing.assert_allclose(seen[:, : 2 * PAGE], x, rtol=HALF_ULP, atol=atol)


@formats
def test_half_precision_keys_are_exact_until_they_are_encoded(rng, format):
  k, v = (np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in _draw(rng, CAPACITY))
  empty = _empty(format, dtype=jnp.bfloat16)
  whole, seen_k, seen_v = _feed(empty, k, v, [CAPACITY])
  assert seen_k.dtype == seen_v.dtype == jnp.bfloat16
  if format == 'int4':
    _assert_same([seen_k, seen_v], [k, v])
  # A page that is decoded and encoded again would differ in bfloat16.
  for lengths in ([40, 56], [31, 1, 64], [1] * CAPACITY):
    cache, *_ = _feed(empty, k, v, lengths)
    _assert_same(_complete(cache, CAPACITY), _complete(whole, CAPACITY))


@pytest.mark.parametrize(
  'format, expected',
  [
    ('float', 2 * 40 * 64 * 2),
    ('int8', 2 * 40 * (64 + 2)),
    # Two pages of codes, keys' scales and minima a page, values' a token, and a page in bfloat16.
    ('int4', 2 * 64 * 32 + 2 * 2 * 64 * 2 + 2 * 64 * 2 * 2 + 2 * 32 * 64 * 2 + 4),
  ],
)
def test_stored_bytes_match_a_count_by_hand(format, expected):
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=1, kv_heads=1, head_width=64), ffn=FeedForwardConfig(width=8)
  )
  (cache,) = kv_cache.init(CONFIG.replace(layers=(layer,)), 1, 40, jnp.bfloat16, format)
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == expected
  assert cache.capacity == (64 if format == 'int4' else 40)


@formats
def test_an_empty_cache_is_zero_and_shares_no_buffers(format):
  leaves = jax.tree.leaves(_empty(format))
  assert not any(np.any(leaf) for leaf in leaves)
  assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@formats
def test_decoding_updates_the_donated_cache_in_place(rng, format):
  cache = _empty(format)
  k, v = (jnp.asarray(x) for x in _draw(rng, 1))
  update = jax.jit(_update.__wrapped__, donate_argnums=0)
  compiled = update.lower(cache, k, v, jnp.full((B, 1), 40)).compile()
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
  assert compiled.memory_analysis().alias_size_in_bytes >= held
  codes = jax.tree.leaves(cache)[0]
  kind = {'int8': 's8', 'int4': 'u8'}[format]
  whole = f'{kind}[{",".join(map(str, codes.shape))}]'
  copies = [line for line in compiled.as_text().splitlines() if ' copy(' in line and whole in line]
  assert copies == []
  update(cache, k, v, jnp.full((B, 1), 40))
  assert codes.is_deleted()


def test_int4_refuses_heads_of_an_odd_width():
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=1, kv_heads=1, head_width=5), ffn=FeedForwardConfig(width=8)
  )
  with pytest.raises(ValueError, match='two channels a byte, but a head has 5'):
    kv_cache.init(CONFIG.replace(layers=(layer,), rope=None), 1, 40, format='int4')


SHAPE = jax.ShapeDtypeStruct


@pytest.mark.parametrize(
  'format, side, field, shape',
  [
    ('int8', 'keys', 'scales_BSK', (2, 40, 3)),
    ('int8', 'values', 'codes_BSKH', (2, 41, 2, 16)),
    ('int4', 'keys', 'minima', (2, 3, 1, 2, 8)),
    ('int4', 'values', 'codes', (2, 4, 32, 2, 8)),
  ],
)
def test_sides_that_do_not_fit_are_refused_when_they_are_built(format, side, field, shape):
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=2, head_width=16), ffn=FeedForwardConfig(width=16)
  )
  (cache,) = jax.eval_shape(
    lambda: kv_cache.init(CONFIG.replace(layers=(layer,)), 2, 40, jnp.float32, format)
  )
  one = getattr(cache, side)
  with pytest.raises(ValueError, match=r'axis [SPKH] of'):
    changed = dataclasses.replace(one, **{field: SHAPE(shape, getattr(one, field).dtype)})
    dataclasses.replace(cache, **{side: changed})


def test_a_float_cache_has_as_many_keys_as_values():
  with pytest.raises(ValueError, match=r'axis S of .*BSKH'):
    SlotCache(Floats(jnp.zeros((1, 4, 2, 8))), Floats(jnp.zeros((1, 5, 2, 8))))
