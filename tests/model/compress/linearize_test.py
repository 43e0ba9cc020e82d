"""Linear attention in place of softmax: by numpy with the weights it had, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import hf, kv_cache, presets
from model.compress import pipeline, recipe
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, abstract, parameters
from ops import masks

N, K, H, D, LENGTH = 4, 2, 8, 16, 13
EXACT = 1e-5  # of logits, which are of order 1
HEADS = AttentionConfig(query_heads=N, kv_heads=K, head_width=H, qkv_bias=True)
TOKENS_BT = np.random.default_rng(1).integers(0, 40, (2, LENGTH), np.int32)


def _config(mixer=HEADS, layers=3) -> ModelConfig:
  layer = LayerConfig(mixer=mixer, ffn=FeedForwardConfig(width=24))
  return ModelConfig(
    family='llama', vocab_size=40, width=D, layers=(layer,) * layers, max_positions=64
  )


def _model(mixer=HEADS, layers=3) -> Transformer:
  made, rng = Transformer(_config(mixer, layers), rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for path, param in parameters(made).items():
    value = rng.standard_normal(param.get_value().shape) / 4 + ('norm' in path)
    param.set_value(jnp.asarray(value, 'float32'))
  return made


@pytest.fixture(scope='module')
def model():
  return _model()


def _linear(model, **options) -> Transformer:
  return pipeline.compress(model, recipe.parse({'name': 'x', 'steps': [{'linearize': options}]}))[0]


@jax.jit
def _logits(model, tokens_BT):
  return model(tokens_BT)


def _mixed_by_hand(model, l, x_TD, decay) -> np.ndarray:
  """What a layer of the given model adds with features in place of the softmax, in float64.

  `decay` is the part of a weight that is left after one token.
  """
  w = {p: np.float64(one.get_value()) for p, one in parameters(model).items()}
  at = f'layers.{l}.attention'
  project = lambda part: x_TD @ w[f'{at}.{part}.weight'] + w[f'{at}.{part}.bias']
  q, k, v = (project(part).reshape(len(x_TD), -1, H) for part in ('query', 'key', 'value'))
  feature = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
  y = np.zeros((len(x_TD), N, H))
  for t, n in np.ndindex(len(x_TD), N):
    own = n * K // N
    weights = [
      feature(q[t, n] / H**0.25) @ feature(k[s, own] / H**0.25) * decay ** (t - s)
      for s in range(t + 1)
    ]
    y[t, n] = np.array(weights) @ v[: t + 1, own] / sum(weights)
  return y.reshape(len(x_TD), -1) @ w[f'{at}.output.weight']


@pytest.mark.parametrize(('mixer', 'decay'), [('linear', 1.0), ('decaying', np.exp(-1 / 20))])
def test_a_layer_is_linear_attention_with_the_weights_it_had(model, mixer, decay):
  found = _linear(model, mixer=mixer, memory=20, full_layers=[1])
  kinds = [type(layer.mixer).__name__ for layer in found.config.layers]
  assert kinds == ['LinearConfig', 'AttentionConfig', 'LinearConfig']
  assert found.config.layers[1] == model.config.layers[1]
  x_BTD = np.random.default_rng(2).standard_normal((1, LENGTH, D)).astype(np.float32)
  mask = masks.causal(1, LENGTH)
  y_BTD, _ = jax.jit(lambda model, x: model.layers[2].attention(x, None, mask))(found, x_BTD)
  np.testing.assert_allclose(y_BTD[0], _mixed_by_hand(model, 2, x_BTD[0], decay), atol=EXACT)


@pytest.fixture(scope='module')
def decaying():
  """A model whose decays depend on the token."""
  found = _linear(_model(layers=2), mixer='decaying', full_every=2)
  for path, param in parameters(found).items():
    if path.endswith('decay_out.weight'):
      assert not np.any(param.get_value())
      noise = np.random.default_rng(3).standard_normal(param.get_value().shape)
      param.set_value(jnp.asarray(noise, 'float32'))
  return found


@jax.jit
def _step(model, caches, tokens_BT, positions_BT):
  x_BTD, caches = model.hidden(tokens_BT, positions_BT=positions_BT, cache=caches)
  return caches, model.logits(x_BTD)


def test_decoding_equals_reading_at_once_and_nothing_comes_from_later_tokens(decaying):
  caches = kv_cache.init(decaying.config, 2, LENGTH)
  start, found = 0, []
  for length in (7, *(1,) * 6):
    now = slice(start, start + length)
    positions_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32)[now], (2, length))
    caches, logits = _step(decaying, caches, TOKENS_BT[:, now], positions_BT)
    found.append(np.asarray(logits))
    start += length
  np.testing.assert_allclose(np.concatenate(found, 1), _logits(decaying, TOKENS_BT), atol=EXACT)
  other_BT = np.array(TOKENS_BT)
  other_BT[:, 9:] = (other_BT[:, 9:] + 1) % 40
  np.testing.assert_array_equal(
    _logits(decaying, other_BT)[:, :9], _logits(decaying, TOKENS_BT)[:, :9]
  )


def test_states_have_one_size_and_the_ledger_says_which(model):
  one = recipe.parse({'name': 'x', 'steps': [{'linearize': {'full_every': 3}}]})
  found, ledger = pipeline.compress(model, one)
  held = lambda capacity: [
    sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    for cache in kv_cache.init(found.config, 1, capacity)
  ]
  short, long = held(64), held(4096)
  assert short[:2] == long[:2] == [4 * N * H * (H + 1)] * 2 and long[2] == 64 * short[2]
  what = f'numbers of a state, in place of {2 * K * H} for each token'
  rows = [(row['layer'], row['event'], row['detail']) for row in ledger.to_rows()]
  assert rows == [(f'layers.{l}.attention', what, str(N * H * (H + 1))) for l in (0, 1)]


def test_decays_can_be_learned_from_their_start():
  """No token changes them at first, but the slopes of the matrix that could are there."""
  found = _linear(_model(layers=1), mixer='decaying', full_every=None)
  slopes = jax.jit(nnx.grad(lambda model: jnp.sum(model(TOKENS_BT)[..., :9] ** 2)))(found)
  slope = slopes['layers'][0]['attention']['decay_out']['weight'].get_value()
  assert np.abs(slope).max() > 1e-4


def test_a_saved_model_is_the_same(decaying, tmp_path):
  hf.save_pretrained(decaying, None, tmp_path / 'saved')
  again, _ = hf.load_pretrained(tmp_path / 'saved')
  assert again.config == decaying.config
  np.testing.assert_array_equal(_logits(again, TOKENS_BT), _logits(decaying, TOKENS_BT))


REFUSED = {
  'full_every must be at least 2, not 1': ({}, {'full_every': 1}),
  'memory is a number of tokens, at least 1, not 0': ({}, {'memory': 0}),
  'no layer of 3 changes': ({}, {'full_layers': [0, 1, 2]}),
  'layer 3; there are layers 0 to 2': ({}, {'full_layers': [3]}),
  'layer 0 has norms of queries and keys, which linear attention has not': ({'qk_norm': True}, {}),
  'layer 0 has the pattern window8, .*name the layers that stay': ({'window': 8}, {}),
  'layer 0 has a cap of scores': ({'softcap': 20.0}, {}),
}


def _check(config, **options):
  pipeline.check(abstract(config), recipe.parse({'name': 'x', 'steps': [{'linearize': options}]}))


@pytest.mark.parametrize('message', REFUSED)
def test_what_cannot_be_is_refused(message):
  traits, options = REFUSED[message]
  heads = AttentionConfig(query_heads=N, kv_heads=K, head_width=H, **traits)
  with pytest.raises(ValueError, match=message):
    _check(_config(heads), **options)


def test_other_mixers_are_refused():
  with pytest.raises(ValueError, match='layer 0 has a LatentConfig, which is no attention'):
    _check(presets.preset('tiny-deepseek-v3'))
