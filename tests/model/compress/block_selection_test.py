"""Chosen blocks as a retrofit: which layers get them, what they compute, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from model import hf
from model.compress import pipeline, recipe
from model.compress.block_selection import BlockSelectionSpec, check
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.moba import MobaConfig
from model.transformer import Transformer

EXACT = 1e-5  # of logits, which are of order 1
ROWS_BT = np.random.default_rng(1).integers(0, 40, (2, 17), np.int32)
HEADS = AttentionConfig(query_heads=2, kv_heads=1, head_width=8)


def _config(*first, layers=3) -> ModelConfig:
  mixers = (*first, *(HEADS,) * (layers - len(first)))
  return ModelConfig(
    family='llama',
    vocab_size=40,
    width=16,
    layers=tuple(LayerConfig(mixer=mixer, ffn=FeedForwardConfig(width=24)) for mixer in mixers),
    max_positions=64,
  )


@pytest.fixture(scope='module')
def model():
  return Transformer(_config(), rngs=nnx.Rngs(0))


_run = jax.jit(lambda model, tokens_BT: model(tokens_BT))


def _compress(model, **options):
  steps = [{'block_selection': options}]
  return pipeline.compress(model, recipe.parse({'name': 'x', 'steps': steps}), ROWS_BT)


def test_chosen_layers_choose_and_what_is_saved_is_the_same(model, tmp_path):
  found, ledger = _compress(model, block=2, top_k=1, full_layers=[1])
  moba = MobaConfig(**dataclasses.asdict(HEADS), block=2, top_k=1, first=True)
  assert [layer.mixer for layer in found.config.layers] == [moba, HEADS, moba]
  assert [(row['layer'], row['event'], row['detail']) for row in ledger.to_rows()] == [
    (f'layers.{l}.attention', 'keys that a query reads at most, of 64', '4') for l in (0, 2)
  ]
  logits, before = _run(found, ROWS_BT), _run(model, ROWS_BT)
  np.testing.assert_allclose(logits[:, :4], before[:, :4], atol=EXACT)  # all still in sight
  assert np.abs(logits - before).max() > 0.001
  hf.save_pretrained(found, None, tmp_path / 'saved')
  again, _ = hf.load_pretrained(tmp_path / 'saved')
  assert again.config == found.config
  np.testing.assert_array_equal(_run(again, ROWS_BT), logits)


def test_with_enough_blocks_the_model_computes_what_it_did(model):
  found, _ = _compress(model, block=2, top_k=8, full_every=None)
  assert {type(layer.mixer) for layer in found.config.layers} == {MobaConfig}
  np.testing.assert_allclose(_run(found, ROWS_BT), _run(model, ROWS_BT), atol=EXACT)


WINDOWED = dataclasses.replace(HEADS, window=8)
REFUSED = {
  'block must be an integer of at least 1, not 0': ((), {'block': 0}),
  'top_k must be an integer of at least 1': ((), {'top_k': -1}),
  'at least 2, not 1': ((), {'full_every': 1}),
  'no layer of 3 changes': ((), {'full_layers': (0, 1, 2)}),
  'are all 64 positions of the model; choose fewer': ((), {'block': 16, 'top_k': 3}),
  'layer 0 has window8 already; name the layers that stay': ((WINDOWED,), {}),
  'layer 0 has a MobaConfig, which is no attention to all keys': (
    (MobaConfig.of(HEADS, block=4, top_k=1),),
    {},
  ),
  'layer 0 lends its keys': ((dataclasses.replace(HEADS, lends=True),), {}),
}


@pytest.mark.parametrize('message', REFUSED)
def test_what_cannot_be_is_refused(message):
  first, options = REFUSED[message]
  with pytest.raises(ValueError, match=message):
    check(_config(*first), BlockSelectionSpec(**{'block': 4, 'top_k': 2, **options}))
