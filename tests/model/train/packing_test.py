"""Tests packing against the definition of best fit decreasing and against the fewest rows."""

import functools

import pytest

from model.train import packing


def _by_definition(lengths, capacity):
  """Best fit decreasing with a search over all rows."""
  rows = []
  for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    free = [capacity - sum(lengths[j] for j in row) for row in rows]
    fits = [r for r, room in enumerate(free) if room >= lengths[i]]
    if fits:
      rows[min(fits, key=free.__getitem__)].append(i)
    else:
      rows.append([i])
  return rows


def _fewest(lengths, capacity):
  """The fewest rows, by trying every division."""

  @functools.cache
  def fewest(left):
    if not left:
      return 0
    first, *rest = left
    best = len(left)
    for chosen in range(2 ** len(rest)):
      group = [first] + [x for b, x in enumerate(rest) if chosen >> b & 1]
      if sum(group) <= capacity:
        others = tuple(x for b, x in enumerate(rest) if not chosen >> b & 1)
        best = min(best, 1 + fewest(others))
    return best

  return fewest(tuple(lengths))


def test_rows_are_those_of_the_definition(rng):
  for _ in range(30):
    lengths = rng.integers(1, 33, int(rng.integers(1, 80))).tolist()
    rows = packing.best_fit(lengths, 32)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 32 for row in rows)
    assert all(row == sorted(row) for row in rows) and rows == sorted(rows)
    want = _by_definition(lengths, 32)
    assert sorted(sum(lengths[i] for i in row) for row in rows) == sorted(
      sum(lengths[i] for i in row) for row in want
    )


def test_rows_are_few(rng):
  for _ in range(12):
    lengths = rng.integers(1, 11, 9).tolist()
    assert len(packing.best_fit(lengths, 10)) <= 11 / 9 * _fewest(lengths, 10) + 6 / 9


def test_a_packing_by_hand():
  assert packing.best_fit([3, 5, 1, 4, 2], 6) == [[0], [1, 2], [3, 4]]
  assert packing.best_fit([], 6) == []


@pytest.mark.parametrize('length', [0, 7])
def test_lengths_that_fit_no_row_are_refused(length):
  with pytest.raises(ValueError, match=f'a document of {length} tokens does not fit a row of 6'):
    packing.best_fit([2, length], 6)
