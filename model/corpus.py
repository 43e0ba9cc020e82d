"""Texts to train, calibrate and measure on, split by their content.

A document's part follows from the SHA-256 of its content, so copies of a document share a part, and
a part stays the same when other documents are added or removed. The fingerprint goes into every
record that was measured on the corpus. Without a text of the user's, the corpus is the source of
the Python standard library that runs the program: no network, and about 28 MB.
"""

import collections
import dataclasses
import gzip
import hashlib
import json
import pathlib
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from model import library

TRAIN_PERCENT, CALIBRATION_PERCENT = 90, 5  # the rest is held out
SUFFIXES = ('.txt', '.md', '.py', '.json', '.jsonl')  # in small or capital letters, or with .gz
LARGEST_BLOCK = 8192  # characters of a block, where one text is cut up
SMALLEST_BLOCK = 64
LONGEST_TOKEN = 16  # characters; a row of tokens is longer than 16 characters a token only rarely
SOURCE, DOCUMENTATION = 'python-source', 'python-docs'
BUILT_IN = {  # what they are, and how they are read
  SOURCE: ('the standard library', library.source),
  DOCUMENTATION: ('the documentation', library.documentation),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """Documents in three disjoint parts, each in the order of its source."""

  train: tuple[str, ...] = dataclasses.field(repr=False)
  calibration: tuple[str, ...] = dataclasses.field(repr=False)
  held_out: tuple[str, ...] = dataclasses.field(repr=False)
  fingerprint: str  # SHA-256 over the documents of all parts and their split
  source: str  # where the texts come from, for people

  def __post_init__(self):
    empty = [name for name in ('train', 'calibration', 'held_out') if not getattr(self, name)]
    if empty:
      raise ValueError(f'{self.source}: no text in {" and ".join(empty)}; give more text')


def load(path: str | pathlib.Path | None = None) -> Corpus:
  """Reads the documents of a file or a folder, or a text of `BUILT_IN`, and splits them.

  Fewer than three documents are cut into blocks at blank lines (or else line ends, spaces,
  anywhere), so that every part has some. Empty documents and repeats are dropped.

  Raises:
    ValueError: what `documents` raises, or there is no text.
  """
  path = SOURCE if path is None else path
  if path in BUILT_IN:
    return _built_in(path)
  texts = _unique(documents(path))
  if not texts:
    raise ValueError(f'{path}: all of its texts are empty')
  if len(texts) < 3:
    texts = _unique(block for text in texts for block in blocks(text))
  if len(texts) < 3:
    raise ValueError(f'{path}: too little text to be split into three parts; give more')
  return split(texts, source=str(path))


def documents(path: str | pathlib.Path) -> list[str]:
  """Reads the documents of a text file, or of a folder of `SUFFIXES` files.

  A `.jsonl` file has one document per line, a `.json` file has an array of documents, or lines like
  a `.jsonl` file. There, a document is a string, or an object with a string field "text". A file of
  any other name is one document. Each may be compressed by gzip, with `.gz` after its name, and may
  begin with a byte-order mark.

  Raises:
    ValueError: the path is missing, the folder has no such file, or a file is damaged, not UTF-8
      or not JSON of this form.
  """
  return [text for file in _files(pathlib.Path(path)) for text in _read(file)]


def read_text(file: pathlib.Path) -> str:
  """Reads a UTF-8 file, compressed by gzip if its name ends in .gz, without its byte-order mark.

  Raises:
    ValueError: the file is damaged or not UTF-8.
  """
  data = file.read_bytes()
  try:
    if file.suffix.lower() == '.gz':
      data = gzip.decompress(data)
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(f'{file}: not UTF-8 ({error.reason} at byte {error.start})') from error
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f'{file}: not a whole gzip file ({error})') from error


