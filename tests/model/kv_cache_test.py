"""Slots against numpy assignments; the model's use of the cache is in transformer_test.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kv_cache, presets
from model.kv_cache import KVCache


def _filled(rng, *shape, dtype=jnp.float32):
  return jnp.asarray(rng.normal(size=shape), dtype)


def test_rows_are_written_from_their_own_slots_on(rng):
  k, v = _filled(rng, 3, 8, 2, 4), _filled(rng, 3, 8, 2, 4)
  new_k, new_v = _filled(rng, 3, 2, 2, 4), _filled(rng, 3, 2, 2, 4)
  starts = [0, 5, 6]
  cache = jax.jit(KVCache.write)(KVCache(k, v), new_k, new_v, jnp.asarray(starts))
  expected_k, expected_v = np.array(k), np.array(v)
  for b, start in enumerate(starts):
    expected_k[b, start : start + 2], expected_v[b, start : start + 2] = new_k[b], new_v[b]
  np.testing.assert_array_equal(cache.k_BSKH, expected_k)
  np.testing.assert_array_equal(cache.v_BSKH, expected_v)


def test_it_stores_and_gives_the_dtypes_asked_for(rng):
  cache = KVCache(*(jnp.zeros((1, 4, 1, 2), jnp.bfloat16),) * 2)
  new = _filled(rng, 1, 4, 1, 2)
  cache = cache.write(new, new, jnp.zeros(1, jnp.int32))
  assert cache.k_BSKH.dtype == cache.v_BSKH.dtype == jnp.bfloat16
  k, v = cache.read(jnp.float32)
  assert k.dtype == v.dtype == jnp.float32
  np.testing.assert_array_equal(k, new.astype(jnp.bfloat16).astype(jnp.float32))
  np.testing.assert_array_equal(v, k)


def test_an_empty_cache_has_each_layers_heads_and_no_nan():
  config = presets.preset('tiny-gemma2')
  layers = (
    config.layers[0],
    config.layers[1].__class__(**{**vars(config.layers[1]), 'kv_heads': 1}),
  )
  caches = kv_cache.init(config.replace(layers=layers), 3, 10, jnp.bfloat16)
  assert [cache.k_BSKH.shape for cache in caches] == [(3, 10, 2, 16), (3, 10, 1, 16)]
  assert all(cache.capacity == 10 and cache.v_BSKH.dtype == jnp.bfloat16 for cache in caches)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(caches))


def test_it_is_donated_in_place(rng):
  cache = KVCache(_filled(rng, 2, 8, 1, 4), _filled(rng, 2, 8, 1, 4))
  new, starts = _filled(rng, 2, 1, 1, 4), jnp.asarray([3, 1])
  write = jax.jit(KVCache.write, donate_argnums=0)
  text = write.lower(cache, new, new, starts).compile().as_text()
  assert 'input_output_alias' in text and 'scatter' not in text
  write(cache, new, new, starts)
  assert cache.k_BSKH.is_deleted()


def test_more_tokens_than_slots_are_refused(rng):
  cache = KVCache(jnp.zeros((1, 4, 1, 2)), jnp.zeros((1, 4, 1, 2)))
  new = _filled(rng, 1, 5, 1, 2)
  with pytest.raises(ValueError, match='5 tokens do not fit into a cache of 4'):
    cache.write(new, new, jnp.zeros(1, jnp.int32))
