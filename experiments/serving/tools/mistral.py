r"""Calls as Mistral's models write them: a list after a mark, or a name and an object.

  [TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]
  [TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add{"a": 2}

See https://docs.mistral.ai/capabilities/function_calling/. Their templates want ids of nine letters
and digits.
"""

import re

from experiments.serving.tools.calls import Cut, ToolCall, call, dumps, loads, value_end, waiting

MARK = '[TOOL_CALLS]'
_NAMED = re.compile(r'([\w.-]+)(?:\[CALL_ID\][\w-]+)?(?:\[ARGS\])?\s*(?=\{)')
_BEGUN = re.compile(r'[\w.-]+(?:\[[\w\[\]-]*)?\s*')


def read(text: str, fresh: bool, ended: bool) -> Cut:
  """Reads up to the calls of the first mark."""
  start = text.find(MARK)
  if start < 0:
    return Cut.text(len(text) - (0 if ended else waiting(text, MARK)))
  inside = start + len(MARK)
  body = inside + len(text[inside:]) - len(text[inside:].lstrip())
  no_call, wait = Cut.text(inside), Cut.text(inside if ended else start)
  if body == len(text):
    return wait
  named = _NAMED.match(text, body)
  if named is None and not text.startswith('[', body):
    return wait if _BEGUN.fullmatch(text, body) else no_call
  begin = body if named is None else named.end()
  end = value_end(text, begin)
  if end is None:
    return wait
  value = loads(text[begin:end])
  if named is not None:
    found = [ToolCall(named[1], dumps(value)) if isinstance(value, dict) else None]
  else:
    found = [call(one, 'arguments', 'parameters') for one in value or ()]
  return Cut(start, end, tuple(found)) if found and None not in found else no_call
