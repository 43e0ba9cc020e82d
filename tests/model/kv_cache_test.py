"""Tests the slots of a cache against numpy; transformer_test.py tests its use by the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kv_cache, presets
from model.layers.mixers.sides import Floats
from model.layers.mixers.slots import SlotCache
from ops import rows as row_ops
from ops.kernels import cpu


def _filled(rng, *shape, dtype=jnp.float32):
  return jnp.asarray(rng.normal(size=shape), dtype)


def _positions(starts, length):
  return jnp.asarray(starts)[:, None] + jnp.arange(length)[None]


def _cache(k, v):
  return SlotCache(Floats(k), Floats(v))


def test_rows_are_written_from_their_own_slots_on(rng):
  k, v = _filled(rng, 3, 8, 2, 4), _filled(rng, 3, 8, 2, 4)
  new_k, new_v = _filled(rng, 3, 2, 2, 4), _filled(rng, 3, 2, 2, 4)
  starts = [0, 5, 6]
  cache = jax.jit(SlotCache.written)(_cache(k, v), new_k, new_v, _positions(starts, 2))
  expected_k, expected_v = np.array(k), np.array(v)
  for b, start in enumerate(starts):
    expected_k[b, start : start + 2], expected_v[b, start : start + 2] = new_k[b], new_v[b]
  np.testing.assert_array_equal(cache.keys.x_BSKH, expected_k)
  np.testing.assert_array_equal(cache.values.x_BSKH, expected_v)


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize('batch', [1, 2, row_ops.UNROLLED_ROWS + 1])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'int8', 'uint8'])
def test_ranges_of_rows_match_numpy(rng, batch, dtype, native, monkeypatch):
  if native and not cpu.available():
    pytest.skip(cpu.why_not())
  monkeypatch.setattr(cpu, 'available', lambda: native)
  rows, new = (100 * _filled(rng, batch, length, 3) for length in (9, 4))
  rows, new = jnp.abs(rows).astype(dtype), jnp.abs(new)
  starts, written = np.arange(batch) % 6, np.array(rows)
  for b in range(batch):
    written[b, starts[b] : starts[b] + 4] = new[b].astype(dtype)
  starts_B = jnp.asarray(starts)
  found = jax.jit(lambda *arrays: row_ops.write(*arrays))(rows, new, starts_B)
  assert found.dtype == rows.dtype
  np.testing.assert_array_equal(found, written)
  np.testing.assert_array_equal(row_ops.read(found, starts_B, 4), new.astype(dtype))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_an_entry_of_each_head_matches_numpy(rng, dtype):
  rows = (100 * _filled(rng, 2, 3, 7, 4)).astype(dtype)
  new, at = _filled(rng, 2, 3, 4), rng.integers(0, 7, (2, 3))
  written = np.array(rows)
  for b, k in np.ndindex(2, 3):
    written[b, k, at[b, k]] = new[b, k].astype(dtype)
  found = jax.jit(row_ops.put)(rows, new, jnp.asarray(at))
  assert found.dtype == rows.dtype
  np.testing.assert_array_equal(found, written)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_writing_does_not_change_rows_that_were_not_donated(rng, dtype):
  rows, new = _filled(rng, 3, 9, 2).astype(dtype), _filled(rng, 3, 1, 2)
  before = np.array(rows)
  found = jax.jit(lambda *arrays: row_ops.write(*arrays))(rows, new, jnp.array([0, 8, 3]))
  np.testing.assert_array_equal(rows, before)
  assert (np.asarray(found) != before).any()
  given_up = jax.jit(lambda *arrays: row_ops.write(*arrays), donate_argnums=0)
  np.testing.assert_array_equal(given_up(rows, new, jnp.array([0, 8, 3])), found)


@pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or 'available')
def test_native_writing_refuses_what_does_not_fit():
  rows = jnp.zeros((2, 4, 3))
  with pytest.raises(jax.errors.JaxRuntimeError, match='do not fit'):
    row_ops.write(rows, jnp.zeros((2, 5, 3)), jnp.zeros(2, jnp.int32))


def test_it_stores_the_requested_dtypes(rng):
  cache = _cache(*(jnp.zeros((1, 4, 1, 2), jnp.bfloat16),) * 2)
  new = _filled(rng, 1, 4, 1, 2)
  cache = cache.written(new, new, _positions([0], 4))
  for x_BSKH in (cache.keys.x_BSKH, cache.values.x_BSKH):
    assert x_BSKH.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x_BSKH, new.astype(jnp.bfloat16))


def test_an_empty_cache_has_each_layers_heads_and_no_nan():
  config = presets.preset('tiny-gemma2')
  layers = (
    config.layers[0],
    config.layers[1].with_mixer(kv_heads=1),
  )
  caches = kv_cache.init(config.replace(layers=layers), 3, 10, jnp.bfloat16)
  assert [cache.keys.x_BSKH.shape for cache in caches] == [(3, 10, 2, 16), (3, 10, 1, 16)]
  assert all(cache.capacity == 10 and cache.values.x_BSKH.dtype == jnp.bfloat16 for cache in caches)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(caches))


def test_a_donated_cache_is_updated_in_place(rng):
  cache = _cache(_filled(rng, 2, 8, 1, 4), _filled(rng, 2, 8, 1, 4))
  new, positions_BT = _filled(rng, 2, 1, 1, 4), jnp.asarray([[3], [1]])
  update = jax.jit(SlotCache.written, donate_argnums=0)
  text = update.lower(cache, new, new, positions_BT).compile().as_text()
  assert 'input_output_alias' in text and 'scatter' not in text
  update(cache, new, new, positions_BT)
  assert cache.keys.x_BSKH.is_deleted()


@pytest.mark.parametrize('format, capacity', [('float', 4), ('bf16', 4), ('int8', 4), ('int4', 32)])
def test_more_tokens_than_slots_are_refused(rng, format, capacity):
  (cache, *_) = kv_cache.init(presets.preset('tiny-llama'), 1, 4, format=format)
  heads = presets.preset('tiny-llama').layers[0]
  new = _filled(rng, 1, capacity + 1, heads.mixer.kv_heads, heads.mixer.head_width)
  with pytest.raises(ValueError, match=f'{capacity + 1} tokens do not fit into a cache of'):
    store = cache.update if format == 'int4' else cache.written
    store(new, new, _positions([0], capacity + 1))


def test_an_unknown_format_is_refused():
  with pytest.raises(ValueError, match='the formats are float, bf16, int8, int4'):
    kv_cache.init(presets.preset('tiny-llama'), 1, 4, format='int3')


def test_a_bf16_cache_is_bfloat16_for_a_model_of_any_dtype(rng):
  config = presets.preset('tiny-llama')
  (cache, *_) = kv_cache.init(config, 1, 4, jnp.float32, 'bf16')
  mixer = config.layers[0].mixer
  new = _filled(rng, 1, 4, mixer.kv_heads, mixer.head_width)
  cache = cache.written(new, new, _positions([0], 4))
  assert cache.keys.x_BSKH.dtype == cache.values.x_BSKH.dtype == jnp.bfloat16
  np.testing.assert_array_equal(cache.keys.x_BSKH, new.astype(jnp.bfloat16))
