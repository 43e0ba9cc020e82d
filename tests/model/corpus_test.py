"""The split of texts, against what hashlib says of each document."""

import gzip
import hashlib
import json
import re
import sysconfig

import numpy as np
import pytest

from model import corpus, library


def _bucket(text):
  value = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) % 100
  return 'train' if value < 90 else 'calibration' if value < 95 else 'held_out'


def _parts(loaded):
  return {
    'train': loaded.train,
    'calibration': loaded.calibration,
    'held_out': loaded.held_out,
  }


def test_standard_library_is_split_by_content_hash_and_repeatable():
  loaded = corpus.load()
  parts = _parts(loaded)
  for name, texts in parts.items():
    assert texts and all(_bucket(text) == name for text in texts)
  texts = [text for part in parts.values() for text in part]
  assert len(set(texts)) == len(texts) > 500
  assert 0.8 < len(loaded.train) / len(texts) < 0.97
  assert corpus.load().fingerprint == loaded.fingerprint
  assert sysconfig.get_python_version() in loaded.source


@pytest.mark.slow
def test_documentation_is_a_text_with_a_name(monkeypatch):
  what, read = corpus.BUILT_IN[corpus.DOCUMENTATION]
  assert read is library.documentation
  documents = read()
  monkeypatch.setitem(corpus.BUILT_IN, corpus.DOCUMENTATION, (what, lambda: documents))
  loaded = corpus.load(corpus.DOCUMENTATION)
  texts = sorted(text for part in _parts(loaded).values() for text in part)
  assert texts == sorted(set(documents))
  assert loaded.source == f'the documentation of Python {sysconfig.get_python_version()}'
  assert loaded.fingerprint != corpus.load(corpus.SOURCE).fingerprint


def test_a_text_is_named_after_its_file(tmp_path):
  names = [corpus.name(path) for path in ('python-docs', tmp_path / 'wiki.jsonl.gz', 'a/b/')]
  assert names == ['python-docs', 'wiki', 'b']


def test_folder_reads_every_kind_and_drops_empties_and_repeats(tmp_path):
  (tmp_path / 'deep').mkdir()
  (tmp_path / 'a.txt').write_text('plain é')
  (tmp_path / 'deep' / 'b.md').write_text('# mark')
  (tmp_path / 'c.py').write_text('x = 1\n')
  (tmp_path / 'copy.py').write_text('x = 1\n')
  (tmp_path / 'empty.txt').write_text(' \n')
  (tmp_path / 'ignored.bin').write_bytes(b'\xff')
  records = [{'text': 'one\u2028line', 'id': 1}, {'text': 'two'}]
  lines = '\n'.join(json.dumps(r, ensure_ascii=False) for r in records) + '\n\n'
  (tmp_path / 'd.jsonl').write_text(lines)
  loaded = corpus.load(tmp_path)
  texts = sorted(text for part in _parts(loaded).values() for text in part)
  assert texts == sorted(['plain é', '# mark', 'x = 1\n', 'one\u2028line', 'two'])
  assert loaded.source == str(tmp_path)


RECORDS = [{'text': 'one\u2028line', 'id': 1}, {'text': 'two é'}, 'three']
LINES = '\n'.join(json.dumps(r, ensure_ascii=False) for r in RECORDS) + '\n\n'
LAYOUTS = {
  'a.jsonl': LINES,
  'a.JSONL': LINES,
  'lines.json': LINES,
  'a.json': json.dumps(RECORDS),
  'a.Json': json.dumps(RECORDS, indent=2),
}


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('mark', [b'', b'\xef\xbb\xbf'])
@pytest.mark.parametrize('name', LAYOUTS)
def test_every_layout_of_records_gives_the_same_documents(tmp_path, name, mark, packed):
  data = mark + LAYOUTS[name].encode()
  file = tmp_path / (name + '.gz' if packed else name)
  file.write_bytes(gzip.compress(data) if packed else data)
  for path in (file, tmp_path):
    assert corpus.documents(path) == ['one\u2028line', 'two é', 'three']


def test_text_of_any_case_marked_or_packed(tmp_path):
  (tmp_path / 'A.TXT').write_bytes(b'\xef\xbb\xbfcapitals')
  (tmp_path / 'b.txt.gz').write_bytes(gzip.compress('packed é'.encode()))
  (tmp_path / 'C.MD.GZ').write_bytes(gzip.compress(b'both'))
  (tmp_path / 'one.json').write_text('{"text": "a record"}')
  (tmp_path / 'none.bin.gz').write_bytes(b'')
  assert corpus.documents(tmp_path) == ['capitals', 'both', 'packed é', 'a record']


def test_parts_do_not_move_when_documents_come(tmp_path):
  documents = [f'document {i}' for i in range(400)]
  few = corpus.split(documents[:300], source='few')
  many = corpus.split(documents, source='many')
  for name, texts in _parts(few).items():
    assert set(texts) <= set(_parts(many)[name])
  assert few.fingerprint != many.fingerprint


@pytest.mark.parametrize(
  'text',
  [
    '\n\n'.join(f'Paragraph {i} has some words in it, {i * i}.' for i in range(40)),
    '\n'.join(f'line {i}' for i in range(60)),
    ' '.join(f'word{i}' for i in range(90)),
    ''.join(map(str, range(120))),
  ],
  ids=['paragraphs', 'lines', 'words', 'unbroken'],
)
def test_a_single_file_gives_three_parts_and_loses_nothing(tmp_path, text):
  file = tmp_path / 'book.text'
  file.write_text(text)
  loaded = corpus.load(file)
  found = [block for part in _parts(loaded).values() for block in part]
  assert sorted(found) == sorted(corpus.blocks(text))
  assert ''.join(corpus.blocks(text)) == text


