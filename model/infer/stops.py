"""The text of a continuation up to the first of its stop strings."""

from collections.abc import Sequence

from model.text_stream import TextStream
from model.tokenizer import Tokenizer

CONTEXT = 64  # last tokens of a prompt, on which the text of the tokens after it may depend


class StoppedText:
  """Decodes tokens one by one and ends at a stop string, whatever tokens it lies in.

  The stop string that is complete first ends the text before it, or after it if it is `included`;
  of several that are complete at the same character, the longest counts. Text that may be the
  beginning of a stop string is held back. `known` counts the characters decoded so far, `given`
  those that were returned, `stop` is the stop string that was found. With `special`, the names of
  special tokens are text too.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    stops: Sequence[str] = (),
    *,
    included: bool = False,
    special: bool = False,
  ):
    if '' in stops:
      raise ValueError("a stop string has at least one character, and is not ''; leave it out")
    self._stream = TextStream(tokenizer, prompt[-CONTEXT:], special=special)
    self._stops, self._included = tuple(stops), included
    self._held = ''
    self.given, self.stop = 0, None

  @property
  def known(self) -> int:
    return self.given + len(self._held)

  def push(self, token: int) -> str:
    """Adds a token and returns the text that is certain now."""
    return self._take(self._stream.push(token))

  def end(self) -> str:
    """Returns the text that was held back, up to a stop string."""
    text = '' if self.stop is not None else self._take(self._stream.end())
    text, self._held, late = text + self._held, '', len(self._held)
    self.given += late
    return text

  def _take(self, new: str) -> str:
    searched = len(self._held)
    self._held += new
    found = _first(self._held, self._stops, searched)
    if found is not None:
      start, end, self.stop = found
      text, self._held = self._held[: end if self._included else start], ''
    else:
      text = self._held[: len(self._held) - _beginning(self._held, self._stops)]
      self._held = self._held[len(text) :]
    self.given += len(text)
    return text


def _first(text: str, stops: Sequence[str], searched: int) -> tuple[int, int, str] | None:
  """Start, end and text of the stop string that ends first and reaches beyond `searched`."""
  found = []
  for stop in stops:
    start = text.find(stop, max(searched - len(stop) + 1, 0))
    if start >= 0:
      found.append((start + len(stop), start, stop))
  if not found:
    return None
  end, start, stop = min(found)
  return start, end, stop


def _beginning(text: str, stops: Sequence[str]) -> int:
  """Characters at the end of `text` with which a stop string may begin."""
  longest = min(len(text), max(map(len, stops), default=1) - 1)
  for length in range(longest, 0, -1):
    if any(stop.startswith(text[-length:]) for stop in stops):
      return length
  return 0
