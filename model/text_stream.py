"""Text of a continuation, piece by piece as its tokens come."""

from collections.abc import Sequence

from model.tokenizer import Tokenizer

INCOMPLETE = '\ufffd'  # what the bytes of half a character decode to


class TextStream:
  """Decodes tokens that continue a prompt; the pieces join to `Tokenizer.continuation`.

  A piece ends with a whole character; the tokens of half a character wait for the rest. What a
  token adds to a text depends on the tokens before it (a space at its beginning does), so each
  call decodes the new tokens together with a few whose text is known. Where bytes never become
  UTF-8, a sentencepiece decoder may take back the characters before them, which a stream cannot.
  With `special`, the names of special tokens are text too.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, special: bool = False):
    self._tokenizer, self._special = tokenizer, special
    self._ids = list(prompt)
    self._given = 0  # tokens whose text is given out or belongs to the prompt
    self._start, self._context = 0, ''  # `_context` is the text of the tokens from _start to _given
    self._advance(self._decode(0))

  def push(self, token: int) -> str:
    """Takes one token and returns the text that is now complete."""
    self._ids.append(int(token))
    text = self._decode(self._start)
    if text.endswith(INCOMPLETE):
      return ''
    new = text[len(self._context) :]
    self._advance(text)
    return new

  def end(self) -> str:
    """Returns the text that was held back."""
    text = self._decode(self._start)
    new = text[len(self._context) :]
    self._advance(text)
    return new

  def _advance(self, text: str) -> None:
    later = self._decode(self._given)
    # Tokens without a text of their own, as special ones, are no context.
    if later.strip(f' {INCOMPLETE}') and not later.endswith(INCOMPLETE):
      self._start, text = self._given, later
    self._given, self._context = len(self._ids), text

  def _decode(self, start: int) -> str:
    return self._tokenizer.decode(self._ids[start:], skip_special=not self._special)
