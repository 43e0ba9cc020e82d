"""Tests that a document's part depends on its content alone."""

import hashlib

import pytest

from model.train import split

TEXTS = [f'document {i}' for i in range(400)]


def test_parts_follow_from_the_hashes():
  parts = split.by_content(TEXTS, held_out=0.1)
  held = [i for i, t in enumerate(TEXTS) if hashlib.sha256(t.encode()).digest()[0] < 25]
  assert set(held) <= set(parts.held_out)  # 25 / 256 < 0.1
  assert 25 <= len(parts.held_out) <= 60
  assert sorted(parts.train + parts.held_out) == list(range(400))
  assert parts == split.by_content(TEXTS, held_out=0.1)


def test_other_documents_do_not_matter_and_copies_stay_together():
  some = TEXTS[::3] + TEXTS[:100]
  all_held = {TEXTS[i] for i in split.by_content(TEXTS).held_out}
  parts = split.by_content(some)
  assert {some[i] for i in parts.held_out} == all_held & set(some)
  assert {some[i] for i in parts.train}.isdisjoint(all_held)


def test_the_fingerprint_depends_on_contents_order_and_parts():
  prints = [
    split.by_content(TEXTS).fingerprint,
    split.by_content(TEXTS[::-1]).fingerprint,
    split.by_content(TEXTS[1:]).fingerprint,
    split.by_content(TEXTS, held_out=0.2).fingerprint,
  ]
  assert len(set(prints)) == 4


@pytest.mark.parametrize('texts', [['a', 'b'], ['a', 'b', 'c', 'a']])
@pytest.mark.parametrize('held_out', [1e-9, 0.5, 1 - 1e-9])
def test_both_parts_have_documents(texts, held_out):
  parts = split.by_content(texts, held_out=held_out)
  assert parts.train and parts.held_out
  assert {texts[i] for i in parts.train}.isdisjoint(texts[i] for i in parts.held_out)


def test_bad_input_is_named():
  with pytest.raises(ValueError, match=r'1 documents that differ'):
    split.by_content(['a', 'a'])
  with pytest.raises(ValueError, match='between 0 and 1, not 1'):
    split.by_content(TEXTS, held_out=1)
