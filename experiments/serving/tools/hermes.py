r"""Calls as Hermes, Qwen 2.5, Qwen 3 and SmolLM3 write them: JSON between two tags.

  <tool_call>
  {"name": "add", "arguments": {"a": 1}}
  </tool_call>

See https://github.com/NousResearch/Hermes-Function-Calling.
"""

from experiments.serving.tools.calls import Cut, call, loads, value_end, waiting

OPEN, CLOSE = '<tool_call>', '</tool_call>'


def read(text: str, fresh: bool, ended: bool) -> Cut:
  """Reads up to the first call. The last one of an answer may lack its second tag."""
  start = text.find(OPEN)
  if start < 0:
    return Cut.text(len(text) - (0 if ended else waiting(text, OPEN)))
  inside = start + len(OPEN)
  body = inside + len(text[inside:]) - len(text[inside:].lstrip())
  no_call = Cut.text(inside)  # the tag itself is text, and what follows is read anew
  if text[body : body + 1] not in ('{', '['):
    return Cut.text(start) if body == len(text) and not ended else no_call
  end = value_end(text, body)
  if end is None:
    return no_call if ended else Cut.text(start)
  value, rest = loads(text[body:end]), text[end:].lstrip()
  listed = value if isinstance(value, list) else [value]
  found = tuple(call(one, 'arguments', 'parameters') for one in listed)
  closed = rest.startswith(CLOSE)
  if not closed and CLOSE.startswith(rest) and not ended:
    return Cut.text(start)
  if not found or None in found or not (closed or (ended and CLOSE.startswith(rest))):
    return no_call
  return Cut(start, len(text) - len(rest) + (len(CLOSE) if closed else len(rest)), found)
