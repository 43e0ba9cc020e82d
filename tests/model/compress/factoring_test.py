"""Factored matrices in recipes: layers, tied embeddings, and what comes after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.compress import factoring, pipeline, recipe
from model.infer.prepare import prepare
from model.transformer import matrices
from ops.low_rank import LowRankTensor

logits_of = jax.jit(lambda model: model(jnp.asarray(TOKENS_BT)))
TOKENS_BT = np.random.default_rng(0).integers(0, 61, (2, 9))


def _compressed(model, *steps, **options):
  parsed = recipe.parse({'name': 'x', 'steps': list(steps), **options})
  return pipeline.compress(model, parsed)[0]


def test_the_share_is_that_of_the_numbers():
  spec = factoring.LowRankSpec(share=0.25)
  rank = spec.rank_of(48, 61)
  assert rank * (48 + 61) <= 0.25 * 48 * 61 < (rank + 1) * (48 + 61)
  assert factoring.LowRankSpec(rank=7).rank_of(48, 61) == 7
  with pytest.raises(ValueError, match='at least 1, not 0'):
    factoring.LowRankSpec(rank=0)
  with pytest.raises(ValueError, match='at most 1, not 2'):
    factoring.LowRankSpec(share=2)


def test_a_tied_embedding_is_factored_and_then_rounded(tiny):
  model = tiny(tied=True)
  only = {'only': ['embedding']}
  step = {'low_rank': {'rank': 16}, **only}
  factored = _compressed(model, step, embedding=True)
  table, dense = factored.embedding.table.get_value(), model.embedding.table.get_value()
  left, sizes, right = np.linalg.svd(np.asarray(dense), full_matrices=False)
  np.testing.assert_allclose(
    jax.jit(lambda w: w.dense())(table), (left[:, :16] * sizes[:16]) @ right[:16], atol=1e-5
  )
  rounding = {'round_to_nearest': {'format': 'int8'}, **only}
  rounded = _compressed(model, step, rounding, embedding=True)
  assert rounded.embedding.table.get_value().nbytes < table.nbytes / 1.5
  logits = logits_of(factored)
  np.testing.assert_allclose(logits_of(rounded), logits, atol=0.05)
  np.testing.assert_allclose(logits_of(prepare(rounded)), logits, atol=0.05)


def test_layers_are_factored(tiny):
  model = tiny(tied=True)
  changed = _compressed(model, {'low_rank': {'rank': 4}, 'only': ['layers.*.ffn.*']})
  found = {path for path, w in matrices(changed).items() if isinstance(w, LowRankTensor)}
  assert found == {path for path in matrices(model) if '.ffn.' in path}
