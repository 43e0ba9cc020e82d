"""Tokens as they stand in answers."""

from model.infer.grammar import Vocabulary


class Words:
  """The texts and the bytes of single tokens."""

  def __init__(self, vocabulary: Vocabulary):
    self._vocabulary = vocabulary

  def text(self, token: int) -> str:
    """The token's text; where it has half a character, its bytes, as OpenAI's API writes them."""
    data = self._vocabulary.bytes_of(token)
    try:
      return data.decode()
    except UnicodeDecodeError:
      return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)

  def bytes(self, token: int) -> list[int]:
    return list(self._vocabulary.bytes_of(token))
