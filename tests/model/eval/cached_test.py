"""Windows through the cache: against one pass, token by token, and what each format costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.eval import cached, perplexity
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, linears

# States of order 1 in float32, summed in another order.
SAME = 1e-4
# A code near the edge of a step may fall on its other side; few do, and each moves a state little.
SAME_CODES = 5e-3
# Four bits over about four standard deviations are off by 8 % of one; keys and values of two layers
# by twice that, where states have a root mean square of 1. A quarter more for sharp attention.
INT4 = 0.2
LENGTH = 70  # two pages and a part
LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=4, kv_heads=2, head_width=16), ffn=FeedForwardConfig(width=48)
)
CONFIG = ModelConfig(
  family='llama', vocab_size=61, width=32, layers=(LAYER,) * 2, max_positions=LENGTH
)
WINDOWED = (LAYER.with_mixer(window=37), LAYER)
MODELS = {
  'rotary': CONFIG,
  'windowed': CONFIG.replace(layers=WINDOWED),
  'learned positions': CONFIG.replace(rope=None, norm='layer', tied=True),
}
models = pytest.mark.parametrize('name', MODELS)


@functools.cache
def _model(name) -> Transformer:
  model = Transformer(MODELS[name], rngs=nnx.Rngs(0))
  for i, linear in enumerate(linears(model).values()):
    # Large enough for attention to tell keys apart.
    linear.weight.set_value(0.25 * jax.random.normal(jax.random.key(i), linear.weight.shape))
  return model


@functools.cache
def _tokens():
  return jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, LENGTH)))


@functools.cache
def _hidden(name, cache_format=None, piece=cached.PIECE):
  graphdef, state = nnx.split(_model(name))

  def run(state, tokens_BT):
    model = nnx.merge(graphdef, state)
    if cache_format is None:
      return model.hidden(tokens_BT)[0]
    return cached.hidden(model, tokens_BT, cache_format, piece)

  return np.asarray(jax.jit(run)(state, _tokens()))


@models
def test_a_float_cache_changes_nothing(name):
  np.testing.assert_allclose(_hidden(name, 'float'), _hidden(name), atol=SAME)


@models
@pytest.mark.parametrize('format', ['int8', 'int4'])
@pytest.mark.quick(name=('windowed',))
def test_pieces_are_what_single_tokens_see(name, format):
  pieces, single = _hidden(name, format), _hidden(name, format, 1)
  np.testing.assert_allclose(pieces, single, atol=SAME_CODES)
  # The comparison can tell: it is far from the pass without quantization.
  assert np.abs(pieces - _hidden(name)).max() > 3 * SAME_CODES


@models
@pytest.mark.quick(name=('windowed',))
def test_int4_is_exact_in_the_first_page_and_farther_off_than_int8_after_it(name):
  exact, int8, int4 = _hidden(name), _hidden(name, 'int8'), _hidden(name, 'int4')
  np.testing.assert_allclose(int4[:, :32], exact[:, :32], atol=SAME)
  off = lambda x: np.sqrt(np.mean((x - exact)[:, 32:] ** 2))
  assert 0 < off(int8) < off(int4) / 3
  assert off(int4) < INT4


def test_perplexity_goes_through_the_cache():
  model, tokens_BT = _model('rotary'), np.asarray(_tokens(), np.int32)
  text = perplexity.Windows(tokens_BT=tokens_BT, predicted_bytes=100)
  plain = perplexity.evaluate(model, text)
  one = perplexity.evaluate(model, text, cache_format='float')
  assert one.nll_sum == pytest.approx(plain.nll_sum, rel=1e-6)
  found = perplexity.evaluate(model, text, base=model, cache_format='int4')
  logits = np.asarray(jax.jit(_logits)(_hidden('rotary', 'int4')[:, :-1]), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = -np.take_along_axis(log_p, tokens_BT[:, 1:, None], 2).sum()
  assert found.nll_sum == pytest.approx(expected, rel=1e-5)
  assert abs(found.nll_sum - plain.nll_sum) > 1e-5 * plain.nll_sum
  assert found.kl_to_base > 1e-6
  assert found.tokens == plain.tokens == 2 * (LENGTH - 1)


def _logits(x_BTD):
  return _model('rotary').logits(x_BTD)


def test_an_unknown_format_is_refused():
  text = perplexity.Windows(tokens_BT=np.zeros((1, 4), np.int32), predicted_bytes=4)
  with pytest.raises(ValueError, match="'int5' is not a cache format"):
    perplexity.evaluate(_model('rotary'), text, cache_format='int5')
