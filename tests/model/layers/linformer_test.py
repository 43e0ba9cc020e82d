"""Models with layers of the kind 'linformer': decoding, files, compression, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import checkpoint, config, hf_names, kv_cache, presets, sharding
from model.compress import pipeline, recipe
from model.layers.mixers.linformer import LinformerConfig
from model.transformer import Transformer, matrices

CHUNK, R, WINDOW, LENGTH = 4, 2, 6, 27
FLOAT32 = 2e-5  # of logits of order 1


def _shape(weights='static', **changes):
  shape = presets.preset('tiny-llama')
  more = {'chunk': CHUNK, 'summaries': R, 'weights': weights, 'window': WINDOW, **changes}
  layers = [
    dataclasses.replace(layer, mixer=LinformerConfig(**{**vars(layer.mixer), **more}))
    for layer in shape.layers
  ]
  return shape.replace(layers=tuple(layers))


def _model(shape):
  return Transformer(shape, rngs=nnx.Rngs(0))


def _tokens(rows=2, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (rows, LENGTH)))


_whole = jax.jit(lambda graphdef, state, t: nnx.merge(graphdef, state)(t), static_argnums=0)


def _step(model):
  graphdef, state = nnx.split(model)

  @jax.jit
  def step(tokens, positions, caches):
    merged = nnx.merge(graphdef, state)
    x, caches = merged.hidden(tokens, positions_BT=positions, cache=caches)
    return merged.logits(x), caches

  return step


@pytest.mark.parametrize('weights', [pytest.param('static', marks=pytest.mark.slow), 'dynamic'])
def test_decoding_in_pieces_equals_one_pass_and_rows_begin_anew(weights):
  model = _model(_shape(weights))
  step = _step(model)
  # The caches are used twice: what the first text left in them must not be seen by the second.
  caches = kv_cache.init(model.config, 2, 40)
  for seed in (1, 0):
    tokens = _tokens(seed=seed)
    start, found = 0, []
    for length in (9, 1, 1, 1, 1, 1, 9, 1, 1, 1, 1):
      positions = jnp.broadcast_to(jnp.arange(start, start + length), (2, length))
      logits, caches = step(tokens[:, start : start + length], positions, caches)
      found.append(np.asarray(logits))
      start += length
  whole = _whole(*nnx.split(model), _tokens())
  np.testing.assert_allclose(np.concatenate(found, 1), whole, atol=FLOAT32)


@pytest.mark.parametrize('weights', ['static', 'dynamic'])
@pytest.mark.quick(weights=('dynamic',))
def test_the_weights_of_sums_learn(weights):
  graphdef, state = nnx.split(_model(_shape(weights)))
  loss = lambda state: jnp.mean(nnx.merge(graphdef, state)(_tokens())[..., 7] ** 2)
  slopes = dict(nnx.to_flat_state(jax.jit(jax.grad(loss))(state)))
  names = {'static': ('chunks', 'keys'), 'dynamic': ('weigh', 'weight')}
  slope = slopes['layers', 0, 'attention', *names[weights]].get_value()
  assert np.isfinite(slope).all() and np.abs(slope).max() > 1e-6


def test_padded_rows_of_different_lengths_equal_the_same_rows_alone():
  model = _model(_shape('dynamic'))
  step, tokens, lengths = _step(model), _tokens(), np.array([5, 14])
  whole = np.asarray(_whole(*nnx.split(model), tokens))
  positions = np.minimum(np.arange(16)[None], lengths[:, None] - 1)
  spoilt = np.where(np.arange(16)[None] < lengths[:, None], tokens[:, :16], 7)
  logits, caches = step(
    jnp.asarray(spoilt), jnp.asarray(positions), kv_cache.init(model.config, 2, 40)
  )
  for b in range(2):
    np.testing.assert_allclose(logits[b, : lengths[b]], whole[b, : lengths[b]], atol=FLOAT32)
  for i in range(10):
    at = (lengths + i)[:, None]
    logits, caches = step(jnp.take_along_axis(tokens, at, 1), jnp.asarray(at), caches)
    for b in range(2):
      np.testing.assert_allclose(logits[b, 0], whole[b, at[b, 0]], atol=FLOAT32)


def test_bytes_and_cost_are_those_of_the_window_and_the_summaries():
  heads = _shape().layers[0].mixer
  empty = heads.cache(1, 1000, jnp.float32, 'float')
  numbers = 2 * heads.kv_heads * heads.head_width
  summaries = 1000 // CHUNK * R * (4 * numbers + 8)
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(empty))
  assert held == WINDOW * (4 * numbers + 4) + summaries
  assert heads.seen(1000) == WINDOW + 1000 // CHUNK * R
  step = 4 * heads.query_heads * heads.head_width
  assert heads.decode_flops(1000) == step * heads.seen(1000)
  exact = np.mean([min(t, WINDOW) + (t - 1) // CHUNK * R for t in range(1, 1001)])
  assert heads.prefill_flops(1000) == pytest.approx(step * exact, rel=0.01)


def test_configs_and_folders_keep_the_kind(tmp_path):
  shape = _shape('dynamic')
  assert config.from_json(config.to_json(shape)) == shape
  checkpoint.save(tmp_path / 'out', _model(shape))
  again = checkpoint.load(tmp_path / 'out')
  whole = [_whole(*nnx.split(model), _tokens()) for model in (again, _model(shape))]
  np.testing.assert_array_equal(*whole)
  with pytest.raises(ValueError, match='LinformerConfig'):
    hf_names.config_to_hf(shape)


@pytest.mark.slow
@pytest.mark.parametrize('weights', ['static', 'dynamic'])
def test_its_matrices_are_compressed_and_its_weights_of_sums_are_not(weights):
  model = _model(_shape(weights))
  steps = [{'wanda': {'sparsity': 0.5}}, {'round_to_nearest': {'format': 'int8', 'group_size': 8}}]
  parsed = recipe.parse({'name': 'test', 'steps': steps})
  compressed, _ = pipeline.compress(model, parsed, _tokens(4))
  kinds = {path: type(w).__name__ for path, w in matrices(compressed).items()}
  assert kinds['layers.0.attention.query'] == 'QuantizedTensor'
  if weights == 'dynamic':
    assert kinds['layers.0.attention.weigh'] != 'QuantizedTensor'


def test_caches_have_letters_for_each_axis():
  for cache in kv_cache.init(_shape(), 3, 64):
    letters, arrays = jax.tree.leaves(cache.letters()), jax.tree.leaves(cache)
    assert all(len(one) == a.ndim for one, a in zip(letters, arrays, strict=True))
    assert {*''.join(letters)} <= {*sharding.RULES}


def test_what_it_cannot_do_is_refused():
  with pytest.raises(ValueError, match='a decoder must not see'):
    _shape(causal=False)
  with pytest.raises(ValueError, match='at least the chunk of 4 tokens, not 3'):
    _shape(window=3)
  with pytest.raises(ValueError, match="no 'int8'"):
    kv_cache.init(_shape(), 1, 8, format='int8')
  segments = jnp.zeros((2, LENGTH), jnp.int32)
  with pytest.raises(ValueError, match='cannot be told apart'):
    _model(_shape())(_tokens(), segments_BT=segments)
