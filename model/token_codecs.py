"""Text to token ids and back, and the training of a byte-level vocabulary."""

import json
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers


class Codec:
  """Encodes and decodes with a `tokenizers.Tokenizer`, which belongs to the codec from then on.

  Nothing is added to a text: what the tokenizer's post-processor would put around it is kept as
  `prefix` and `suffix`. Special tokens that are spelled out in the text become their ids.
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    self._tokenizer = tokenizer
    # Truncation and padding are left in many published files.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    self.prefix, self.suffix = _ends(tokenizer)
    tokenizer.post_processor = None  # some trim the white space out of the offsets
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    self.vocab_size = max(ids, default=-1) + 1

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

  def token_of(self, token_id: int) -> str | None:
    """The token as the vocabulary spells it, which is not how it decodes; None for no token."""
    return self._tokenizer.id_to_token(token_id)

  def to_json(self) -> str:
    """The tokenizer as a `tokenizer.json`, without what would be put around a text."""
    return self._tokenizer.to_str()

  def added_ids(self) -> set[int]:
    """The ids of added tokens, which text gives only where it spells them out."""
    return set(self._tokenizer.get_added_tokens_decoder())


def _ends(tokenizer: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The ids that the post-processor puts before and after a text."""
  encoding = tokenizer.encode('a', add_special_tokens=True)
  inside = [at for at, added in enumerate(encoding.special_tokens_mask) if not added]
  if not inside:  # a vocabulary that has no token for the letter
    return tuple(encoding.ids), ()
  return tuple(encoding.ids[: inside[0]]), tuple(encoding.ids[inside[-1] + 1 :])


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
