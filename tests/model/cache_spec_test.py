"""Texts of caches, and the caches that they make of a model."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from model import cache_spec, kv_cache, presets
from model.cache_spec import CacheSpec, Eviction
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.evicted import EvictedCache
from model.layers.mixers.slots import RollingCache, SlotCache
from ops import patterns

CONFIG = presets.preset('tiny-gemma2')  # its first layer has a window of 8


@pytest.mark.parametrize(
  'text, spec',
  [
    ('int8', CacheSpec('int8')),
    ('h2o512', CacheSpec('float', Eviction('h2o', 512))),
    ('int8+snapkv1024', CacheSpec('int8', Eviction('snapkv', 1024))),
    ('bf16+streaming5', CacheSpec('bf16', Eviction('streaming', 5))),
  ],
)
def test_texts_name_caches(text, spec):
  assert cache_spec.of(text) == spec == cache_spec.of(spec) == cache_spec.of(str(spec))


@pytest.mark.parametrize(
  'text, message',
  [
    ('int3', "'int3' is not a cache format; the formats are float, bf16, int8, int4, and stream"),
    ('', "'' is not a cache format"),
    ('h2o', "'h2o' is not a cache format.*h2o512"),
    ('int8+h2o512+knorm64', 'is not a cache format'),
    ('int8+snapvk512', 'is not a cache format; .*snapkv512'),
    ('int8+h2o3', 'h2o keeps at least 16 tokens, not 3'),
    ('pyramidkv39', 'pyramidkv keeps at least 40 tokens, not 39'),
    ('int4+h2o512', 'int4 stores whole pages, from which h2o512 cannot take tokens; use one of'),
  ],
)
def test_other_texts_are_refused(text, message):
  with pytest.raises(ValueError, match=message):
    cache_spec.of(text)
  with pytest.raises(ValueError, match=message):
    kv_cache.init(CONFIG, 1, 99, format=text)


def test_a_policy_that_is_none_is_refused():
  with pytest.raises(ValueError, match="'lru' is no policy of eviction; there are streaming, h2o"):
    Eviction('lru', 99)


def _layers(*windows):
  layer = CONFIG.layers[0]
  return CONFIG.replace(layers=tuple(layer.with_mixer(window=window) for window in windows))


def test_layers_without_a_window_have_the_budget():
  config = _layers(8, None, None, None)
  window, *others = kv_cache.init(config, 2, 999, jnp.bfloat16, 'pyramidkv50')
  assert isinstance(window, RollingCache) and all(isinstance(x, EvictedCache) for x in others)
  held = [cache.tokens.positions_BS.shape[2] for cache in others]
  assert sum(held) == 3 * 50 and held == sorted(held, reverse=True) and held[0] > held[2]
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves([one.tokens.keys for one in others]))
  streaming = kv_cache.init(config, 2, 999, format='streaming50')[1]
  assert isinstance(streaming, RollingCache) and streaming.keys.slots == 50
  # Where all tokens find room, none is given up.
  assert all(isinstance(one, SlotCache) for one in kv_cache.init(config, 2, 8, format='h2o50'))


def test_a_sparse_pattern_is_refused():
  layer = CONFIG.layers[0].with_mixer(window=None, sparse=patterns.parse('window3x4'))
  with pytest.raises(ValueError, match='layers that see window3x4 cannot give tokens up'):
    kv_cache.init(CONFIG.replace(layers=(layer,)), 1, 99, format='h2o50')


class _State(AttentionConfig):
  """A mixer of which the cache does not grow."""

  def cache(self, batch, capacity, dtype, format):
    return dataclasses.replace(_HEADS, window=3).cache(batch, 99, dtype, format)


class _Other(AttentionConfig):
  """A mixer with a cache of another kind."""

  def cache(self, batch, capacity, dtype, format):
    return _HEADS.cache(batch, capacity, dtype, 'int4')


_HEADS = AttentionConfig(query_heads=2, kv_heads=1, head_width=4)


def _of_kinds(*kinds):
  own = {field.name: getattr(_HEADS, field.name) for field in dataclasses.fields(_HEADS)}
  layer = CONFIG.layers[0]
  layers = (dataclasses.replace(layer, mixer=kind(**own)) for kind in kinds)
  return CONFIG.replace(layers=tuple(layers))


def test_a_state_of_constant_size_is_left_and_other_caches_are_refused():
  config = _of_kinds(AttentionConfig, _State, AttentionConfig)
  first, state, last = kv_cache.init(config, 1, 99, format='pyramidkv50')
  assert isinstance(state, RollingCache)
  assert sum(cache.tokens.positions_BS.shape[2] for cache in (first, last)) == 2 * 50
  with pytest.raises(ValueError, match='a PagedCache cannot give tokens up; use a cache of all'):
    kv_cache.init(_of_kinds(_Other), 1, 99, format='h2o50')
