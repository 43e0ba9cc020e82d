"""Models with layers of the kind 'moba': decoding, files, compression, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import config, hf_names, kv_cache, presets, sharding
from model.layers.mixers.moba import MobaConfig
from model.transformer import Transformer
from ops import masks
from ops.attention import attention

BLOCK, TOP_K, LENGTH = 4, 2, 27
FLOAT32 = 2e-5  # of logits of order 1


def _shape(layers=2, **changes):
  shape = presets.preset('tiny-llama')
  more = {'block': BLOCK, 'top_k': TOP_K, **changes}
  made = [
    dataclasses.replace(layer, mixer=MobaConfig(**{**vars(layer.mixer), **more}))
    for layer in shape.layers[:layers]
  ]
  return shape.replace(layers=tuple(made))


def _model(shape):
  """With queries and keys large enough that choices matter."""
  made = Transformer(shape, rngs=nnx.Rngs(0))
  for block in made.layers:
    for part in (block.attention.query, block.attention.key):
      part.weight.set_value(part.weight.get_value() * 4)
  return made


@pytest.fixture(scope='module')
def model():
  """One layer always has the first block among the chosen."""
  first, second = _shape().layers
  return _model(_shape().replace(layers=(first, second.with_mixer(first=True))))


def _tokens(rows=2, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (rows, LENGTH), np.int32)


_whole = jax.jit(lambda model, t, segments=None: model(t, segments_BT=segments))


@jax.jit
def _step(model, tokens, positions, caches):
  x, caches = model.hidden(tokens, positions_BT=positions, cache=caches)
  return model.logits(x), caches


def _read(model, tokens, caches, lengths, start=0):
  found = []
  for length in lengths:
    positions = np.broadcast_to(np.arange(start, start + length, dtype=np.int32), (2, length))
    logits, caches = _step(model, tokens[:, start : start + length], positions, caches)
    found.append(np.asarray(logits))
    start += length
  return np.concatenate(found, 1), caches


def test_decoding_in_pieces_equals_one_pass_and_rows_can_be_set_back(model):
  """Over each boundary of blocks, and with blocks in the cache that another text has left."""
  caches = kv_cache.init(model.config, 2, LENGTH)  # of whole blocks, so for one token more
  assert {cache.capacity for cache in caches} == {28}
  _, caches = _read(model, _tokens(seed=1), caches, (9, 9, 9))
  tokens, whole = _tokens(), _whole(model, _tokens())
  found, caches = _read(model, tokens, caches, (9, *(1,) * 9, 9))
  np.testing.assert_allclose(found, whole, atol=FLOAT32)
  # From within the third block on, after a wrong continuation.
  _, caches = _read(model, _tokens(seed=2), caches, (9,), start=10)
  found, _ = _read(model, tokens, caches, (1,) * 9, start=10)
  np.testing.assert_allclose(found, whole[:, 10:19], atol=FLOAT32)
  assert all(cache.spare >= LENGTH for cache in caches)


def test_padded_rows_of_different_lengths_equal_the_same_rows_alone(model):
  tokens, lengths = _tokens(), np.array([3, 7])
  whole = np.asarray(_whole(model, tokens))
  place = np.arange(9, dtype=np.int32)[None]
  positions = np.minimum(place, lengths[:, None].astype(np.int32) - 1)
  spoilt = np.where(place < lengths[:, None], tokens[:, :9], 7)
  logits, caches = _step(model, spoilt, positions, kv_cache.init(model.config, 2, LENGTH))
  for b in range(2):
    np.testing.assert_allclose(logits[b, : lengths[b]], whole[b, : lengths[b]], atol=FLOAT32)
  for i in range(10):
    at = (lengths + i)[:, None].astype(np.int32)
    logits, caches = _step(model, np.take_along_axis(tokens, at, 1), at, caches)
    for b in range(2):
      np.testing.assert_allclose(logits[b, 0], whole[b, at[b, 0]], atol=FLOAT32)


def test_no_token_depends_on_what_follows_nor_on_another_document(model):
  tokens, other = _tokens(), _tokens()
  other[:, 14:] = (other[:, 14:] + 1) % 256
  found, others = (np.asarray(_whole(model, one)) for one in (tokens, other))
  np.testing.assert_array_equal(found[:, :14], others[:, :14])
  assert np.abs(found[:, 14:] - others[:, 14:]).max() > 0.01
  segments = np.broadcast_to(np.arange(LENGTH) >= 14, (2, LENGTH)).astype(np.int32)
  tokens[:, :14], other[:, 14:] = 5, tokens[:, 14:]
  found, others = (np.asarray(_whole(model, one, segments)) for one in (tokens, other))
  np.testing.assert_array_equal(found[:, 14:], others[:, 14:])


def test_sinks_and_caps_count_as_in_attention():
  """With all blocks chosen the layer is the one of attention."""
  mixer = _shape(top_k=LENGTH, sinks=True, softcap=2.0).layers[0].mixer
  layer = mixer.build(_shape().stream, rngs=nnx.Rngs(0), dtype=jnp.float32)
  layer.sinks.logits.set_value(jnp.linspace(-1, 1, mixer.query_heads))
  rng = np.random.default_rng(0)
  heads = (mixer.query_heads, mixer.kv_heads, mixer.kv_heads)
  arrays = [rng.standard_normal((2, LENGTH, n, 8)).astype(np.float32) for n in heads]
  mask = masks.causal(2, LENGTH)
  run = jax.jit(lambda q, k, v: layer.attend(None, q, k, v, mask, None, **layer.scores)[1])
  dense = jax.jit(lambda q, k, v: attention(q, k, v, mask, impl='reference', **layer.scores))
  np.testing.assert_allclose(run(*arrays), dense(*arrays), atol=FLOAT32)


def test_bytes_and_cost_are_those_of_blocks_and_means():
  heads = _shape().layers[0].mixer
  empty = heads.cache(1, 1000, jnp.float32, 'float')
  numbers = heads.kv_heads * heads.head_width
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(empty))
  assert held == 4 * numbers * (2 * 1000 + 1000 // BLOCK)
  half = sum(leaf.nbytes for leaf in jax.tree.leaves(heads.cache(1, 1000, jnp.float32, 'bf16')))
  assert half == 2 * numbers * 2 * 1000 + 4 * numbers * 1000 // BLOCK
  seen = [heads.seen(context) for context in (1, 4, 5, 8, 9, 12, 13, 1000)]
  assert seen == [1, 4, 5, 8, 9, 12, 9, 12]
  step = 4 * heads.query_heads * heads.head_width
  assert heads.decode_flops(1000) == step * (12 + 249 / 2)
  exact = np.mean([heads.decode_flops(t) for t in range(1, 101)])
  assert heads.prefill_flops(100) == pytest.approx(exact)


def test_configs_keep_the_kind_and_other_formats_have_no_name_for_it(model):
  shape = model.config
  assert config.from_json(config.to_json(shape)) == shape
  with pytest.raises(ValueError, match='MobaConfig'):
    hf_names.config_to_hf(shape)


def test_caches_have_letters_for_each_axis():
  for cache in kv_cache.init(_shape(), 3, 64):
    letters, arrays = jax.tree.leaves(cache.letters()), jax.tree.leaves(cache)
    assert all(len(one) == a.ndim for one, a in zip(letters, arrays, strict=True))
    assert {*''.join(letters)} <= {*sharding.RULES}


REFUSED = {
  'block must be an integer of at least 1, not 0': {'block': 0},
  'top_k must be an integer of at least 1, not 0': {'top_k': 0},
  'sees window8, not both; set window': {'window': 8},
  'lends no keys and values': {'lends': True},
}


@pytest.mark.parametrize('message', REFUSED)
def test_bad_configs_are_refused(message):
  with pytest.raises(ValueError, match=message):
    _shape(**REFUSED[message])


def test_caches_that_it_has_not_are_refused():
  for format in ('int8', 'int4'):
    with pytest.raises(ValueError, match=f"no format '{format}'; use 'float' or 'bf16'"):
      kv_cache.init(_shape(), 1, 8, format=format)
  with pytest.raises(ValueError, match='a BlockCache cannot give tokens up'):
    kv_cache.init(_shape(), 1, 64, format='h2o16')
