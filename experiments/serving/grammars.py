"""The fields that ask for a text of a certain form, as OpenAI's API and vLLM's have them."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from experiments.serving.body import Fields
from experiments.serving.errors import invalid
from experiments.serving.served import Served
from model.infer.grammar import Grammar

# vLLM's older names -> a field of `structured_outputs`
GUIDED = {
  'guided_json': 'json',
  'guided_regex': 'regex',
  'guided_choice': 'choice',
  'guided_grammar': 'grammar',
}


async def grammar(
  fields: Fields, served: Served, schema: Mapping[str, Any] | None = None
) -> Grammar | None:
  """The grammar that a call asks for; `schema` is that of the tools which it must call.

  Raises ApiError: several, or one that cannot be followed.
  """
  tools = None if schema is None else ('tool_choice', 'json', schema)
  asked = (tools, _response_format(fields), *_structured(fields))
  found = [one for one in asked if one is not None]
  if not found:
    return None
  if len(found) > 1:
    names = ', '.join(name for name, _, _ in found)
    raise invalid(found[1][0], f'a call has one grammar, not several: {names}')
  ((name, kind, value),) = found
  make = getattr(served.vocabulary, kind)
  try:
    return await asyncio.to_thread(make, value)
  except ValueError as error:
    raise invalid(name, f'{name}: {error}') from None


def _response_format(fields):
  form = fields.inner('response_format')
  if form is None:
    return None
  kind = form.text('type')
  if kind == 'text':
    return None
  if kind == 'json_object':
    return 'response_format', 'json', None
  if kind != 'json_schema':
    raise form.wrong('type', 'text, json_object or json_schema')
  outer = form.inner('json_schema')
  schema = None if outer is None else outer.inner('schema')
  if schema is None:
    raise invalid('response_format', 'response_format.json_schema.schema must be a JSON schema')
  return 'response_format', 'json', schema.values


def _structured(fields):
  outer = fields.inner('structured_outputs')
  named = {f'structured_outputs.{name}': name for name in (*GUIDED.values(), 'json_object')}
  for name, kind in named.items() if outer else ():
    if outer.has(kind):
      yield _grammar(outer, kind, name, kind)
  for name, kind in GUIDED.items():
    if fields.has(name):
      yield _grammar(fields, name, name, kind)


def _grammar(fields, field, name, kind):
  if kind == 'json_object':
    return (name, 'json', None) if fields.flag(field) else None
  if kind == 'choice':
    choices = fields.list(field)
    if not choices or not all(isinstance(c, str) and c for c in choices):
      raise fields.wrong(field, 'a list of texts')
    texts = [json.dumps(fields.checked(field, c)) for c in choices]
    return name, 'lark', 'start: ' + ' | '.join(texts)
  if kind == 'json':
    value = fields.values[field]
    try:
      schema = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
      schema = None
    if not isinstance(schema, dict):
      raise fields.wrong(field, 'a JSON schema')
    return name, 'json', schema
  return name, {'regex': 'regex', 'grammar': 'lark'}[kind], fields.text(field)
