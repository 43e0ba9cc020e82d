"""Calls that `tool_choice` asks for: a grammar makes the answer JSON, whatever the model's format.

With `required` the answer is a list of objects with a name and parameters; with the name of a
function it is that function's arguments. A grammar over the tokens sees to both.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.serving.tools.calls import Cut, Reader, ToolCall, call, dumps, loads

DEFINITIONS = ('$defs', 'definitions')


def read_list(text: str, fresh: bool, ended: bool) -> Cut:
  """Reads a list of calls, when it is complete."""
  value = loads(text) if ended else None
  found = [call(one, 'parameters') for one in value] if isinstance(value, list) else []
  return _whole(text, ended, found)


def reader_of(name: str) -> Reader:
  """The reader of an answer that is the arguments of one function."""
  return functools.partial(_read_arguments, name)


def _read_arguments(name: str, text: str, fresh: bool, ended: bool) -> Cut:
  value = loads(text) if ended else None
  return _whole(text, ended, [ToolCall(name, dumps(value))] if isinstance(value, dict) else [])


def _whole(text, ended, found) -> Cut:
  if not ended:
    return Cut.text(0)
  return Cut(0, len(text), tuple(found)) if found and None not in found else Cut.text(len(text))


def schema_of_list(functions: Sequence[Mapping[str, Any]], most: int | None) -> dict[str, Any]:
  """The JSON schema of a list of calls. Raises ValueError: definitions of one name that differ."""
  items, shared = [], {}
  for function in functions:
    parameters = dict(schema_of(function))
    for key in DEFINITIONS:  # their references begin at the root
      for name, value in (parameters.pop(key, None) or {}).items():
        if shared.setdefault(key, {}).setdefault(name, value) != value:
          raise ValueError(f'two functions define {name!r} in their {key}, and differently')
    items.append(
      {
        'type': 'object',
        'properties': {'name': {'const': function['name']}, 'parameters': parameters},
        'required': ['name', 'parameters'],
        'additionalProperties': False,
      }
    )
  size = {'minItems': 1} | ({} if most is None else {'maxItems': most})
  return {'type': 'array', 'items': {'anyOf': items}, **size, **shared}


def schema_of(function: Mapping[str, Any]) -> Mapping[str, Any]:
  """The JSON schema of a function's arguments."""
  return {'type': 'object', **(function.get('parameters') or {})}