def test_blocks_end_at_paragraphs_and_there_are_enough():
  text = '\n\n'.join('word ' * 20 for _ in range(2000))
  found = corpus.blocks(text)
  assert 60 < len(found) <= 110
  assert all(block.endswith('\n\n') for block in found[:-1])


def test_three_documents_are_enough():
  loaded = corpus.split(['a', 'b', 'c'], source='three')
  ranked = sorted('abc', key=lambda t: hashlib.sha256(t.encode()).digest())
  assert (loaded.calibration, loaded.held_out, loaded.train) == tuple((t,) for t in ranked)


@pytest.mark.parametrize(
  'name, data, match',
  [
    ('missing', None, 'no such file or folder'),
    ('a.txt', b'', 'all of its texts are empty'),
    ('a.txt', b'too short', 'too little text'),
    ('a.txt', b'fine \xff', 'not UTF-8 .* at byte 5'),
    ('a.jsonl', b'{"text": "a"}\n{"text": ', 'line 2: not JSON'),
    (
      'a.jsonl',
      b'{"body": "a"}\n',
      'line 1: expected a string, or an object with a string field "text"',
    ),
    ('a.jsonl', b'["a"]\n', 'line 1: expected a string, or an object'),
    ('a.json', b'["a", {"body": "b"}]', 'entry 2: expected a string, or an object'),
    ('a.json', b'["a", ', 'line 1: not JSON'),
    ('a.json', b'3', 'entry 1: expected a string'),
    ('a.txt.gz', b'plain', 'not a whole gzip file'),
    ('a.txt.gz', gzip.compress(b'text ' * 50, mtime=0)[:-9], 'not a whole gzip file'),
    ('a.txt.gz', gzip.compress(b'fine \xff', mtime=0), 'not UTF-8 .* at byte 5'),
  ],
)
def test_bad_text_is_named(tmp_path, name, data, match):
  if data is not None:
    (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=match) as error:
    corpus.load(tmp_path / name)
  assert str(tmp_path / name) in str(error.value)


def test_a_folder_without_texts_is_named(tmp_path):
  with pytest.raises(ValueError, match=r'holds no \.txt, \.md, \.py, \.json, \.jsonl files'):
    corpus.load(tmp_path)


def _letters(text):
  return [ord(letter) for letter in text]


def _numbered(count, separator):
  """A text whose words are all different, and the token of each: its number."""
  return separator.join(f'{i:06}' for i in range(count))


def _numbers(text):
  return [int(number) for number in re.findall(r'\d{6}', text)]


@pytest.mark.parametrize(
  'text, count, expected',
  [
    (_numbered(43000, ' '), 16, 16),  # one line of 300 KB
    (_numbered(43000, '\r'), 16, 16),  # no line ends but carriage returns
    (_numbered(3000, '\n'), 298, 24),  # 20 KB
  ],
  ids=['one line', 'carriage returns', 'short'],
)
def test_no_row_repeats_while_there_is_other_text(text, count, expected):
  rows_BT = corpus.sample_rows([text], _numbers, 128, count)
  assert rows_BT.shape == (expected, 128)
  places, times = np.unique(rows_BT, return_counts=True)
  # 24 rows of the short text have 3072 places for 3000 tokens: all of them, and 72 twice.
  assert (len(places), times.max()) == ((3000, 2) if expected == 24 else (16 * 128, 1))


def test_rows_are_stretches_that_begin_anywhere_and_are_repeatable():
  text = _numbered(43000, ' ')
  rows_BT = corpus.sample_rows([text], _numbers, 128, 16, seed=3)
  assert (np.diff(rows_BT, axis=1) == 1).all()
  assert len(set(rows_BT[:, 0] % 100)) > 8 and (np.diff(rows_BT[:, 0]) < 0).any()
  assert np.ptp(rows_BT) > 0.8 * 43000
  assert (corpus.sample_rows([text], _numbers, 128, 16, seed=3) == rows_BT).all()
  assert (corpus.sample_rows([text], _numbers, 128, 16, seed=4) != rows_BT).any()


def test_rows_do_not_overlap_where_the_text_is_just_long_enough():
  rows_BT = corpus.sample_rows([_numbered(1700, ' ')], _numbers, 100, 16, seed=1)
  assert rows_BT.shape == (16, 100) and len(np.unique(rows_BT)) == 1600


def test_a_text_of_tokens_longer_than_usual_still_fills_its_rows():
  text = ' ' * 50_000 + _numbered(20_000, ' ')  # its first cells hold no token at all
  rows_BT = corpus.sample_rows([text], _numbers, 100, 16)
  assert rows_BT.shape == (16, 100) and len(np.unique(rows_BT)) == 1600


def test_rows_go_on_in_the_next_text_where_one_is_short():
  rows_BT = corpus.sample_rows(['abc\n', 'xyz'], _letters, 7, 1)
  assert ''.join(map(chr, rows_BT[0])) in ('abc\nxyz', 'bc\nxyz\n')


def test_texts_shorter_than_a_row_are_refused():
  with pytest.raises(ValueError, match='8 tokens, fewer than one row of 9'):
    corpus.sample_rows(['abc', 'xyz'], _letters, 9, 1)
