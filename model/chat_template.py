"""Renders the chat templates that Hugging Face tokenizers carry.

A template is a Jinja program that comes with a model, so it runs in an immutable sandbox and sees
plain JSON values alone. Whitespace rules, filters and globals are those of transformers, which the
tests compare with. The positions of the assistant's tokens are not tracked.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox


def render(
  template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
  """Renders `messages` by `template`, which also sees `variables` (special tokens, tools, ...).

  Raises:
    ValueError: no messages, values that are not JSON, or a template that fails or refuses.
  """
  if not messages:
    raise ValueError('a chat template needs at least one message')
  try:
    # Templates test whether a key is there, so one without a value has to be absent.
    chat = [{k: v for k, v in m.items() if v is not None} for m in messages]
    values = json.loads(json.dumps({**variables, 'messages': chat}))
  except (TypeError, ValueError, AttributeError, RecursionError) as error:
    raise ValueError(f'messages are dicts of JSON values: {error}') from error
  try:
    return _compile(template).render(**values)
  except Exception as error:  # a template is a program, and fails as programs do
    raise ValueError(f'the chat template failed: {type(error).__name__}: {error}') from error


class _Generation(jinja2.ext.Extension):
  """Accepts `{% generation %}...{% endgeneration %}`, which marks the assistant's words."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  # Jinja's own tojson escapes HTML, which a prompt must not.
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _raise
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(template)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _raise(message: str):
  raise jinja2.TemplateError(message)
