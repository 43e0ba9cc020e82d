"""The share of tokens with other experts, against sets of experts token by token."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.eval import perplexity, routing
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import RoutedConfig
from model.transformer import Context, Transformer
from ops.moe import Router

MIXER = AttentionConfig(query_heads=2, kv_heads=1, head_width=8)
FFN = RoutedConfig(experts=5, width=8, router=Router(choices=2))
CONFIG = ModelConfig(
  family='llama',
  vocab_size=40,
  width=16,
  layers=(
    LayerConfig(mixer=MIXER, ffn=FeedForwardConfig(width=8)),
    LayerConfig(mixer=MIXER, ffn=FFN),
  ),
  max_positions=32,
)


@pytest.fixture(scope='module')
def base():
  """A model with a dense and a routed layer, a text, and the experts that its tokens choose."""
  model = Transformer(CONFIG, rngs=nnx.Rngs(0))
  ids_T = np.random.default_rng(0).integers(0, 40, 96, np.int32)
  text = perplexity.windows(ids_T, np.arange(1, 97), 12)
  return model, text, routing.chosen(model, text)


def _changed(model, base):
  return routing.changed_share(model, routing.chosen(model, base[1]), base[0], base[2])


def test_the_experts_are_those_of_the_largest_logits(base):
  model, text, chosen = base

  @jax.jit
  def read(tokens_BT):
    context, x_BTD = Context.of(CONFIG, tokens_BT), model.embed(tokens_BT)
    x_BTD, _, _ = context.run_and_read(model.layers[0], x_BTD)
    return context.run_and_read(model.layers[1], x_BTD)[2]

  z_BTD = read(text.tokens_BT)
  weight = np.float64(model.layers[1].ffn.router.weight.get_value())
  logits_TE = np.float64(z_BTD).reshape(-1, 16) @ weight
  expected_TX = np.argsort(-logits_TE, axis=1)[:, :2]
  assert chosen.keys() == {1}
  np.testing.assert_array_equal(np.sort(chosen[1]), np.sort(expected_TX))


def test_another_router_is_compared_token_by_token(base):
  assert _changed(base[0], base) == 0
  model = nnx.clone(base[0])
  router = model.layers[1].ffn.router.weight
  router.set_value(router.get_value().at[:, 2].multiply(-1))
  own = routing.chosen(model, base[1])
  pairs = zip(own[1].tolist(), base[2][1].tolist(), strict=True)
  changed = [set(a) != set(b) for a, b in pairs]
  assert 0 < np.mean(changed) < 1
  assert _changed(model, base) == pytest.approx(np.mean(changed))


def test_a_token_whose_expert_was_removed_has_changed(base):
  """Expert 1 is removed, and 2 to 4 become 1 to 3."""
  layers = (CONFIG.layers[0], CONFIG.layers[1].with_ffn(experts=4))
  model = Transformer(dataclasses.replace(CONFIG, layers=layers), rngs=nnx.Rngs(0))
  kept = np.array([0, 2, 3, 4])
  graphdef, state = nnx.split(model)
  whole = nnx.split(base[0])[1]

  def take(new, old):
    if new.shape == old.shape:
      return old
    return old[kept] if old.ndim == 3 else old[:, kept]

  model = nnx.merge(graphdef, jax.tree.map(take, state, whole))
  expected = (base[2][1] == 1).any(1).mean()
  assert 0 < expected < 1
  assert _changed(model, base) == pytest.approx(expected)


def test_there_is_no_share_without_experts_or_with_unknown_ones(base):
  dense = Transformer(CONFIG.replace(layers=CONFIG.layers[:1]), rngs=nnx.Rngs(0))
  assert routing.chosen(dense, base[1]) == {} and _changed(dense, base) is None
  layers = (CONFIG.layers[0], CONFIG.layers[1].with_ffn(experts=4))
  other = Transformer(CONFIG.replace(layers=layers), rngs=nnx.Rngs(7))
  assert _changed(other, base) is None
