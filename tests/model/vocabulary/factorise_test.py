"""Factored embeddings against numpy's singular values, and what frequent tokens gain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import hf
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer
from model.vocabulary.factorise import factorise

TOKENS, WIDTH = 40, 16
logits_of = jax.jit(lambda model, tokens_BT: model(tokens_BT))


@pytest.fixture(scope='module')
def model():
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=8), ffn=FeedForwardConfig(width=16)
  )
  config = ModelConfig(
    family='llama', vocab_size=TOKENS, width=WIDTH, layers=(layer,), max_positions=32, tied=True
  )
  return Transformer(config, rngs=nnx.Rngs(0))


def _table(model):
  table = model.embedding.table.get_value()
  return np.asarray(table if isinstance(table, jnp.ndarray) else table.dense(), np.float64)


def test_without_counts_it_is_the_truncated_svd(model):
  result, report = factorise(model, 5)
  left, sizes, right = np.linalg.svd(_table(model), full_matrices=False)
  np.testing.assert_allclose(_table(result), (left[:, :5] * sizes[:5]) @ right[:5], atol=1e-6)
  assert report.error == pytest.approx((sizes[5:] ** 2).sum() / (sizes**2).sum(), rel=1e-4)
  saved = TOKENS * WIDTH - 5 * (TOKENS + WIDTH)
  assert report.numbers[0] - report.numbers[1] == saved


def test_weighted_it_is_the_truncated_svd_of_weighted_rows(model):
  counts = np.arange(30) ** 2  # fewer tokens than rows
  result, report = factorise(model, 5, counts)
  roots = np.sqrt(np.concatenate([counts, np.zeros(10)]) + 1)[:, None]
  left, sizes, right = np.linalg.svd(roots * _table(model), full_matrices=False)
  wanted = (left[:, :5] * sizes[:5]) @ right[:5] / roots
  np.testing.assert_allclose(_table(result), wanted, atol=1e-6)
  assert report.weighted_error < report.error
  plain, _ = factorise(model, 5)
  off = lambda one: np.square(_table(one) - _table(model)).sum(1)
  assert (off(result) * roots[:, 0] ** 2).sum() < (off(plain) * roots[:, 0] ** 2).sum()


def test_the_model_runs_as_if_the_table_were_dense_and_is_read_again(model, tmp_path):
  result, _ = factorise(model, 7)
  tokens_BT = jnp.arange(12).reshape(2, 6)
  logits = logits_of(result, tokens_BT)
  plain = nnx.clone(model)
  plain.embedding.table.set_value(jnp.asarray(_table(result), jnp.float32))
  np.testing.assert_allclose(logits, logits_of(plain, tokens_BT), atol=1e-5)
  hf.save_pretrained(result, None, tmp_path / 'out')
  again, _ = hf.load_pretrained(tmp_path / 'out')
  np.testing.assert_array_equal(logits_of(again, tokens_BT), logits)


def test_wrong_input_is_named(model):
  for rank in (0, WIDTH):
    with pytest.raises(ValueError, match=f'below the width of 16, not {rank}'):
      factorise(model, rank)
  with pytest.raises(ValueError, match=r'embedding\.table is a TransposedTensor'):
    factorise(factorise(model, 3)[0], 2)
