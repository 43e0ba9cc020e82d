"""Splits an answer into ordinary text and calls while it comes.

However the text is cut into pieces, the calls and the joined text are the same. No part of a call
is given out as text, and text is only held back while it may be the beginning of a call. White
space around calls is dropped, as it belongs to the format. A call is given out when it is whole;
one that is malformed is text.
"""

import dataclasses

from experiments.serving.tools.calls import Reader, ToolCall


@dataclasses.dataclass(frozen=True)
class Split:
  """What has become certain: text, and the calls beside it."""

  text: str = ''
  calls: tuple[ToolCall, ...] = ()


class CallStream:
  """Reads the text of one answer; of more calls than `most`, the first ones count."""

  def __init__(self, read: Reader, most: int | None = None):
    self._read, self._most = read, most
    self._text, self._space = '', ''
    self._fresh = True  # no ordinary text since the beginning, or since the last call
    self.called = 0

  def push(self, text: str, ended: bool = False) -> Split:
    """Takes a piece of the text; `ended`: the last one."""
    self._text += text
    given, calls = '', []
    while self._text:
      cut = self._read(self._text, self._fresh, ended)
      given += self._ordinary(self._text[: cut.text_end])
      if cut.calls:
        some = cut.calls if self._most is None else cut.calls[: self._most - self.called]
        calls += some
        self.called, self._space, self._fresh = self.called + len(some), '', True
      self._text = self._text[cut.end :]
      if cut.end == 0:
        break
    if ended and not self.called:
      given, self._space = given + self._space, ''
    return Split(given, tuple(calls))

  def _ordinary(self, text: str) -> str:
    """The text that can be given out; white space alone waits for what follows it."""
    if self._fresh and not text.strip():
      self._space += text
      return ''
    text, self._space, self._fresh = self._space + text, '', False
    return text
