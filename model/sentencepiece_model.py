"""Builds a `tokenizers.Tokenizer` from the bytes of a sentencepiece `tokenizer.model`.

The file is a protocol buffer: pieces with scores and kinds, and the settings of the trainer and of
the normalizer (sentencepiece: src/sentencepiece_model.proto). transformers 5 reads the same file
in three ways, by the tokenizer class that the folder names, and so does `build`:

  llama    BPE; a space is put in front of the text, where it does not begin with one, and with
           `legacy` in front of each stretch between special and user-defined tokens as well
  gemma    BPE; no space is put in front
  generic  what the file itself says: BPE or unigram, its character map, its spaces

BPE merges follow from the pieces: two pieces that join to a piece may merge, in the order of ids
(llama, gemma) or of scores (generic). Reading 256,000 pieces takes a few seconds.
"""

import dataclasses
import functools
import re
import struct
from collections.abc import Container, Iterator, Mapping, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

SPACE = '▁'
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
UNIGRAM, BPE = 1, 2


@dataclasses.dataclass(frozen=True)
class Piece:
  text: str
  score: float
  kind: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """The parts of the file that decide how text is encoded."""

  pieces: tuple[Piece, ...]
  algorithm: int
  byte_fallback: bool
  unknown_id: int
  names: Mapping[str, str]  # of the 'unk', 'bos' and 'eos' token
  character_map: bytes
  prefix_space: bool
  remove_extra_spaces: bool
  escape_spaces: bool

  def named(self, kind: str) -> str | None:
    """The name of the token of that kind, if it is a piece of the model."""
    return self.names[kind] if any(p.text == self.names[kind] for p in self.pieces) else None


@functools.lru_cache(maxsize=2)
def read(data: bytes) -> Model:
  """Parses the file. Raises ValueError if it is damaged or has no pieces."""
  try:
    parts = list(_fields(data))
    pieces = tuple(_piece(value) for number, value in parts if number == 1)
    trainer = dict(_fields(next((v for n, v in parts if n == 2), b'')))
    normalizer = dict(_fields(next((v for n, v in parts if n == 3), b'')))
    numbers = ((45, 'unk', b'<unk>'), (46, 'bos', b'<s>'), (47, 'eos', b'</s>'))
    names = {kind: trainer.get(number, default).decode() for number, kind, default in numbers}
  except (LookupError, struct.error, UnicodeDecodeError, AttributeError, TypeError) as error:
    raise ValueError(f'tokenizer.model is corrupt: {error}') from error
  if not pieces:
    raise ValueError('tokenizer.model is corrupt: it holds no pieces')
  return Model(
    pieces=pieces,
    algorithm=trainer.get(3, UNIGRAM),
    byte_fallback=bool(trainer.get(35, False)),
    unknown_id=trainer.get(40, 0),
    names=names,
    character_map=normalizer.get(2, b''),
    prefix_space=bool(normalizer.get(3, True)),
    remove_extra_spaces=bool(normalizer.get(4, True)),
    escape_spaces=bool(normalizer.get(5, True)),
  )


def build(
  model: Model, style: str, *, legacy: bool | None, prefix_space: bool, renamed: Mapping[int, str]
) -> tokenizers.Tokenizer:
  """Builds the tokenizer in the style 'llama', 'gemma' or 'generic'.

  `legacy` None is the style's default: false for 'llama', true for 'generic'. `prefix_space` counts
  for 'llama' alone. `renamed` gives pieces, by id, another name. Control pieces are special tokens
  of the result; 'llama' and 'gemma' have the user-defined ones as added tokens too.
  """
  names = [piece.text for piece in model.pieces]
  kept = {name for i, name in enumerate(names) if i not in renamed}
  for i, name in renamed.items():
    if i < len(names) and name not in kept:
      names[i] = name
  if style == 'generic':
    tokenizer = _generic(model, names, legacy is not False)
  elif style == 'gemma':
    tokenizer = _gemma(names)
  else:
    tokenizer = _llama(names, prefix_space, bool(legacy))
  added = (CONTROL,) if style == 'generic' else (CONTROL, USER_DEFINED)
  tokenizer.add_tokens(
    [
      tokenizers.AddedToken(name, normalized=False, special=piece.kind == CONTROL)
      for name, piece in zip(names, model.pieces)
      if piece.kind in added
    ]
  )
  return tokenizer


def _llama(names: Sequence[str], prefix_space: bool, legacy: bool) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer(_bpe_by_id(names, unk_token=None))
  scheme = ('always' if legacy else 'first') if prefix_space else 'never'
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
  tokenizer.decoder = _decoder(byte_fallback=True, strip=prefix_space)
  return tokenizer


