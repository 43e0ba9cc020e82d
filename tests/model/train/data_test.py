"""Tests packing by hand on a few tokens and by brute force on random documents."""

import collections
import dataclasses
import hashlib

import numpy as np
import pytest

from model.tokenizer import Tokenizer
from model.train import data
from model.train.data import Document, PackedDataset

EOS = 9
ARRAYS = ('tokens_BT', 'labels_BT', 'segments_BT', 'positions_BT')


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


def test_joined_rows_are_one_text_each():
  documents = [[1, 2, 3], [4], [5, 6, 7, 8]]
  apart = _dataset(documents, seq_len=4, batch_size=3)
  joined = _dataset(documents, seq_len=4, batch_size=3, joined=True)
  one, other = apart.batch(0), joined.batch(0)
  np.testing.assert_array_equal(one.tokens_BT, other.tokens_BT)
  np.testing.assert_array_equal(one.labels_BT, other.labels_BT)
  assert other.segments_BT is other.positions_BT is None
  assert apart.fingerprint != joined.fingerprint


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


def test_texts_give_the_batches_that_they_always_gave():
  # A run that was started by an earlier version has to resume with the same batches.
  random = np.random.default_rng(7)
  documents = [random.integers(0, 50, int(random.integers(1, 30))) for _ in range(60)]
  dataset = PackedDataset.from_ids(documents, eos_id=50, seq_len=16, batch_size=4, seed=3)
  digest = hashlib.sha256()
  for step in range(20):
    for name in ARRAYS:
      digest.update(getattr(dataset.batch(step), name).tobytes())
  assert digest.hexdigest()[:16] == 'eeadfebc585dd67a'
  assert dataset.fingerprint[:16] == '2bcf0cd0215784b0'


def _document(ids, trained):
  return Document(np.asarray(ids, np.int32), np.asarray([c == '1' for c in trained]))


def test_whole_documents_match_a_packing_by_hand():
  documents = [
    _document([1, 2, 3], '011'),
    _document([4, 5, 6, 7, 8], '01010'),  # loses its last token
    _document([5], '1'),  # has no label
    _document([6, 7, 8], '101'),
    _document([1, 2, 3, 4, 5, 6], '000001'),  # loses its label
    _document([9, 9], '01'),
  ]
  # Rows of four: the second document fills one, and no two of the others fit together.
  dataset = PackedDataset.from_whole(documents, seq_len=4, batch_size=4)
  (batch,) = dataset.sequential()
  want = {
    'tokens_BT': [[1, 2, 3, 0], [4, 5, 6, 7], [6, 7, 8, 0], [9, 9, 0, 0]],
    'labels_BT': [[2, 3, -1, -1], [5, -1, 7, -1], [-1, 8, -1, -1], [9, -1, -1, -1]],
    'segments_BT': [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]],
    'positions_BT': [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 0, 1]],
  }
  for name, rows in want.items():
    np.testing.assert_array_equal(getattr(batch, name), rows, name)
    assert getattr(batch, name).dtype == np.int32
  assert dataclasses.asdict(dataset.counts) == {
    'documents': 4,
    'tokens': 12,
    'labels': 6,
    'rows': 4,
    'truncated': 2,
    'dropped': 2,
  }


def _random_documents(rng, count=40):
  lengths = rng.integers(1, 30, count)
  return [_document(rng.integers(0, 9, n), rng.choice(['0', '1'], n)) for n in lengths]


def test_whole_documents_keep_their_tokens_and_labels_together(rng):
  documents = _random_documents(rng)
  dataset = PackedDataset.from_whole(documents, seq_len=24, batch_size=3)
  got = collections.Counter()
  for batch in dataset.sequential():
    for row in range(3):
      tokens, labels, segments, positions = (getattr(batch, name)[row] for name in ARRAYS)
      if not np.any(labels >= 0):
        continue  # pads the last batch
      for segment in set(segments) - {0}:
        inside = segments == segment
        got[(*tokens[inside], None, *labels[inside])] += 1
        assert list(positions[inside]) == list(range(inside.sum()))
  want = collections.Counter()
  for document in documents:
    ids, trained = document.ids[:24], document.trained[:24]
    if trained[1:].any():
      labels = [*np.where(trained[1:], ids[1:], -1), -1]
      want[(*ids, None, *labels)] += 1
  assert got == want


@pytest.mark.parametrize('whole', [False, True])
def test_counts_are_those_of_the_rows(rng, whole):
  documents = _random_documents(rng)
  if whole:
    dataset = PackedDataset.from_whole(documents, seq_len=32, batch_size=1)
  else:
    dataset = _dataset([document.ids for document in documents], seq_len=32, batch_size=1)
  batches = list(dataset.sequential())
  counts = dataset.counts
  assert counts.rows == len(batches)
  assert counts.labels == sum(int(np.sum(b.labels_BT >= 0)) for b in batches)
  if whole:
    assert counts.tokens == sum(int(np.sum(b.segments_BT > 0)) for b in batches)
    assert counts.documents == sum(len(set(b.segments_BT.flat) - {0}) for b in batches)


def test_the_fingerprint_covers_what_is_trained():
  make = lambda marks: PackedDataset.from_whole(
    [_document([1, 2, 3, 4], marks)], seq_len=4, batch_size=1
  )
  assert make('0110').fingerprint == make('0110').fingerprint != make('0111').fingerprint
  text = PackedDataset(
    stream=make('0110').stream, starts=make('0110').starts, seq_len=4, batch_size=1
  )
  assert text.fingerprint != make('1111').fingerprint


def test_bad_documents_are_refused():
  with pytest.raises(ValueError, match='none of 1 documents has a label in its first 2 tokens'):
    PackedDataset.from_whole([_document([1, 2, 3], '101')], seq_len=2, batch_size=1)
  with pytest.raises(ValueError, match='none of 0 documents'):
    PackedDataset.from_whole([], seq_len=2, batch_size=1)
  with pytest.raises(ValueError, match=r'\(3,\) tokens have \(2,\) marks'):
    _document([1, 2, 3], '10')


def test_excerpts_take_an_equal_share_of_each_text():
  texts = ['\n'.join(f'line {i}' for i in range(200)), 'short', 'y' * 5000]
  taken = data.excerpts(texts, 600, seed=3)
  assert taken == data.excerpts(texts, 600, seed=3) != data.excerpts(texts, 600, seed=4)
  assert [len(t) for t in taken] == [200, 5, 200]
  assert taken[0].startswith('line ') and all(t in text for t, text in zip(taken, texts))
  assert data.excerpts(texts, sum(map(len, texts))) == texts


def test_excerpts_of_long_rows_are_long_and_of_fewer_texts():
  texts = ['a' * 900, 'b' * 90, 'c' * 900, 'd' * 90, 'e' * 900]
  taken = data.excerpts(texts, 1000, shortest=450)
  assert [len(text) for text in taken] == [450, 450] and taken[0] < taken[1]
  assert {text[0] for text in taken} < {'a', 'c', 'e'}
  drawn = {data.excerpts(texts, 1000, seed=s, shortest=450)[0][0] for s in range(20)}
  assert drawn == {'a', 'c'}
  assert [len(t) for t in data.excerpts(texts, 2250, shortest=450)] == [450, 90, 450, 90, 450]


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
