"""What a call asks of tools: the fields `tools`, `tool_choice` and `parallel_tool_calls`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from experiments.serving.body import Fields
from experiments.serving.errors import invalid
from experiments.serving.tools import forced, formats
from experiments.serving.tools.calls import Reader
from experiments.serving.tools.formats import Format
from experiments.serving.tools.stream import CallStream

CHOICES = 'none, auto, required or {"type": "function", "function": {"name": NAME}}'
LONGEST_NAME = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tools:
  """What follows from these fields.

  `variables` go to the chat template. `schema` is what an answer must follow, where a call is
  forced. `read` finds the calls in an answer; None: its text stays as it is. With `marked`, special
  tokens are part of that text. Of more calls than `most`, the first ones count.
  """

  variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  schema: Mapping[str, Any] | None = None
  read: Reader | None = None
  marked: bool = False
  most: int | None = None
  new_id: Callable[[], str] = formats.long_id

  def stream(self) -> CallStream | None:
    """What reads one answer."""
    return None if self.read is None else CallStream(self.read, self.most)


def tools(fields: Fields, form: Format | None) -> Tools:
  """Reads the fields, for a model that writes calls in this format. Raises ApiError."""
  listed = _functions(fields)
  choice = _choice(fields)
  if not listed:
    if choice not in (None, 'none', 'auto'):
      raise invalid('tool_choice', 'tool_choice needs tools to choose from')
    return Tools()
  if choice == 'none':
    return Tools()
  parallel = fields.flag('parallel_tool_calls', True)
  names = ('tools',) if form is None else form.variables
  given = {
    'variables': dict.fromkeys(names, fields.list('tools')),
    'most': None if parallel else 1,
    'new_id': formats.long_id if form is None else form.new_id,
  }
  if choice in (None, 'auto'):
    return Tools(**given, read=None if form is None else form.read, marked=form is not None)
  if choice == 'required':
    try:
      schema = forced.schema_of_list(listed, given['most'])
    except ValueError as error:
      raise invalid('tools', f'tools: {error}') from None
    return Tools(**given, read=forced.read_list, schema=schema)
  named = [function for function in listed if function['name'] == choice.name]
  if not named:
    known = ', '.join(function['name'] for function in listed)
    raise invalid('tool_choice', f'tool_choice names {choice.name!r}; the tools are {known}')
  return Tools(**given, read=forced.reader_of(choice.name), schema=forced.schema_of(named[0]))


@dataclasses.dataclass(frozen=True)
class _Named:
  name: str


def _choice(fields: Fields) -> str | _Named | None:
  value = fields.values.get('tool_choice')
  if value in (None, 'none', 'auto', 'required'):
    return value
  function = value.get('function') if isinstance(value, dict) else None
  name = function.get('name') if isinstance(function, dict) else None
  if not isinstance(name, str) or value.get('type', 'function') != 'function':
    raise fields.wrong('tool_choice', CHOICES)
  return _Named(fields.checked('tool_choice', name))


def _functions(fields: Fields) -> list[Mapping[str, Any]]:
  found = []
  for tool in fields.list('tools') or []:
    function = tool.get('function') if isinstance(tool, dict) else None
    name = function.get('name') if isinstance(function, dict) else None
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
      raise fields.wrong('tools', 'a list of functions, each with a name')
    if not isinstance(function.get('parameters') or {}, dict):
      raise fields.wrong('tools', 'a list of functions whose parameters are JSON schemas')
    fields.checked('tools', name)
    found.append(function)
  return found
