"""Renders the chat templates that Hugging Face tokenizers carry.

A template is a Jinja program that comes with a model, so it runs in an immutable sandbox and sees
plain JSON values alone. Whitespace rules, filters and globals are those of transformers, which the
tests compare with. Templates may mark the assistant's words by `{% generation %}` blocks.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

# Not characters of any text by the Unicode standard, so they can mark places in one.
_START, _STOP = '\ufdd0', '\ufdd1'
Span = tuple[int, int]  # characters from the first to before the second


def render(
  template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
  """Renders `messages` by `template`, which also sees `variables` (special tokens, tools, ...).

  Raises:
    ValueError: no messages, values that are not JSON, or a template that fails or refuses.
  """
  return _render(template, messages, variables, mark=False)


def has_generation_blocks(template: str) -> bool:
  """Whether a template marks the assistant's words itself."""
  return re.search(r'\{%-?\s*generation\s*-?%\}', template) is not None


def render_with_spans(
  template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> tuple[str, list[Span]]:
  """Renders as `render` does, and says where the text of `{% generation %}` blocks is.

  Raises:
    ValueError: as `render`; or the template leaves or changes a block in a way that loses its ends.
  """
  marked = _render(template, messages, variables, mark=True)
  pieces = re.split(f'([{_START}{_STOP}])', marked)
  if pieces[1::2] != [_START, _STOP] * (len(pieces) // 4):
    raise ValueError('the generation blocks of the chat template do not begin and end in pairs')
  spans, at = [], 0
  for i, piece in enumerate(pieces[::2]):
    if i % 2:
      spans.append((at, at + len(piece)))
    at += len(piece)
  return ''.join(pieces[::2]), spans


def _render(template, messages, variables, *, mark: bool) -> str:
  if not messages:
    raise ValueError('a chat template needs at least one message')
  try:
    # Templates test whether a key is there, so one without a value has to be absent; but for the
    # content of a message that calls tools, which they look at whether it is there or not.
    held = lambda key, value: value is not None or key == 'content'
    chat = [{k: v for k, v in m.items() if held(k, v)} for m in messages]
    values = json.loads(json.dumps({**variables, 'messages': chat}))
    if mark and re.search(f'[{_START}{_STOP}]', json.dumps(values, ensure_ascii=False)):
      raise ValueError('U+FDD0 and U+FDD1 are not characters of a text')
  except (TypeError, ValueError, AttributeError, RecursionError) as error:
    raise ValueError(f'messages are dicts of JSON values: {error}') from error
  try:
    return _compile(template, mark).render(**values)
  except Exception as error:  # a template is a program, and fails as programs do
    raise ValueError(f'the chat template failed: {type(error).__name__}: {error}') from error


class _Generation(jinja2.ext.Extension):
  """Accepts `{% generation %}...{% endgeneration %}`, which marks the assistant's words.

  Where the environment asks for marks, one is put before and one after each block.
  """

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
    if self.environment.mark_generation:
      mark = lambda text: jinja2.nodes.Output([jinja2.nodes.TemplateData(text)])
      body = [mark(_START), *body, mark(_STOP)]
    return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=16)
def _compile(template: str, mark: bool) -> jinja2.Template:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.extend(mark_generation=mark)
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