def _gemma(names: Sequence[str]) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer(_bpe_by_id(names, unk_token='<unk>'))
  tokenizer.normalizer = normalizers.Replace(' ', SPACE)
  tokenizer.pre_tokenizer = pre_tokenizers.Split(' ', 'merged_with_previous')
  tokenizer.decoder = _decoder(byte_fallback=True, strip=False)
  return tokenizer


def _generic(model: Model, names: Sequence[str], legacy: bool) -> tokenizers.Tokenizer:
  user_defined = [n for n, piece in zip(names, model.pieces) if piece.kind == USER_DEFINED]
  tokenizer = tokenizers.Tokenizer(_generic_model(model, names, bool(user_defined)))
  steps = [normalizers.Precompiled(model.character_map)] if model.character_map else []
  if model.remove_extra_spaces:
    steps += [normalizers.Replace(tokenizers.Regex(r'\A +| +\z'), '')]
    steps += [normalizers.Replace(tokenizers.Regex(' {2,}'), ' ')]
  if model.escape_spaces:
    steps.append(normalizers.Replace(' ', SPACE))
  splits = []
  if model.prefix_space:
    if legacy:  # a text that begins with a space gets a second one, unlike Metaspace's own rule
      steps.append(normalizers.Replace(tokenizers.Regex(rf'\A{SPACE}'), 2 * SPACE))
    scheme = 'always' if legacy else 'first'
    splits.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False))
  if user_defined:  # whole, and never merged with their neighbours
    longest_first = sorted(user_defined, key=len, reverse=True)
    pattern = tokenizers.Regex('|'.join(map(re.escape, longest_first)))
    splits.append(pre_tokenizers.Split(pattern, 'isolated'))
  tokenizer.normalizer = normalizers.Sequence(steps)
  if splits:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
  tokenizer.decoder = _decoder(model.byte_fallback, strip=model.prefix_space)
  return tokenizer


def _generic_model(model, names, whole_pieces_first: bool):
  if model.algorithm == UNIGRAM:
    scored = [(name, piece.score) for name, piece in zip(names, model.pieces)]
    return models.Unigram(scored, model.unknown_id, model.byte_fallback)
  if model.algorithm != BPE:
    raise ValueError('tokenizer.model holds words or characters; only BPE and unigram are read')
  order = {
    name: (-piece.score, i)
    for i, (name, piece) in enumerate(zip(names, model.pieces))
    if piece.kind == NORMAL
  }
  return models.BPE(
    vocab={name: i for i, name in enumerate(names)},
    merges=[pair for _, pair in sorted(merges(order, order))],
    unk_token=model.named('unk'),
    fuse_unk=True,
    byte_fallback=model.byte_fallback,
    ignore_merges=whole_pieces_first,
  )


def _bpe_by_id(names: Sequence[str], unk_token: str | None):
  ids = {name: i for i, name in enumerate(names)}
  key = lambda ranked: (ranked[0], len(ranked[1][0]))
  found = [pair for _, pair in sorted(merges(ids, ids), key=key)]
  unk_token = unk_token if unk_token in ids else None
  return models.BPE(vocab=ids, merges=found, unk_token=unk_token, fuse_unk=True, byte_fallback=True)


def merges(
  order: Mapping[str, object], halves: Container[str]
) -> Iterator[tuple[object, tuple[str, str]]]:
  """Every (rank, (left, right)) of two of `halves` that are together in `order`, with that rank.

  sentencepiece stores no merges. Any two pieces merge that give a piece.
  """
  for name, rank in order.items():
    for at in range(1, len(name)):
      if name[:at] in halves and name[at:] in halves:
        yield rank, (name[:at], name[at:])


def _decoder(byte_fallback: bool, strip: bool):
  steps = [decoders.Replace(SPACE, ' ')]
  if byte_fallback:
    steps.append(decoders.ByteFallback())
  if byte_fallback or strip:
    steps.append(decoders.Fuse())
  if strip:
    steps.append(decoders.Strip(content=' ', left=1))
  return decoders.Sequence(steps)


def _piece(data: bytes) -> Piece:
  found = dict(_fields(data))
  return Piece(found[1].decode(), found.get(2, 0.0), found.get(3, NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
  """Walks through one message of a protocol buffer: (field number, value)."""
  at = 0
  while at < len(data):
    tag, at = _varint(data, at)
    kind = tag & 7
    if kind == 0:
      value, at = _varint(data, at)
    elif kind == 2:
      size, at = _varint(data, at)
      value = data[at : at + size]
      at += size
      if at > len(data):
        raise IndexError('a field ends after the file')
    elif kind in (1, 5):
      code, size = ('<d', 8) if kind == 1 else ('<f', 4)
      (value,) = struct.unpack_from(code, data, at)
      at += size
    else:
      raise IndexError(f'a field has the unknown wire type {kind}')
    yield tag >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[at]
    value |= (byte & 127) << shift
    at, shift = at + 1, shift + 7
    if byte < 128:
      return value - (1 << 64) if value >> 63 else value, at
