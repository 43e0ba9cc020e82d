"""Calls of functions as a model writes them: pieces that the readers of all formats share.

A reader is a pure function of a text that begins where nothing is decided yet. It says how much of
it is ordinary text and which calls follow; the rest is read again when more of it has come.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

# A string, the quote of one that has not ended, or a bracket.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["{}\[\]]', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ToolCall:
  """A call of a function; `arguments` is the text of a JSON object."""

  name: str
  arguments: str


@dataclasses.dataclass(frozen=True)
class Cut:
  """The text up to `text_end` is ordinary; the calls were written from there up to `end`.

  What follows waits for more. An `end` of 0 says that nothing is certain yet.
  """

  text_end: int
  end: int
  calls: tuple[ToolCall, ...] = ()

  @classmethod
  def text(cls, end: int) -> 'Cut':
    """Ordinary text up to a place."""
    return cls(end, end)


# (text, fresh, ended) -> what is certain of it. `fresh`: only calls came before. `ended`: no more.
Reader = Callable[[str, bool, bool], Cut]


def value_end(text: str, start: int) -> int | None:
  """Where the object or list that begins at `start` ends; None if it has not ended yet.

  Only brackets and strings are looked at.
  """
  depth = 0
  for match in _TOKEN.finditer(text, start):
    token = match.group()
    if token == '"':
      return None
    depth += (token in '{[') - (token in '}]')
    if depth == 0 and token in '}]':
      return match.end()
  return None


def loads(text: str) -> Any:
  """Parses strict JSON that can be written again; None if it is none."""
  try:
    value = json.loads(text, parse_constant=_no_constant)
    json.dumps(value)  # may allow less depth
    return value
  except (ValueError, RecursionError):
    return None


def call(value: Any, *names: str) -> ToolCall | None:
  """The call that an object means, whose arguments are under one of the names; None if none."""
  if not isinstance(value, dict) or not isinstance(value.get('name'), str) or not value['name']:
    return None
  given = [value[name] for name in names if name in value]
  arguments = given[0] if given else None
  if isinstance(arguments, str):  # some models write JSON into a string
    arguments = loads(arguments)
  if not isinstance(arguments, dict) or not _is_text(value['name']):
    return None
  return ToolCall(value['name'], dumps(arguments))


def dumps(value: Any) -> str:
  """JSON with its characters as they are, but for halves of pairs, which are no characters."""
  text = json.dumps(value, ensure_ascii=False)
  return text if _is_text(text) else json.dumps(value)


def waiting(text: str, mark: str) -> int:
  """How many characters at the end of a text may be the beginning of a mark."""
  longest = min(len(mark) - 1, len(text))
  return next((n for n in range(longest, 0, -1) if mark.startswith(text[-n:])), 0)


def _is_text(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _no_constant(name):
  raise ValueError(f'{name} is no number of JSON')
