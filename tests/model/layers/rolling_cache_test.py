"""Caches of layers with a window, with sinks and without, against attention in float64 numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kv_cache, presets
from model.layers.mixers import slots
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.slots import RollingCache, SlotCache
from ops import masks
from ops.patterns import First, Window

B, N, K, H, WINDOW, LENGTH = 2, 4, 2, 8, 5, 40
HEADS = AttentionConfig(query_heads=N, kv_heads=K, head_width=H, window=WINDOW)
SINKS = 3
WITH_SINKS = dataclasses.replace(HEADS, window=None, sparse=Window(WINDOW) | First(SINKS))
configs = pytest.mark.parametrize('config', [HEADS, WITH_SINKS], ids=['window', 'window and sinks'])
SCALE = H**-0.5
FLOAT32, CODED = 1e-5, 0.05  # an int8 code is off by at most half of 1/127 of the largest number


@functools.partial(jax.jit, static_argnums=0)
def _attend(config, cache, q, k, v, positions_BT):
  mask = masks.packed(positions_BT, jnp.zeros_like(positions_BT), pattern=config.pattern)
  return cache.attend(q, k, v, mask, scale=SCALE, softcap=None, sinks_N=None)


def _draw(rng, length=LENGTH, batch=B):
  draw = lambda heads: rng.normal(size=(batch, length, heads, H)).astype(np.float32)
  return draw(N), draw(K), draw(K)


def _by_hand(config, q, k, v):
  """What each query finds in the window that ends with it, and in the sinks, in float64."""
  y = np.zeros(q.shape)
  for b, t, n in np.ndindex(q.shape[:3]):
    first = 0 if config is HEADS else SINKS
    seen = [s for s in range(t + 1) if s > t - WINDOW or s < first]
    scores = np.exp(k[b, seen, n * K // N].astype(np.float64) @ q[b, t, n] * SCALE)
    y[b, t, n] = scores / scores.sum() @ v[b, seen, n * K // N]
  return y


def _feed(config, cache, q, k, v, lengths):
  """Feeds all rows, so many tokens at a time, and joins what their queries find."""
  start, found = 0, []
  for length in lengths:
    now = slice(start, start + length)
    positions_BT = jnp.broadcast_to(jnp.arange(start, start + length), (len(q), length))
    cache, y = _attend(config, cache, q[:, now], k[:, now], v[:, now], positions_BT)
    found.append(np.asarray(y))
    start += length
  return cache, np.concatenate(found, 1)


@configs
@pytest.mark.parametrize('format', ['float', 'int8'])
@pytest.mark.parametrize(
  'lengths',
  [[LENGTH], [1] * LENGTH, [3, 1, 1, 20, 1, 1, 2, 11], [13, 14, 13]],
  ids=['at once', 'one by one', 'mixed', 'in thirds'],
)
@pytest.mark.quick(lengths=([1] * LENGTH, [3, 1, 1, 20, 1, 1, 2, 11]))
def test_every_way_of_feeding_finds_the_window(rng, config, format, lengths):
  q, k, v = _draw(rng)
  cache = config.cache(B, 1000, jnp.float32, format)
  held = WINDOW + slots.SPARE + (0 if config is HEADS else SINKS)
  assert isinstance(cache, RollingCache) and cache.keys.slots == held
  _, found = _feed(config, cache, q, k, v, lengths)
  atol = FLOAT32 if format == 'float' else CODED
  np.testing.assert_allclose(found, _by_hand(config, q, k, v), atol=atol)
  whole, same = _feed(
    config,
    config.cache(B, WINDOW, jnp.float32, format),
    *(x[:, :WINDOW] for x in (q, k, v)),
    [1] * WINDOW,
  )
  assert isinstance(whole, SlotCache)
  np.testing.assert_allclose(same, found[:, :WINDOW], atol=FLOAT32)


@configs
def test_padded_rows_of_different_lengths_equal_the_same_rows_alone(rng, config):
  q, k, v = _draw(rng)
  lengths, padded = np.array([2, 17]), 20
  positions = np.minimum(np.arange(padded)[None], lengths[:, None] - 1)
  spoilt = [np.array(x[:, :padded]) for x in (q, k, v)]
  for x in spoilt:
    x[np.arange(padded)[None] >= lengths[:, None]] = 1e3
  cache, first = _attend(
    config, config.cache(B, 99, jnp.float32, 'float'), *spoilt, jnp.asarray(positions)
  )
  expected = _by_hand(config, q, k, v)
  for step in range(12):
    at = (lengths + step)[:, None]
    token = [np.take_along_axis(x, at[..., None, None], 1) for x in (q, k, v)]
    cache, y = _attend(config, cache, *token, jnp.asarray(at))
    for b in range(B):
      np.testing.assert_allclose(y[b, 0], expected[b, at[b, 0]], atol=FLOAT32)
  for b in range(B):
    np.testing.assert_allclose(first[b, : lengths[b]], expected[b, : lengths[b]], atol=FLOAT32)


@configs
def test_a_row_can_be_set_back_a_little(rng, config):
  q, k, v = _draw(rng)
  cache, _ = _feed(config, config.cache(B, 99, jnp.float32, 'float'), q, k, v, [30])
  back = 30 - slots.SPARE
  expected = _by_hand(config, q, k, v)
  for length in (1, 3):
    now = slice(back, back + length)
    positions_BT = jnp.broadcast_to(jnp.arange(back, back + length), (B, length))
    _, y = _attend(config, cache, q[:, now], k[:, now], v[:, now], positions_BT)
    np.testing.assert_allclose(y, expected[:, now], atol=FLOAT32)


@configs
def test_a_row_of_another_cache_is_inserted(rng, config):
  q, k, v = _draw(rng)
  many, _ = _feed(config, config.cache(B, 99, jnp.float32, 'float'), q, k, v, [30])
  one, _ = _feed(config, config.cache(1, 99, jnp.float32, 'float'), q[1:], k[1:], v[1:], [9])
  joined = many.insert(0, one)
  now = np.array([[9], [30]])
  token = [np.stack([x[1, 9:10], x[1, 30:31]]) for x in (q, k, v)]
  _, y = _attend(config, joined, *token, jnp.asarray(now))
  expected = _by_hand(config, q, k, v)
  np.testing.assert_allclose(y[:, 0], np.stack([expected[1, 9], expected[1, 30]]), atol=FLOAT32)


def test_the_bytes_do_not_grow_with_the_context():
  held = lambda capacity: sum(
    leaf.nbytes for leaf in jax.tree.leaves(HEADS.cache(1, capacity, jnp.float32, 'float'))
  )
  slot = 4 * (2 * K * H + 1)
  assert held(100) == held(100_000) == (WINDOW + slots.SPARE) * slot


@pytest.mark.parametrize('format', kv_cache.FORMATS)
def test_arrays_of_every_format_name_their_axes(format):
  for cache in kv_cache.init(presets.preset('tiny-gemma2'), 3, 64, format=format):
    letters, arrays = jax.tree.leaves(cache.letters()), jax.tree.leaves(cache)
    assert all(len(one) == a.ndim for one, a in zip(letters, arrays, strict=True))
    assert all(one[0] == 'B' and len(a) == 3 for one, a in zip(letters, arrays))
