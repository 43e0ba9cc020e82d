"""Which format a chat template means, and the schema of calls that are forced."""

import re

import pytest

from experiments.serving.body import Fields
from experiments.serving.tools import asked, forced, formats
from experiments.serving.tools.formats import FORMATS

# Sentences of published templates.
QWEN = (
  'For each function call, return a json object with function name and arguments within '
  '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, '
  '\\"arguments\\": <args-json-object>}\\n</tool_call>'
)
QWEN_CODER = '<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>'
LLAMA = (
  'Respond in the format {"name": function name, "parameters": dictionary of argument name and its '
  "value}. ' }}"
)
TEMPLATES = {
  QWEN: 'hermes',
  LLAMA: 'llama3',
  "{{- '<|python_tag|>' + tool_call.name }}": 'llama3',
  "{{- '[TOOL_CALLS] [' }}": 'mistral',
  QWEN_CODER: None,
  "{% for m in messages %}<|im_start|>{{ m['role'] }}{% endfor %}": None,
}


@pytest.mark.parametrize('template, name', TEMPLATES.items())
def test_templates(template, name):
  expected = None if name is None else FORMATS[name]
  assert formats.pick('auto', template) is expected
  assert formats.pick('hermes', template) is FORMATS['hermes']
  assert formats.pick('none', template) is None


def test_without_a_template_no_format_is_found():
  assert formats.pick('auto', None) is None


def test_ids_differ_and_are_what_templates_want():
  ids = [FORMATS['mistral'].new_id() for _ in range(20)]
  assert len(set(ids)) == 20 and all(re.fullmatch('[a-zA-Z0-9]{9}', one) for one in ids)
  assert FORMATS['hermes'].new_id().startswith('call_')


def test_templates_get_tools_by_the_names_that_they_look_for():
  """SmolLM3's template reads xml_tools; without a format, the usual name is left."""
  listed = [{'type': 'function', 'function': {'name': 'f'}}]
  fields = Fields({'tools': listed})
  assert asked.tools(fields, FORMATS['hermes']).variables == {'tools': listed, 'xml_tools': listed}
  assert asked.tools(fields, None).variables == {'tools': listed}
  for hidden in (Fields({'tools': listed, 'tool_choice': 'none'}), Fields({'tools': []})):
    assert asked.tools(hidden, FORMATS['hermes']).variables == {}


def test_the_schema_of_a_list_of_calls_has_definitions_at_its_root():
  point = {'type': 'object', 'properties': {'x': {'type': 'integer'}}}
  own = {'type': 'object', 'properties': {'p': {'$ref': '#/$defs/P'}}, '$defs': {'P': point}}
  functions = [{'name': 'f', 'parameters': own}, {'name': 'g'}]
  schema = forced.schema_of_list(functions, 1)
  assert schema['$defs'] == {'P': point}
  assert (schema['minItems'], schema['maxItems']) == (1, 1)
  f, g = schema['items']['anyOf']
  assert f['properties']['parameters'] == {k: own[k] for k in ('type', 'properties')}
  assert g['properties'] == {'name': {'const': 'g'}, 'parameters': {'type': 'object'}}
  other = {'name': 'h', 'parameters': {'$defs': {'P': {'type': 'string'}}}}
  with pytest.raises(ValueError, match="define 'P' in their \\$defs, and differently"):
    forced.schema_of_list([*functions, other], None)