def json_lines(text: str, file: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields where each line is, as words for people, and the JSON value that it holds.

  Blank lines are skipped. Raises ValueError at a line that is not JSON.
  """
  for number, line in enumerate(text.split('\n'), 1):
    if line.strip():
      where = f'{file}, line {number}'
      try:
        record = json.loads(line)
      except json.JSONDecodeError as error:
        raise ValueError(f'{where}: not JSON ({error})') from error
      yield where, record


def name(path: str | pathlib.Path) -> str:
  """A short name of a text: that of the file without its extensions, of the folder, or its own."""
  return str(path) if path in BUILT_IN else pathlib.Path(path).resolve().name.partition('.')[0]


def standard_library() -> Corpus:
  """The source of the running Python's standard library, in three parts."""
  return _built_in(SOURCE)


def split(documents: Iterable[str], *, source: str) -> Corpus:
  """Splits documents by the SHA-256 of their content.

  Where that would leave a part empty, the documents are put in the order of their hashes and that
  order is cut, so that three documents suffice.
  """
  keyed = [(hashlib.sha256(text.encode()).digest(), text) for text in documents]
  parts = [_part(int.from_bytes(digest[:8], 'big') % 100) for digest, _ in keyed]
  if len(set(parts)) < 3:
    parts = _parts_by_rank([digest for digest, _ in keyed])
  texts, fingerprint = collections.defaultdict(list), hashlib.sha256()
  for part, (digest, text) in zip(parts, keyed):
    texts[part].append(text)
    fingerprint.update(part.encode() + digest)
  return Corpus(
    train=tuple(texts['train']),
    calibration=tuple(texts['calibration']),
    held_out=tuple(texts['held_out']),
    fingerprint=fingerprint.hexdigest(),
    source=source,
  )


def blocks(text: str) -> list[str]:
  """Cuts a text into consecutive blocks that join to it again.

  A block ends at a blank line if one is near, or else at the end of a line, at a space, or
  anywhere. There are about a hundred, or more of them in a long text.
  """
  size = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, len(text) // 100))
  found, start = [], 0
  while start < len(text):
    stop = _cut(text, start + size, start + 2 * size)
    found.append(text[start:stop])
    start = stop
  return found


def sample_rows(
  texts: Sequence[str],
  encode: Callable[[str], Sequence[int]],
  length: int,
  count: int,
  *,
  seed: int = 0,
) -> np.ndarray:
  """Draws rows of tokens that begin anywhere in the texts, int32 [rows, length], in random order.

  The rows are spread over all texts, a text may end and the next begin within a row, and no two
  rows share a place. Where the texts have fewer than `count` rows of tokens, there are just enough
  rows to hold all tokens: they begin at equal distances and overlap by less than a row in all.

  Raises:
    ValueError: the texts together are shorter than one row.
  """
  random = np.random.default_rng(seed)
  whole = ''.join(text if text.endswith('\n') else f'{text}\n' for text in texts)
  rows = _from_cells(whole, encode, length, count, random)
  if rows is None:
    rows = _from_all(np.asarray(encode(whole), np.int32), length, count, random)
  return random.permutation(np.asarray(rows, np.int32))


def _from_cells(whole, encode, length, count, random):
  """One row from each of `count` equal parts of a long text; None if a part may be too short."""
  cell, reach = len(whole) // count, LONGEST_TOKEN * length
  rows = []
  for i in range(count if cell >= reach else 0):
    start = i * cell + int(random.integers(cell - reach + 1))
    rows.append(encode(whole[start : start + reach])[:length])
  return rows if rows and all(len(row) == length for row in rows) else None


def _from_all(tokens, length, count, random):
  """Rows of a text that is tokenized as a whole, by the random gaps that they leave in it."""
  if len(tokens) < length:
    raise ValueError(f'the text has {len(tokens)} tokens, fewer than one row of {length}')
  spare = len(tokens) - count * length
  if spare < 0:
    count = -(-len(tokens) // length)
    starts = np.linspace(0, len(tokens) - length, count).round().astype(int)
  else:
    starts = np.arange(count) * length + np.sort(random.integers(spare + 1, size=count))
  return [tokens[start : start + length] for start in starts]


def _built_in(name: str) -> Corpus:
  what, read = BUILT_IN[name]
  return split(_unique(read()), source=f'{what} of Python {sysconfig.get_python_version()}')


def _cut(text: str, low: int, high: int) -> int:
  if low >= len(text):
    return len(text)
  for separator in ('\n\n', '\n', ' '):
    at = text.find(separator, low, high)
    if at >= 0:
      return at + len(separator)
  return low


def _part(percentile: int) -> str:
  if percentile < TRAIN_PERCENT:
    return 'train'
  return 'calibration' if percentile < TRAIN_PERCENT + CALIBRATION_PERCENT else 'held_out'


def _parts_by_rank(digests: list[bytes]) -> list[str]:
  order = sorted(range(len(digests)), key=digests.__getitem__)
  parts = ['train'] * len(digests)
  each = max(1, len(digests) * CALIBRATION_PERCENT // 100)
  for i in order[:each]:
    parts[i] = 'calibration'
  for i in order[each : 2 * each]:
    parts[i] = 'held_out'
  return parts


def _unique(texts: Iterable[str]) -> list[str]:
  return list(dict.fromkeys(text for text in texts if text.strip()))


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  if path.is_file():
    return [path]
  if not path.is_dir():
    raise ValueError(f'{path}: no such file or folder')
  files = sorted(f for f in path.rglob('*') if _suffix(f) in SUFFIXES and f.is_file())
  if not files:
    raise ValueError(f'{path}: the folder holds no {", ".join(SUFFIXES)} files')
  return files


def _suffix(file: pathlib.Path) -> str:
  return pathlib.PurePath(file.name.lower().removesuffix('.gz')).suffix


def _read(file: pathlib.Path) -> Iterator[str]:
  text = read_text(file)
  if _suffix(file) not in ('.json', '.jsonl'):
    return iter([text])
  array = _array(text) if _suffix(file) == '.json' else None
  return _of_lines(text, file) if array is None else _of_array(array, file)


def _array(text: str) -> list | None:
  """The array or the single object that the text is; None if it is neither."""
  try:
    value = json.loads(text)
  except json.JSONDecodeError:
    return None
  return value if isinstance(value, list) else [value]


def _of_array(records: list, file: pathlib.Path) -> Iterator[str]:
  for number, record in enumerate(records, 1):
    yield _text_of(record, f'{file}, entry {number}')


def _of_lines(text: str, file: pathlib.Path) -> Iterator[str]:
  for where, record in json_lines(text, file):
    yield _text_of(record, where)


def _text_of(record, where: str) -> str:
  text = record.get('text') if isinstance(record, dict) else record
  if not isinstance(text, str):
    raise ValueError(f'{where}: expected a string, or an object with a string field "text"')
  return text
