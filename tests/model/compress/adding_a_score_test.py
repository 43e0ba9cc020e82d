"""The promise of the registry: a new pruning score is one function and one row."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import study
from model.compress import contracts, pipeline, recipe, registry
from model.eval import perplexity, report


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
  monkeypatch.setattr(registry, 'TECHNIQUES', dict(registry.TECHNIQUES))


@pytest.fixture
def work(tiny, tokens_BT):
  text = perplexity.windows(tokens_BT.reshape(-1), np.arange(tokens_BT.size), 10)
  shared = {'settings': {}, 'environment': {}, 'seed': 0, 'rounds': 5, 'prompt_length': 8}
  return study.Study(base=tiny(), calibration_BT=tokens_BT, texts={'text': text}, **shared)


def test_ten_lines(work):
  @registry.pruning_score('loud', statistics=['input_absmax'], paper='Me 2030, https://example.org')
  def loud(w_IO, statistics):
    """Drop the weights whose size times the largest input is smallest."""
    return jnp.abs(w_IO) * statistics['input_absmax'][:, None]

  contracts.check('loud')
  one = recipe.parse({'name': 'loud', 'steps': [{'loud': {'n': 2, 'm': 4}}]})
  model, row = study.run(work, study.baseline(work), one)
  assert pipeline.describe(model.layers[0].ffn.up.weight.get_value()) == 'SparseTensor 2 4'
  assert 'loud' in report.html([row])


def test_the_score_decides_what_stays(tiny):
  @registry.pruning_score('first', paper='Me 2030, https://example.org')
  def first(w_IO, statistics):
    """Keep the first inputs."""
    return -jax.lax.broadcasted_iota(jnp.float32, w_IO.shape, 0)

  model, _ = pipeline.compress(tiny(), recipe.resolve('first', pathlib.Path('no folder')))
  kept_IO = np.asarray(model.layers[0].ffn.down.weight.get_value()) != 0
  assert kept_IO[:40].all()
  assert not kept_IO[40:].any()
