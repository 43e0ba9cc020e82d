"""Models whose layers have sparse patterns: decoding, files, and the cost that is said of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import checkpoint, config, hf_names, kv_cache, presets
from model.layers.mixers.slots import RollingCache, SlotCache
from model.transformer import Transformer
from ops import patterns

TEXTS = ['window6+first2', 'window3x4', 'window4+global5', 'window4+random4x1']
LENGTH, CAPACITY = 29, 40
FLOAT32 = 2e-5  # of logits of order 1


def _sparse(*texts):
  shape = presets.preset('tiny-llama')
  layers = [
    layer.with_mixer(sparse=patterns.parse(text)) for layer, text in zip(shape.layers, texts)
  ]
  return shape.replace(layers=tuple(layers))


def _model(shape):
  return Transformer(shape, rngs=nnx.Rngs(0))


@pytest.mark.parametrize('texts', [TEXTS[:2], TEXTS[2:]], ids=' '.join)
def test_decoding_in_pieces_equals_one_pass(texts):
  shape = _sparse(*texts)
  model = _model(shape)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, shape.vocab_size, (2, LENGTH)))
  caches = kv_cache.init(shape, 2, CAPACITY)
  assert {type(cache) for cache in caches} <= {RollingCache, SlotCache}
  graphdef, state = nnx.split(model)
  whole = jax.jit(lambda state: nnx.merge(graphdef, state)(tokens))(state)

  @jax.jit
  def step(state, tokens, positions, caches):
    model = nnx.merge(graphdef, state)
    x, caches = model.hidden(tokens, positions_BT=positions, cache=caches)
    return model.logits(x), caches

  start, found = 0, []
  for length in (11, 1, 1, 1, 4, 1, 1, 4, 1, 1, 1, 1, 1):
    positions = jnp.broadcast_to(jnp.arange(start, start + length), (2, length))
    logits, caches = step(state, tokens[:, start : start + length], positions, caches)
    found.append(np.asarray(logits))
    start += length
  np.testing.assert_allclose(np.concatenate(found, 1), whole, atol=FLOAT32)


def test_a_window_with_sinks_holds_these_alone():
  (rolling, slots), capacity = kv_cache.init(_sparse('window6+first2', 'window3x4'), 1, 99), 99
  assert isinstance(rolling, RollingCache) and rolling.first == 2
  assert rolling.keys.slots == 6 + 2 + 8 < slots.keys.slots == capacity


def test_configs_and_folders_keep_patterns(tmp_path):
  shape = _sparse(TEXTS[0], TEXTS[3])
  written = config.to_json(shape)
  assert [layer['mixer']['sparse'] for layer in written['layers']] == [TEXTS[0], TEXTS[3]]
  assert config.from_json(written) == shape
  checkpoint.save(tmp_path / 'out', _model(shape))
  assert checkpoint.load(tmp_path / 'out').config == shape


def test_a_config_json_has_no_patterns():
  with pytest.raises(ValueError, match=r'mixer\.sparse'):
    hf_names.config_to_hf(_sparse(TEXTS[0]))


def test_a_window_and_a_pattern_are_refused():
  heads = presets.preset('tiny-llama').layers[0].mixer
  with pytest.raises(ValueError, match='either a window or a sparse pattern'):
    dataclasses.replace(heads, window=4, sparse=patterns.parse('window4'))


def test_the_cost_is_that_of_the_keys_that_are_seen():
  dense, sparse = (
    presets.preset('tiny-llama').layers[0].mixer,
    _sparse('window6+first2').layers[0].mixer,
  )
  assert sparse.decode_flops(1000) / dense.decode_flops(1000) == pytest.approx(8 / 1000)
  assert sparse.seen(5) == 5 and sparse.seen(1000) == 8
  mean = np.mean([min(t, 8) for t in range(1, 101)]) / np.mean(range(1, 101))
  assert sparse.prefill_flops(100) / dense.prefill_flops(100) == pytest.approx(mean)
