"""Text to token ids and back, by the two libraries whose files pretrained models ship.

Both codecs have the same methods. Neither adds special tokens on its own, and both recognise the
special tokens that are spelled out in the text, as transformers does.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tokenizers


class TokenizersCodec:
  """Reads the bytes of a `tokenizer.json`."""

  def __init__(self, data: bytes):
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises nothing more specific
      raise ValueError(f'tokenizer.json is corrupt: {error}') from error
    # Truncation and padding are left in many published files, and some post-processors cut the
    # white space out of the offsets.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.post_processor = None
    ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
    self.vocab_size = max(ids, default=-1) + 1
    self.default_bos_id, self.default_eos_id = None, None

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]

  def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
    """Returns ids, and the characters of `text` up to the end of each token."""
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, [end for _, end in encoding.offsets]

  def decode(self, ids: Sequence[int], skip_special: bool) -> str:
    return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

  def id_of(self, token: str) -> int | None:
    return self._tokenizer.token_to_id(token)


class SentencePieceCodec:
  """Reads the bytes of a sentencepiece `tokenizer.model`; `added` are tokens beyond it, by name.

  Added and control tokens that are spelled out in the text are split off first, and each stretch
  between them is encoded on its own (with a leading space, where the model was trained so).
  """

  def __init__(self, data: bytes, added: Mapping[str, int]):
    try:
      import sentencepiece
    except ImportError as error:
      raise ValueError('tokenizer.model needs the package: pip install sentencepiece') from error
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
      size = self._processor.get_piece_size()
    except RuntimeError as error:
      raise ValueError(f'tokenizer.model is corrupt: {error}') from error
    if not size:
      raise ValueError('tokenizer.model is corrupt: it holds no pieces')
    control = {
      self._processor.id_to_piece(i): i for i in range(size) if self._processor.is_control(i)
    }
    self._special = {**control, **added}
    self._names = {i: name for name, i in self._special.items()}
    names = sorted(self._special, key=len, reverse=True)
    self._pattern = re.compile('|'.join(map(re.escape, names)) or r'(?!)')
    self.vocab_size = max(size, *(i + 1 for i in added.values())) if added else size
    ids = self._processor.bos_id(), self._processor.eos_id()
    self.default_bos_id, self.default_eos_id = (i if i >= 0 else None for i in ids)

  def encode(self, text: str) -> list[int]:
    return self.encode_with_ends(text)[0]

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
    """Returns ids, and the characters of `text` up to the end of each token."""
    ids, ends, start = [], [], 0
    for match in itertools.chain(self._pattern.finditer(text), [None]):
      stop = match.start() if match else len(text)
      if stop > start:
        pieces = self._processor.encode(text[start:stop], return_type='offset_mapping')
        ids += pieces['ids']
        ends += [start + end for _, end in pieces['offsets']]
      if match:
        ids.append(self._special[match.group()])
        ends.append(match.end())
        start = match.end()
    return ids, ends

  def decode(self, ids: Sequence[int], skip_special: bool) -> str:
    parts = []
    for special, group in itertools.groupby(map(int, ids), self._names.__contains__):
      if not special:
        parts.append(self._processor.decode(list(group)))
      elif not skip_special:
        parts += [self._names[i] for i in group]
    return ''.join(parts)

  def id_of(self, token: str) -> int | None:
    if token in self._special:
      return self._special[token]
    i = self._processor.piece_to_id(token)
    return i if self._processor.id_to_piece(i) == token else None


Codec = TokenizersCodec | SentencePieceCodec


def byte_ends(text: str, char_ends: Sequence[int]) -> np.ndarray:
  """Turns ends in characters into ends in UTF-8 bytes, int64, made non-decreasing."""
  points = np.frombuffer(text.encode('utf-32-le'), np.uint32)
  widths = 1 + sum((points >= limit).astype(np.int64) for limit in (0x80, 0x800, 0x10000))
  bytes_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(widths, dtype=np.int64)])
  return np.maximum.accumulate(bytes_before[np.asarray(char_ends, np.int64)])


def train_byte_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> bytes:
  """Trains byte-level BPE and returns its `tokenizer.json`.

  No normalisation, the whole byte alphabet and single digits: every text comes back unchanged. The
  special tokens have the first ids. Fewer than `vocab_size` tokens result where the texts hold no
  more pairs to merge.
  """
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  least = len(alphabet) + len(special)
  if vocab_size < least:
    raise ValueError(f'a byte-level vocabulary has at least {least} tokens, not {vocab_size}')
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  bpe.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    initial_alphabet=alphabet,
    special_tokens=list(special),
    show_progress=False,
  )
  bpe.train_from_iterator(texts, trainer)
  return json.dumps(json.loads(bpe.to_str()), ensure_ascii=False, indent=1).encode()
