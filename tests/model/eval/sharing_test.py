"""Plans of reading: each text is read whole, nothing wanted is lost, and the widths cost least."""

import itertools

import numpy as np
import pytest

from model.eval import sharing
from model.eval.sharing import Text

TOKENS = 512


def _texts(rng) -> list[Text]:
  """Beginnings of a few texts over few letters, and other ends, so that much is alike."""
  stems = [tuple(rng.integers(0, 3, n).tolist()) for n in (200, 60, 60, 25, 3)]
  found = []
  for _ in range(120):
    stem = stems[rng.integers(len(stems))]
    stem = stem[: int(rng.integers(1, len(stem) + 1))] if rng.random() < 0.4 else stem
    tokens = (*stem, *rng.integers(0, 3, rng.integers(0, 12)).tolist())
    wanted = int(rng.integers(0, len(tokens)))
    found.append(Text(tokens=tokens, wanted=wanted, targets=tokens[wanted:]))
  return found


@pytest.mark.parametrize('packs', [False, True])
@pytest.mark.parametrize('seed', range(3))
def test_each_text_is_read_whole_and_what_is_wanted_is_after_its_beginning(seed, packs):
  texts = _texts(np.random.default_rng(seed))
  plan = sharing.plan(texts, TOKENS, packs=packs)
  start_of = {}
  for stage in plan.stages:
    assert len(stage.beginnings) <= stage.size or not stage.beginnings
    assert stage.size * stage.capacity <= sharing.CACHED * TOKENS
    assert all(0 < len(one) <= stage.width for one in stage.beginnings)
    for call in stage.calls:
      assert stage.width + call.width <= stage.capacity or not stage.beginnings
      assert call.size * (stage.capacity or call.width) <= sharing.CACHED * TOKENS
      taken = np.zeros((call.size, call.width), int)
      for place in call.places:
        row, start = plan.rows[place.number], stage.start(place)
        assert place.number not in start_of  # once
        start_of[place.number] = start
        assert row[:start] == (stage.beginnings[place.beginning] if stage.beginnings else ())
        rest = taken[place.row, place.column :][: len(row) - start]
        assert 0 < len(row) - start == len(rest)
        rest += 1
        assert place.column == 0 or (packs and not stage.beginnings)
      assert taken.max() == 1
  assert set(start_of) == set(range(len(plan.rows)))
  for text, row in zip(texts, plan.row_of, strict=True):
    assert plan.rows[row][: len(text.tokens)] == text.tokens
    assert start_of[row] <= text.wanted


def test_questions_after_the_same_examples_share_them_or_their_own_beginning(monkeypatch):
  monkeypatch.setattr(sharing, 'PROGRAM', 10)  # few texts would not be worth the programs
  draw = lambda rng, n: tuple(rng.integers(0, 1000, n).tolist())

  def read(examples, question):
    rng = np.random.default_rng(0)
    shots, texts = draw(rng, examples), []
    for _ in range(6):
      asked = (*shots, *draw(rng, question))
      texts += [
        Text(tokens=(*asked, *draw(rng, 2)), wanted=len(asked) - 1, targets=(0,) * 3)
        for _ in range(4)
      ]
    return sharing.plan(texts, 4096).read

  assert read(300, 20) == 300 + 24 * (20 + 2)  # the examples once, and each question four times
  assert read(20, 300) == 6 * (319 + 4 * 3)  # each question once, and the examples with it


def test_widths_cost_least(monkeypatch):
  monkeypatch.setattr(sharing, 'PROGRAM', 100)
  rng = np.random.default_rng(0)
  for _ in range(20):
    lengths = rng.integers(1, 90, rng.integers(1, 12)).tolist()
    tops = sorted({-(-length // sharing.STEP) * sharing.STEP for length in lengths})

    def cost(widths, lengths=lengths):
      return sum(min(w for w in widths if w >= length) for length in lengths) + 100 * len(widths)

    every = [
      (*some, tops[-1])
      for count in range(len(tops))
      for some in itertools.combinations(tops[:-1], count)
    ]
    assert cost(sharing.widths(lengths)) == min(map(cost, every))


def test_nothing_is_planned_for_nothing():
  assert sharing.plan([], TOKENS).stages == ()
