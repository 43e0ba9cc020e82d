r"""Calls as Llama 3.1, 3.2 and 3.3 write them: the answer is an object, or several.

  {"name": "add", "parameters": {"a": 1}}
  <|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}

See https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/. The tag with a line of
Python, for tools that the model knows by itself, is ordinary text here.
"""

import re

from experiments.serving.tools.calls import Cut, call, loads, value_end

TAG = '<|python_tag|>'
_LEAD = re.compile(r'\s*(?:;\s*)?')


def read(text: str, fresh: bool, ended: bool) -> Cut:
  """Reads the object with which the answer begins, or the one that follows another call."""
  everything = Cut.text(len(text))
  if not fresh:
    return everything
  start = _LEAD.match(text).end()
  if TAG.startswith(text[start:]):
    return everything if ended else Cut.text(0)
  body = start + len(TAG) if text.startswith(TAG, start) else start
  body += len(text[body:]) - len(text[body:].lstrip())
  if body == len(text):
    return everything if ended else Cut.text(0)
  if not text.startswith('{', body):
    return everything
  end = value_end(text, body)
  if end is None:
    return everything if ended else Cut.text(0)
  found = call(loads(text[body:end]), 'parameters', 'arguments')
  return Cut.text(end) if found is None else Cut(0, end, (found,))
