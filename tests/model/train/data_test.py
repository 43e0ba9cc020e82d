"""Tests packing by hand on a few tokens and by brute force on random documents."""

import collections

import numpy as np
import pytest

from model.tokenizer import Tokenizer
from model.train import data
from model.train.data import PackedDataset

EOS = 9


def _dataset(documents, **settings):
  return PackedDataset.from_ids(documents, eos_id=EOS, **settings)


def test_rows_match_a_packing_by_hand():
  # The stream is 1 2 3 9 | 4 9 | 5 6 7 8 9: eleven tokens, ten labels, rows of four.
  dataset = _dataset([[1, 2, 3], [4], [], [5, 6, 7, 8]], seq_len=4, batch_size=3)
  (batch,) = dataset.sequential()
  want = {
    'tokens_BT': [[1, 2, 3, 9], [4, 9, 5, 6], [7, 8, 9, 9]],
    'labels_BT': [[2, 3, 9, -1], [9, -1, 6, 7], [8, 9, -1, -1]],
    'segments_BT': [[1, 1, 1, 1], [1, 1, 2, 2], [1, 1, 1, 0]],
    'positions_BT': [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 0]],
  }
  for name, rows in want.items():
    np.testing.assert_array_equal(getattr(batch, name), rows, name)
    assert getattr(batch, name).dtype == np.int32


def test_every_token_except_the_first_of_a_document_is_a_label_once(rng):
  documents = [list(rng.integers(0, 9, rng.integers(1, 30))) for _ in range(40)]
  dataset = _dataset(documents, seq_len=7, batch_size=4)
  got = collections.Counter()
  for batch in dataset.sequential():
    got.update(batch.labels_BT[batch.labels_BT >= 0].tolist())
  want = collections.Counter(int(t) for ids in documents for t in [*ids, EOS][1:])
  assert got == want


def test_segments_keep_attention_within_a_document(rng):
  documents = [[i] * int(rng.integers(1, 6)) for i in range(30)]  # a token names its document
  dataset = PackedDataset.from_ids(documents, eos_id=50, seq_len=8, batch_size=2)
  for batch in dataset.sequential():
    for tokens, segments, positions in zip(batch.tokens_BT, batch.segments_BT, batch.positions_BT):
      for segment in set(segments) - {0}:
        inside = tokens[segments == segment]
        assert len(set(inside) - {50}) <= 1
        assert list(positions[segments == segment]) == list(range(len(inside)))


def test_an_epoch_visits_every_row_once_in_its_own_order():
  # 13 rows, visited 3 at a time: 13 batches are three epochs, and batches cross their borders.
  dataset = PackedDataset.from_ids([range(52)], eos_id=52, seq_len=4, batch_size=3, seed=5)
  batches = [dataset.batch(step) for step in range(13)]
  order = np.concatenate([batch.tokens_BT[:, 0] // 4 for batch in batches]).reshape(3, 13)
  for epoch in order:
    assert sorted(epoch) == list(range(13)) and list(epoch) != list(range(13))
  assert len(set(map(tuple, order))) == 3


def test_batch_is_a_pure_function_of_seed_and_step():
  make = lambda seed: _dataset([list(range(8)) * 20], seq_len=4, batch_size=3, seed=seed)
  first, again, other = make(0), make(0), make(1)
  again.batch(0)
  np.testing.assert_array_equal(first.batch(17).tokens_BT, again.batch(17).tokens_BT)
  assert any(np.any(first.batch(i).tokens_BT != other.batch(i).tokens_BT) for i in range(3))
  assert first.fingerprint == again.fingerprint != other.fingerprint


def test_sequential_fills_the_last_batch_without_labels():
  dataset = _dataset([[1] * 20], seq_len=4, batch_size=4)
  batches = list(dataset.sequential())
  assert [b.tokens_BT.shape for b in batches] == [(4, 4), (4, 4)]
  assert np.sum(batches[1].labels_BT >= 0) == 4  # 20 labels, of which 16 are in the first batch


def test_from_texts_ends_each_document():
  tokenizer = Tokenizer.train_bpe(['abc abd'], 260)
  dataset = PackedDataset.from_texts(['abc', 'é'], tokenizer, seq_len=4, batch_size=1)
  assert tokenizer.decode(dataset.stream) == 'abc<|endoftext|>é<|endoftext|>'


def test_excerpts_take_an_equal_share_of_each_text():
  texts = ['\n'.join(f'line {i}' for i in range(200)), 'short', 'y' * 5000]
  taken = data.excerpts(texts, 600, seed=3)
  assert taken == data.excerpts(texts, 600, seed=3) != data.excerpts(texts, 600, seed=4)
  assert [len(t) for t in taken] == [200, 5, 200]
  assert taken[0].startswith('line ') and all(t in text for t, text in zip(taken, texts))
  assert data.excerpts(texts, sum(map(len, texts))) == texts


@pytest.mark.parametrize(
  'documents, settings, match',
  [
    ([], {'seq_len': 4, 'batch_size': 1}, 'no text to train on'),
    ([[]], {'seq_len': 4, 'batch_size': 1}, 'no text to train on'),
    ([[1]], {'seq_len': 0, 'batch_size': 1}, 'at least 1, not 0 and 1'),
    ([[1]], {'seq_len': 4, 'batch_size': 0}, 'at least 1, not 4 and 0'),
  ],
)
def test_bad_input_is_refused(documents, settings, match):
  with pytest.raises(ValueError, match=match):
    _dataset(documents, **settings)
