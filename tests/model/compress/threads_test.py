"""The threads of BLAS are limited while a model is compressed, and given back."""

import pytest
import threadpoolctl

from model.compress import pipeline, recipe, threads


def _counts():
  return [
    one['num_threads'] for one in threadpoolctl.threadpool_info() if one['user_api'] == 'blas'
  ]


@pytest.fixture(autouse=True)
def two():
  """Two threads of BLAS on any machine."""
  threads.few(1)  # loads it
  with threadpoolctl.threadpool_limits(2, user_api='blas'):
    yield


def test_small_matrices_are_factored_by_one_thread():
  assert set(_counts()) == {2}
  with threads.few(threads.MOST_INPUTS):
    assert set(_counts()) == {1}
  assert set(_counts()) == {2}
  with threads.few(threads.MOST_INPUTS + 1):
    assert set(_counts()) == {2}


@pytest.mark.parametrize('most, expected', [(4096, 1), (8, 2)])
@pytest.mark.quick(most=(4096,))
def test_a_compression_limits_them_by_its_widest_matrix(
  tiny, tokens_BT, monkeypatch, most, expected
):
  monkeypatch.setattr(threads, 'MOST_INPUTS', most)
  seen = []

  def progress(parts):
    seen.extend(_counts())
    return iter(parts)

  one = recipe.parse({'name': 'one', 'steps': [{'gptq': {'format': 'int4'}}]})
  pipeline.compress(tiny(layers=1), one, tokens_BT, progress=progress)
  assert set(seen) == {expected} and set(_counts()) == {2}
