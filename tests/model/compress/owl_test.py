"""Tests OWL's sparsities by hand on a model with known outliers, and the resulting masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.compress import owl, pipeline, recipe, registry
from model.compress.obs import SparseGptSpec
from model.transformer import linears, matrices


def _survey(rng, outliers):
  """Yields (layer, w, statistics) of blocks with given numbers of outlier weights."""
  for i, count in enumerate(outliers):
    for name, outputs in (('attention.query', 20), ('ffn.up', 30)):
      w_IO = rng.uniform(0.9, 1.1, (40, outputs))
      w_IO.flat[:count] = 50.0
      statistics = {'input_norm': jnp.ones(40)}
      yield f'layers.{i}.{name}', jnp.asarray(w_IO, jnp.float32), statistics


def test_blocks_with_more_outliers_keep_more_weights(rng):
  found = owl.share_out(_survey(rng, [0, 5, 20]), owl.OwlSpec(sparsity=0.7, reach=0.1))
  sparsity = [found[f'layers.{i}.ffn.up'] for i in range(3)]
  assert sparsity == [found[f'layers.{i}.attention.query'] for i in range(3)]
  # Two layers with c outliers each in 40 * 50 weights: shares 0, 1/4 and 1 of the span.
  more = np.array([0, 0.2 * 5 / 20, 0.2])
  np.testing.assert_allclose(sparsity, 0.7 - more + more.mean(), atol=1e-12)


def test_outliers_are_relative_to_the_mean_of_their_block(rng):
  """All scores of a block share one mean, as in the authors' code, so large inputs count more."""
  survey, pools = [], []
  for i, spread in enumerate((1.5, 3.0, 6.0)):
    pools.append([])
    for name, size in (('attention.query', 9.0), ('ffn.up', 1.0), ('ffn.down', 0.1)):
      w_IO = rng.standard_t(spread, (40, 30)).astype(np.float32)
      norm_I = (size * rng.uniform(0.5, 2, 40)).astype(np.float32)
      survey.append((f'layers.{i}.{name}', jnp.asarray(w_IO), {'input_norm': jnp.asarray(norm_I)}))
      pools[-1].append(np.abs(w_IO) * norm_I[:, None])
  share = np.array([(np.stack(pool) > 4 * np.mean(pool)).mean() for pool in pools])
  density = 0.4 + 2 * 0.1 * (share - share.min()) / np.ptp(share)
  density += 0.4 - density.mean()
  found = owl.share_out(iter(survey), owl.OwlSpec(sparsity=0.6, threshold=4.0, reach=0.1))
  assert list(found) == [layer for layer, _, _ in survey]
  np.testing.assert_allclose(list(found.values()), np.repeat(1 - density, 3), atol=1e-6)
  alone = [np.mean([(one > 4 * one.mean()).mean() for one in pool]) for pool in pools]
  assert np.abs(share - alone).max() > 0.02  # means per layer would give other numbers


def test_the_mean_is_weighted_by_parameters(rng):
  survey = [
    ('layers.0.ffn.up', jnp.ones((40, 100)), {'input_norm': jnp.ones(40)}),
    ('layers.1.ffn.up', jnp.ones((40, 10)).at[0].set(99.0), {'input_norm': jnp.ones(40)}),
  ]
  found = owl.share_out(survey, owl.OwlSpec(sparsity=0.5))
  assert np.average(list(found.values()), weights=[4000, 400]) == pytest.approx(0.5)
  assert found['layers.0.ffn.up'] - found['layers.1.ffn.up'] == pytest.approx(0.16)


def test_equal_blocks_get_equal_sparsities(rng):
  found = owl.share_out(_survey(rng, [3, 3]), owl.OwlSpec(sparsity=0.6))
  assert list(found.values()) == pytest.approx([0.6] * 4)


@pytest.mark.parametrize(
  'technique', ['owl', pytest.param('owl_sparsegpt', marks=pytest.mark.slow)]
)
def test_the_model_has_the_requested_sparsity(tiny, tokens_BT, technique):
  model = tiny(layers=3)
  for i, path in enumerate(['layers.0.ffn.up', 'layers.2.attention.key']):
    weight = linears(model)[path].weight
    weight.set_value(weight.get_value().at[: 4 * (i + 1), :5].set(9.0))
  one = recipe.parse({'name': 'x', 'steps': [{technique: {'sparsity': 0.6, 'threshold': 3.0}}]})
  compressed, _ = pipeline.compress(model, one, tokens_BT)
  zeros, total, of_block = 0, 0, []
  for path, w in matrices(compressed).items():
    if path.startswith('layers.'):
      zeros, total = zeros + int((w == 0).sum()), total + w.size
      if path.endswith('ffn.up'):
        of_block.append(float((w == 0).mean()))
  assert zeros / total == pytest.approx(0.6, abs=0.01)  # Wanda's are whole inputs of each output
  assert max(of_block) - min(of_block) == pytest.approx(0.16, abs=0.03)


def test_owl_sparsegpt_equals_sparsegpt_at_the_planned_sparsity(rng):
  w_IO, x_TI = rng.standard_normal((160, 24)), rng.standard_normal((300, 160))
  w_IO, x_TI = jnp.asarray(w_IO, jnp.float32), x_TI * rng.uniform(0.1, 3, 160)
  measured = {'input_norm': None, 'input_covariance': jnp.asarray(x_TI.T @ x_TI / 300, jnp.float32)}
  find = jax.jit(
    lambda w_IO, measured, name, spec: registry.lookup(name)(w_IO, measured, spec),
    static_argnums=(2, 3),
  )
  planned = measured | {registry.PLAN: jnp.float32(0.65)}
  found = find(w_IO, planned, 'owl_sparsegpt', owl.OwlSpec()).weight
  expected = find(w_IO, measured, 'sparsegpt', SparseGptSpec(sparsity=0.65)).weight
  assert int((found == 0).sum()) == round(0.65 * 160 * 24)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'sparsity': 1.0}, 'between 0 and 1'),
    ({'threshold': 0.0}, 'above 0'),
    ({'sparsity': 0.9, 'reach': 0.08}, 'out of 0 to 1'),
  ],
)
def test_invalid_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    owl.OwlSpec(**options)
