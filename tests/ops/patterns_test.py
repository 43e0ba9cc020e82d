"""Sparse patterns against pictures that are drawn by hand, and against all pairs one by one."""

import jax.numpy as jnp
import numpy as np
import pytest

from ops import patterns
from ops.patterns import First, RandomBlocks, Window

PICTURES = {
  'window2': ['#.....', '##....', '.##...', '..##..', '...##.', '....##'],
  'window2x2': ['#.....', '.#....', '#.#...', '.#.#..', '..#.#.', '...#.#'],
  'first2': ['#.....', '##....', '##....', '##....', '##....', '##....'],
  'every2': ['......', '.#....', '.#....', '.#.#..', '.#.#..', '.#.#.#'],
  'every3@0': ['#.....', '#.....', '#.....', '#..#..', '#..#..', '#..#..'],
  'rows4': ['#.....', '......', '......', '......', '#####.', '......'],
  'global4': ['#.....', '#.....', '#.....', '#.....', '#####.', '#...#.'],
  'window2+first1': ['#.....', '##....', '###...', '#.##..', '#..##.', '#...##'],
  'window1+random2x1': ['#.....', '.#....', '###...', '##.#..', None, None],
}
# One of each kind, and unions with different kinds of layouts.
ALL = [*PICTURES, 'window3+every4', 'window4+first3+random4x2@7', 'window2x3+window3', 'random2x3']
LENGTH = 48


@pytest.mark.parametrize('text', PICTURES)
def test_pictures(text):
  drawn = patterns.parse(text).picture(6)
  for line, expected in zip(drawn, PICTURES[text], strict=True):
    assert expected is None or line == expected


def test_random_blocks_are_drawn_before_the_query_one_from_each_part():
  size, count = 4, 3
  block = np.asarray(RandomBlocks(size, count, 5).sees(*_pairs())) & (_pairs()[1] <= _pairs()[0])
  for i in range(LENGTH // size):
    rows = block[i * size : (i + 1) * size]
    assert (rows == rows[0]).all()
    seen = sorted({k // size for k in np.nonzero(rows[0])[0]})
    assert len(seen) == min(i, count)
    for part in range(count):  # [part, part + 1) of `count` equal parts of i blocks
      low, high = part * i // count, (part + 1) * i // count
      assert sum(low <= one < high for one in seen) == (high > low)
  others = RandomBlocks(size, count, 6).picture(LENGTH)
  assert others != RandomBlocks(size, count, 5).picture(LENGTH)
  keys = np.arange(1000)
  drawn = [RandomBlocks(1, 1, seed).sees(np.array([1000]), keys) for seed in range(200)]
  blocks = [int(np.argmax(one)) for one in drawn]
  assert len(set(blocks)) > 150 and 400 < np.mean(blocks) < 600  # 500 +- 20 if they are random


@pytest.mark.parametrize('text', ALL)
def test_what_may_be_seen_is_touched(text):
  pattern = patterns.parse(text)
  q, k = _pairs()
  seen = np.asarray((k <= q) & pattern.sees(q, k))
  for size in (1, 3, 8):
    for i in range(0, LENGTH, size):
      starts = np.arange(0, LENGTH, size)
      touched = pattern.touches((i, i + size - 1), (jnp.asarray(starts), starts + size - 1))
      touched = np.broadcast_to(np.asarray(touched), len(starts))
      needed = [seen[i : i + size, s : s + size].any() for s in starts]
      assert not (needed & ~touched).any()


@pytest.mark.parametrize('text', ALL)
def test_how_many_keys_are_seen(text):
  pattern = patterns.parse(text)
  counts = [line.count('#') for line in pattern.picture(LENGTH)]
  bound = [pattern.seen(t + 1) for t in range(LENGTH)]
  assert all(count <= most for count, most in zip(counts, bound))
  if len(pattern.parts) == 1:
    assert counts == bound
  assert pattern.mean(LENGTH) == pytest.approx(np.mean(bound))


@pytest.mark.parametrize('text', ALL)
def test_texts_are_read_back(text):
  pattern = patterns.parse(text)
  again = patterns.parse(str(pattern))
  assert again == pattern and hash(again) == hash(pattern)


def test_what_a_cache_has_to_hold():
  recent = lambda text: patterns.parse(text).recent
  assert recent('window8') == (8, 0)
  assert recent('window8+first4') == recent('first4+window8') == (8, 4)
  assert recent('window8x2') is recent('first4') is recent('window8+every4') is None


@pytest.mark.parametrize(
  'text, message',
  [
    ('window0', 'window0'),
    ('windw8', 'window512'),
    ('', "'' is no sparse pattern"),
    ('window8 + first4', "'window8 ' in 'window8 . first4'"),
    ('random8', 'random64x3'),
    ('every4@4', 'from -1 to 3, not 4'),
  ],
)
def test_what_is_no_pattern_is_refused(text, message):
  with pytest.raises(ValueError, match=message):
    patterns.parse(text)


def test_bad_sizes_are_refused():
  for make in (
    lambda: Window(0),
    lambda: Window(3, 0),
    lambda: First(0),
    lambda: RandomBlocks(4, 0),
  ):
    with pytest.raises(ValueError, match='not 0'):
      make()
  with pytest.raises(ValueError, match='seed'):
    RandomBlocks(4, 1, -1)


def _pairs():
  return np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
