"""The bytes that tokens stand for, by which tokens of two vocabularies are compared.

Vocabularies spell the same text in different ways: byte-level ones have a printable character for
each byte ('Ġ' is a space), those of sentencepiece write a space as '▁' and bytes as '<0x0A>'.
"""

import json
from collections.abc import Sequence
from typing import Any

from model import sentencepiece_model
from model.tokenizer import Tokenizer
from model.vocabulary import needed, renumber


def alphabet() -> dict[str, int]:
  """The byte that each character of a byte-level vocabulary stands for (GPT-2)."""
  printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1)]
  printable += range(ord('®'), ord('ÿ') + 1)
  rest = [byte for byte in range(256) if byte not in printable]
  return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}


def is_byte_level(data: dict[str, Any]) -> bool:
  """Whether the tokens of a tokenizer.json are spelled in the byte-level alphabet."""
  return '"ByteLevel"' in json.dumps([data['pre_tokenizer'], data['decoder']])


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
  """The bytes of each token by its id; None for added tokens, and where there is no token."""
  data, added = renumber.contents(tokenizer), tokenizer.codec.added_ids()
  byte_of = alphabet() if is_byte_level(data) else None
  found = [None] * tokenizer.vocab_size
  for token, i in needed.token_ids(data['model']).items():
    if i not in added:
      found[i] = _bytes(token, byte_of)
  return found


def _bytes(token: str, byte_of: dict[str, int] | None) -> bytes | None:
  if byte_of is not None:
    known = all(character in byte_of for character in token)
    return bytes(byte_of[character] for character in token) if known else None
  if needed.BYTE.fullmatch(token):
    return bytes([int(token[3:5], 16)])
  return token.replace(sentencepiece_model.SPACE, ' ').encode()


class Speller:
  """Cuts the bytes of tokens of another vocabulary into tokens of this one."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer, self.tokens = tokenizer, token_bytes(tokenizer)
    self.ids = {data: i for i, data in reversed(list(enumerate(self.tokens))) if data}
    self._longest = max(map(len, self.ids), default=0)

  def spell(self, data: bytes) -> list[int]:
    """The ids of tokens whose bytes together are `data`; empty where there are none.

    They are those of the tokenizer, unless it adds to the text or `data` is no whole text; then
    they are the longest tokens that match, from left to right.
    """
    try:
      ids = self._tokenizer.encode(data.decode())
    except UnicodeDecodeError:
      return self._longest_first(data)
    return ids if self._joined(ids) == data else self._longest_first(data)

  def _joined(self, ids: Sequence[int]) -> bytes | None:
    parts = [self.tokens[i] for i in ids]
    return None if None in parts else b''.join(parts)

  def _longest_first(self, data: bytes) -> list[int]:
    found, at = [], 0
    while at < len(data):
      ends = range(min(len(data), at + self._longest), at, -1)
      end = next((end for end in ends if data[at:end] in self.ids), None)
      if end is None:
        return []
      found.append(self.ids[data[at:end]])
      at = end
    return found
