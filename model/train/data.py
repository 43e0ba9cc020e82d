"""Packs documents into rows of equal length, as a pure function of the seed and the step.

Texts are tokenized once, joined with an end-of-text token after each, and cut into rows of T+1
tokens that overlap by one: T inputs and T labels. Every token of a document except the first is
thus a label exactly once per epoch. Conversations lose their meaning if they are cut, so each of
them is kept within one row, and only those tokens are labels that the document marks. Segments and
positions restart at each document, so attention never crosses documents. There is no iterator
state: a run that resumes at step n asks for batch n.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from model.tokenizer import Tokenizer
from model.train import packing

NO_LABEL = -1
PADDING = -1  # in a stream: a place of a row that no document fills


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['tokens_BT', 'labels_BT', 'segments_BT', 'positions_BT'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of packed documents, all int32.

  A label is the next token of the same document, or NO_LABEL at its end and where the next token is
  not trained. Segments number the documents of a row from 1; padding is segment 0. Positions count
  from the start of the document, or from the start of the row if the document began in an earlier
  row. Without segments and positions, each row is one document; attention kernels that take no
  masks apply then.
  """

  tokens_BT: jax.Array | np.ndarray
  labels_BT: jax.Array | np.ndarray
  segments_BT: jax.Array | np.ndarray | None
  positions_BT: jax.Array | np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
  """The tokens of a document, and for each whether the model learns to predict it."""

  ids: np.ndarray  # int32 [tokens]
  trained: np.ndarray  # bool [tokens]

  def __post_init__(self):
    if self.ids.shape != self.trained.shape or self.ids.ndim != 1:
      raise ValueError(f'{self.ids.shape} tokens have {self.trained.shape} marks')

  def head(self, length: int) -> 'Document':
    """The first `length` tokens, or all if there are fewer."""
    return Document(self.ids[:length], self.trained[:length])

  @property
  def labels(self) -> int:
    """The number of labels; the first token has nothing before it that could predict it."""
    return int(np.sum(self.trained[1:]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
  """The size of a data set, per epoch. Truncated documents count; dropped ones do not."""

  documents: int
  tokens: int
  labels: int
  rows: int
  truncated: int  # documents that lost their end, because a row is shorter
  dropped: int  # documents without a label in their first `seq_len` tokens


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedDataset:
  """A stream of documents with the settings that divide it into batches."""

  stream: np.ndarray = dataclasses.field(repr=False)  # tokens of all documents, int32
  starts: np.ndarray = dataclasses.field(repr=False)  # index of each document's first token, int64
  seq_len: int
  batch_size: int
  seed: int = 0
  # Whether each token of the stream is a label, bool; None: all of them are.
  trained: np.ndarray | None = dataclasses.field(default=None, repr=False)
  # Whether each row is read as one text: batches have no segments and positions then, and the
  # documents of a row see each other. For mixers that cannot tell them apart (`MixerConfig`).
  joined: bool = False
  truncated: int = 0
  dropped: int = 0

  def __post_init__(self):
    if self.seq_len < 1 or self.batch_size < 1:
      raise ValueError(
        f'seq_len and batch_size must be at least 1, not {self.seq_len} and {self.batch_size}'
      )
    if not len(self.starts) or len(self.stream) < 2:
      raise ValueError('there is no text to train on: all documents are empty')
    if self.trained is not None and self.trained.shape != self.stream.shape:
      raise ValueError(f'{self.stream.shape} tokens have {self.trained.shape} marks')

  @classmethod
  def from_ids(
    cls, documents: Iterable[Sequence[int]], *, eos_id: int, **settings
  ) -> 'PackedDataset':
    """Joins tokenized documents with `eos_id` after each; empty documents are dropped."""
    parts = [
      np.append(np.asarray(ids, np.int32), np.int32(eos_id)) for ids in documents if len(ids)
    ]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    stream = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    return cls(stream=stream, starts=np.append(np.int64(0), ends)[:-1], **settings)

  @classmethod
  def from_texts(cls, texts: Sequence[str], tokenizer: Tokenizer, **settings) -> 'PackedDataset':
    """Tokenizes texts and packs them; `settings` are `seq_len`, `batch_size` and `seed`."""
    if not tokenizer.eos_ids:
      raise ValueError('packing documents needs a tokenizer with an eos token')
    ids = tokenizer.encode_many(texts)
    return cls.from_ids(ids, eos_id=tokenizer.eos_ids[0], **settings)

  @classmethod
  def from_whole(
    cls, documents: Sequence[Document], *, seq_len: int, **settings
  ) -> 'PackedDataset':
    """Packs documents into rows of `seq_len` tokens without dividing any.

    A longer document keeps its first `seq_len` tokens; one that has no label there is dropped. Both
    are counted. `settings` are `batch_size` and `seed`.

    Raises:
      ValueError: no document has a label in its first `seq_len` tokens.
    """
    heads = [document.head(max(0, seq_len)) for document in documents]
    kept = [document for document in heads if document.labels]
    if not kept:
      raise ValueError(f'none of {len(heads)} documents has a label in its first {seq_len} tokens')
    rows = packing.best_fit([len(document.ids) for document in kept], seq_len)
    stream = np.full(len(rows) * seq_len, PADDING, np.int32)
    trained, starts = np.zeros(len(stream), bool), []
    for r, row in enumerate(rows):
      at = r * seq_len
      for document in (kept[i] for i in row):
        starts.append(at)
        stop = at + len(document.ids)
        stream[at:stop], trained[at:stop] = document.ids, document.trained
        at = stop
    return cls(
      stream=stream,
      starts=np.asarray(starts, np.int64),
      trained=trained,
      seq_len=seq_len,
      truncated=sum(len(document.ids) > seq_len for document in documents),
      dropped=len(heads) - len(kept),
      **settings,
    )

  @property
  def counts(self) -> Counts:
    """How much there is to train on."""
    real = self.stream != PADDING
    labels = real if self.trained is None else real & self.trained
    return Counts(
      documents=len(self.starts),
      tokens=int(np.sum(real)),
      labels=int(np.sum(labels) - np.sum(labels[self.starts])),
      rows=self.rows,
      truncated=self.truncated,
      dropped=self.dropped,
    )

  @property
  def highest(self) -> int:
    """The highest token id."""
    return int(self.stream.max())

  @property
  def rows(self) -> int:
    """The number of rows per epoch; the last row is padded."""
    return -(-(len(self.stream) - 1) // self.seq_len)

  @property
  def fingerprint(self) -> str:
    """The SHA-256 of everything that the results of `batch` depend on."""
    settings = f'{self.seq_len},{self.batch_size},{self.seed}'
    digest = hashlib.sha256(settings.encode())
    digest.update(np.ascontiguousarray(self.stream, '<i4'))
    digest.update(np.ascontiguousarray(self.starts, '<i8'))
    if self.trained is not None:
      digest.update(b'trained' + np.packbits(self.trained).tobytes())
    if self.joined:
      digest.update(b'joined')
    return digest.hexdigest()

  def batch(self, step: int) -> Batch:
    """Returns the rows of update `step`; each epoch visits all rows once, in its own order."""
    return self.take(self.rows_of(step))

  def rows_of(self, step: int) -> np.ndarray:
    """The indices of the rows of update `step`."""
    first = step * self.batch_size
    return np.asarray([self._row_index(first + i) for i in range(self.batch_size)])

  def take(self, rows: Iterable[int]) -> Batch:
    """Returns these rows of the stream, in this order."""
    packed = [self._row(row * self.seq_len) for row in rows]
    batch = Batch(*(np.stack(arrays) for arrays in zip(*packed)))
    return dataclasses.replace(batch, segments_BT=None, positions_BT=None) if self.joined else batch

  def sequential(self) -> Iterator[Batch]:
    """Yields every row once, in order, for evaluation; rows that pad the last batch lack labels."""
    for first in range(0, self.rows, self.batch_size):
      indices = first + np.arange(self.batch_size)
      batch = self.take(np.minimum(indices, self.rows - 1))
      real_B1 = (indices < self.rows)[:, None]
      yield dataclasses.replace(batch, labels_BT=np.where(real_B1, batch.labels_BT, NO_LABEL))

  def _row_index(self, visit):
    epoch, position = divmod(visit, self.rows)
    return _permutation(self.seed, epoch, self.rows)[position]

  def _row(self, at):
    tokens, labels, segments, positions = pack_row(self.stream, self.starts, at, self.seq_len)
    if self.trained is not None:
      following = np.minimum(np.arange(at + 1, at + self.seq_len + 1), len(self.stream) - 1)
      labels = np.where(self.trained[following], labels, np.int32(NO_LABEL))
    return tokens, labels, segments, positions


def pack_row(
  stream: np.ndarray, starts: np.ndarray, at: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Cuts one row out of the stream: tokens, labels, segments, positions, each [length] int32.

  Padding is in segment 0 and has no labels; its tokens are zeros in the stream, and the last token
  past its end.
  """
  index = np.arange(at, at + length + 1)
  tokens = stream[np.minimum(index, len(stream) - 1)]
  real = (index < len(stream)) & (tokens != PADDING)
  tokens = np.maximum(tokens, 0)
  documents = np.where(real, np.searchsorted(starts, index, side='right'), 0)
  same_document = (documents[1:] == documents[:-1]) & real[1:]
  labels = np.where(same_document, tokens[1:], NO_LABEL)
  segments = np.where(real, documents - documents[0] + 1, 0)[:-1]
  begins = np.flatnonzero(np.diff(segments, prepend=-1))
  runs = np.diff(begins, append=length)
  positions = np.arange(length) - np.repeat(begins, runs)
  return tuple(a.astype(np.int32) for a in (tokens[:-1], labels, segments, positions))


def excerpts(
  texts: Sequence[str], characters: int, *, seed: int = 0, shortest: int = 1
) -> list[str]:
  """Takes a passage of equal length from each text, about `characters` in all.

  A short run learns more from a part of every text than from a few whole texts, and does not have
  to tokenize the rest. A passage starts at a random line. Texts shorter than a passage are kept
  whole; so are all texts if together they have at most `characters`.

  A passage has at least `shortest` characters, where a text has them: rows that are longer than
  all documents teach nothing about long ones. If that is more than the share of a text, only some
  texts are taken, of those that are long enough first.
  """
  if sum(map(len, texts)) <= characters:
    return list(texts)
  share = max(1, characters // max(1, len(texts)))
  random = np.random.default_rng(seed)
  if share < shortest:
    share, count = shortest, max(1, characters // shortest)
    some = random.permutation(len(texts))
    long_first = sorted(some, key=lambda i: len(texts[i]) < shortest)
    texts = [texts[i] for i in sorted(long_first[:count])]
  passages = []
  for text in texts:
    start = int(random.integers(max(1, len(text) - share + 1)))
    start = text.rfind('\n', 0, start) + 1
    passages.append(text[start : start + share])
  return passages


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(rows)
