"""OWL: sparsities by hand on a model with known outliers, and the masks they give."""

import jax.numpy as jnp
import numpy as np
import pytest

from model.compress import contracts, owl, pipeline, recipe
from model.transformer import linears, matrices


def _survey(rng, outliers):
  """(layer, w, statistics) of blocks, each with so many weights far above the others."""
  for i, count in enumerate(outliers):
    for name, outputs in (('attention.query', 20), ('ffn.up', 30)):
      w_IO = rng.uniform(0.9, 1.1, (40, outputs))
      w_IO.flat[:count] = 50.0
      statistics = {'input_norm': jnp.ones(40)}
      yield f'layers.{i}.{name}', jnp.asarray(w_IO, jnp.float32), statistics


def test_more_outliers_keep_more(rng):
  found = owl.share_out(_survey(rng, [0, 5, 20]), owl.OwlSpec(sparsity=0.7, reach=0.1))
  sparsity = [found[f'layers.{i}.ffn.up'] for i in range(3)]
  assert sparsity == [found[f'layers.{i}.attention.query'] for i in range(3)]
  # Two layers with c outliers each in 40 * 50 weights: shares 0, 1/4 and 1 of the span.
  more = np.array([0, 0.2 * 5 / 20, 0.2])
  np.testing.assert_allclose(sparsity, 0.7 - more + more.mean(), atol=1e-12)


def test_the_mean_is_weighted_by_parameters(rng):
  survey = [
    ('layers.0.ffn.up', jnp.ones((40, 100)), {'input_norm': jnp.ones(40)}),
    ('layers.1.ffn.up', jnp.ones((40, 10)).at[0].set(99.0), {'input_norm': jnp.ones(40)}),
  ]
  found = owl.share_out(survey, owl.OwlSpec(sparsity=0.5))
  assert np.average(list(found.values()), weights=[4000, 400]) == pytest.approx(0.5)
  assert found['layers.0.ffn.up'] - found['layers.1.ffn.up'] == pytest.approx(0.16)


def test_blocks_that_are_alike_get_the_same(rng):
  found = owl.share_out(_survey(rng, [3, 3]), owl.OwlSpec(sparsity=0.6))
  assert list(found.values()) == pytest.approx([0.6] * 4)


def test_the_model_is_as_sparse_as_asked(tiny, tokens_NT):
  model = tiny(layers=3)
  for i, path in enumerate(['layers.0.ffn.up', 'layers.2.attention.key']):
    weight = linears(model)[path].weight
    weight.set_value(weight.get_value().at[: 4 * (i + 1), :5].set(9.0))
  one = recipe.parse({'name': 'x', 'steps': [{'owl': {'sparsity': 0.6, 'threshold': 3.0}}]})
  compressed, _ = pipeline.compress(model, one, tokens_NT)
  zeros, total, of_block = 0, 0, []
  for path, w in matrices(compressed).items():
    if path.startswith('layers.'):
      zeros, total = zeros + int((w == 0).sum()), total + w.size
      if path.endswith('ffn.up'):
        of_block.append(float((w == 0).mean()))
  assert zeros / total == pytest.approx(0.6, abs=0.01)  # counts are rounded to whole inputs
  assert max(of_block) - min(of_block) == pytest.approx(0.16, abs=0.03)


def test_it_satisfies_the_contract():
  contracts.check('owl')


@pytest.mark.parametrize(
  'options, message',
  [
    ({'sparsity': 1.0}, 'between 0 and 1'),
    ({'threshold': 0.0}, 'above 0'),
    ({'sparsity': 0.9, 'reach': 0.08}, 'out of 0 to 1'),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    owl.OwlSpec(**options)
