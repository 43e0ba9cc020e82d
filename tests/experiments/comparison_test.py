"""The key by which a killed run is found again stands for everything that the results depend on."""

import dataclasses
import pathlib

import numpy as np
import pytest
from flax import nnx

from experiments import common, comparison, study
from experiments.comparison import Comparison
from model import presets
from model.compress import recipe
from model.eval import perplexity
from model.transformer import Transformer


def _comparison(seed=0, tokens=0, names=('int8',), **settings):
  tokens_BT = np.full((2, 8), tokens, np.int32)
  text = perplexity.Windows(tokens_BT=tokens_BT, predicted_bytes=9)
  work = study.Study(
    base=Transformer(presets.preset('tiny-llama'), rngs=nnx.Rngs(seed)),
    calibration_BT=np.full((2, 8), 3, np.int32),
    texts={'text': text},
    settings={'model': 'x'},
    environment={},
    seed=0,
  )
  recipes = tuple(recipe.resolve(name, common.RECIPES) for name in names)
  return Comparison(inputs=None, work=dataclasses.replace(work, **settings), recipes=recipes)


def test_the_key_changes_with_anything_that_the_results_depend_on(tmp_path, monkeypatch):
  first = _comparison().key()
  assert first == _comparison().key() and len(first) == 12
  plugin = tmp_path / 'mine.py'
  plugin.write_text('a = 1')
  keys = [
    first,
    _comparison(seed=1).key(),  # other weights, the same config
    _comparison(tokens=1).key(),
    _comparison(names=('int4',)).key(),
    _comparison(rounds=9).key(),
    _comparison(calibration_BT=np.zeros((2, 8), np.int32)).key(),
    _comparison(settings={'model': 'y'}).key(),
    _comparison().key([plugin]),
  ]
  plugin.write_text('a = 2')
  keys.append(_comparison().key([plugin]))
  (tmp_path / 'ops').mkdir()
  (tmp_path / 'ops/linear.py').write_text('other code')
  monkeypatch.setattr(comparison, 'ROOT', pathlib.Path(tmp_path))
  keys.append(_comparison().key())
  assert len(set(keys)) == len(keys)


def test_a_name_given_twice_is_refused():
  int8 = recipe.resolve('int8', common.RECIPES)
  with pytest.raises(ValueError, match='names int8 twice'):
    comparison.check_names([int8, int8])
  with pytest.raises(ValueError, match='or the base itself'):
    comparison.check_names([dataclasses.replace(int8, name='base')])
