"""Sinks and norms over all heads: what a layer without some heads keeps of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import units
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, parameters

# Removed terms are exact zeros; only the order of the other sums differs. Logits are of order 1.
TOLERANCE = 1e-5
MIXER = AttentionConfig(query_heads=6, kv_heads=3, head_width=8)


def _without_the_middle_head(**traits):
  """A model whose middle key/value head hands on nothing, and the model without that head."""
  layer = LayerConfig(
    mixer=AttentionConfig(**{**vars(MIXER), **traits}), ffn=FeedForwardConfig(width=16)
  )
  config = ModelConfig(family='llama', vocab_size=30, width=24, layers=(layer,), max_positions=16)
  model, rng = Transformer(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for param in parameters(model).values():
    value = param.get_value()
    param.set_value(jnp.asarray(value + 0.5 * rng.standard_normal(value.shape), value.dtype))
  output = model.layers[0].attention.output.weight
  output.set_value(output.get_value().at[16:32].set(0))
  return model, units.build(*units.cut(model, units.Kept(heads={0: np.array([0, 2])})))


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


def _logits(model, tokens_BT):
  return np.asarray(_run(*nnx.split(model), tokens_BT))


def test_sinks_go_with_their_heads(rng):
  model, smaller = _without_the_middle_head(sinks=True)
  tokens_BT = rng.integers(0, 30, (2, 9), np.int32)
  before, after = (m.layers[0].attention.sinks.logits.get_value() for m in (model, smaller))
  np.testing.assert_array_equal(after, before[np.array([0, 1, 4, 5])])
  expected = _logits(model, tokens_BT)
  np.testing.assert_allclose(_logits(smaller, tokens_BT), expected, atol=TOLERANCE, rtol=0)
  sinks = model.layers[0].attention.sinks.logits
  sinks.set_value(sinks.get_value() - 30.0)  # nothing goes to them any more
  assert np.abs(_logits(model, tokens_BT) - expected).max() > 100 * TOLERANCE


@pytest.mark.parametrize(('over', 'widths'), [('head', (8, 8)), ('all', (32, 16))])
def test_a_norm_over_all_heads_shrinks_with_them(over, widths):
  _, smaller = _without_the_middle_head(qk_norm=True, qk_norm_over=over)
  own = smaller.layers[0].attention
  assert tuple(n.scale.get_value().shape[0] for n in (own.query_norm, own.key_norm)) == widths
