"""Calls in answers: recorded texts, random ones, and every way to cut them into pieces."""

import json
import random

import pytest

from experiments.serving.tools import forced
from experiments.serving.tools.calls import ToolCall, value_end
from experiments.serving.tools.formats import FORMATS
from experiments.serving.tools.stream import CallStream

ADD = ToolCall('add', '{"a": 1}')
CITY = ToolCall('get_weather', '{"city": "Zürich 🎉", "unit": "c"}')
TRICKY = ToolCall('run', json.dumps({'code': 'x = "</tool_call>" + \'}{"[\\\n', 'n': [{}, []]}))
HERMES = [
  (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🎉", "unit": "c"}}\n'
    '</tool_call>',
    '',
    [CITY],
  ),
  (
    'I look.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n'
    '{"arguments": {"a": 1}, "name": "add"}\n</tool_call>\n',
    'I look.\n',
    [ADD, ADD],
  ),
  (
    '<think>\nhm < 3\n</think>\n\n<tool_call>{"name":"add","arguments":{"a":1}}</tool_call> \n'
    'Done.',
    '<think>\nhm < 3\n</think>\n\n \nDone.',
    [ADD],
  ),
  ('\n\n<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', '', [ADD]),
  (f'<tool_call>{{"name": "run", "arguments": {TRICKY.arguments}}}</tool_call>', '', [TRICKY]),
  (
    '<tool_call>[{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 1}}]'
    '</tool_call>',
    '',
    [ADD, ADD],
  ),
  # The model ended before the second tag, or within it.
  ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}', '', [ADD]),
  ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool', '', [ADD]),
]
HERMES_TEXT = [
  '',
  '\n ',
  'a < b, <tool, <tool_calls> and </tool_call>',
  '<tool_call>',
  '<tool_call>\n{"name": "add", "arguments": {"a": 1}',
  '<tool_call>{"name": "add", "arguments": {a: 1}}</tool_call> no',
  '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
  '<tool_call>{"name": "add"}</tool_call>',
  '<tool_call>{"name": "", "arguments": {}}</tool_call>',
  '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
  '<tool_call>{"name": "add", "arguments": {"a": 1}} and more',
  '<tool_call>add(1)</tool_call>',
  '<tool_call>[]</tool_call>',
  '<tool_call>[{"name": "add", "arguments": {}}, 1]</tool_call>',
  '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
]
LLAMA = [
  ('{"name": "add", "parameters": {"a": 1}}', '', [ADD]),
  ('\n{"type": "function", "name": "add", "parameters": {"a": 1}}\n', '', [ADD]),
  ('<|python_tag|>{"name": "add", "arguments": {"a": 1}}', '', [ADD]),
  (
    '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; '
    '{"name": "add", "parameters": {"a": 1}}',
    '',
    [ADD, ADD],
  ),
  ('{"name": "add", "parameters": {"a": 1}}\n\nThat adds.', '\n\nThat adds.', [ADD]),
]
LLAMA_TEXT = [
  '',
  'The JSON is {"name": "add", "parameters": {"a": 1}}',
  '{"name": "Ada", "born": 1815}',
  '{"name": "add", "parameters": {"a": 1}',
  '<|python_tag|>brave_search.call(query="x")',
  '<|python_tag|>',
  '<|python',
  '{not json} and more',
  '; x',
]
MISTRAL = [
  ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', '', [ADD]),
  (
    '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 1}}]',
    '',
    [ADD, ADD],
  ),
  ('Sure. [TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add{"a": 1}', 'Sure. ', [ADD, ADD]),
  ('[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{"a": 1}', '', [ADD]),
]
MISTRAL_TEXT = [
  '',
  'a list [1, 2], [TOOL_ and [TOOL_CALLS',
  '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "add"}]',
  '[TOOL_CALLS] []',
  '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}',
  '[TOOL_CALLS] I do not know',
  '[TOOL_CALLS]add[ARGS]',
  '[TOOL_CALLS]add[ARGS]{"a": }',
  '[TOOL_CALLS]',
]
CASES = [
  (name, text, content, calls)
  for name, called, plain in (
    ('hermes', HERMES, HERMES_TEXT),
    ('llama3', LLAMA, LLAMA_TEXT),
    ('mistral', MISTRAL, MISTRAL_TEXT),
  )
  for text, content, calls in [*called, *((text, text, []) for text in plain)]
]


def _parsed(read, pieces, most=None):
  """The text and the calls of an answer that comes in pieces."""
  stream, found = CallStream(read, most), []
  for i, piece in enumerate(pieces):
    found.append(stream.push(piece, ended=i == len(pieces) - 1))
  calls = [call for split in found for call in split.calls]
  assert stream.called == len(calls)
  return ''.join(split.text for split in found), calls


@pytest.mark.parametrize('name, text, content, calls', CASES)
def test_recorded_answers_however_they_are_cut(name, text, content, calls):
  read = FORMATS[name].read
  assert _parsed(read, [text]) == (content, calls)
  for i in range(len(text) + 1):
    assert _parsed(read, [text[:i], text[i:]]) == (content, calls)
    assert _parsed(read, [text[:i], text[i : i + 3], text[i + 3 :], '']) == (content, calls)
  assert _parsed(read, [*text, '']) == (content, calls)


@pytest.mark.parametrize('name', FORMATS)
def test_ordinary_text_is_given_out_at_once(name):
  stream = CallStream(FORMATS[name].read)
  for character in 'Well: 1 < 2 and [3], {4}; so.':
    held = character == {'hermes': '<', 'mistral': '['}.get(name)
    given = stream.push(character).text
    assert given == '' if held else given[-1:] == character


def _random_call(rng):
  text = lambda: ''.join(rng.choice('ab "\\{}[]\n🎉é</tool_call>') for _ in range(rng.randrange(9)))
  value = lambda: rng.choice([text(), 1.5, -3, None, True, [text(), {}], {text(): text()}])
  arguments = {f'{text()}{i}': value() for i in range(rng.randrange(4))}
  return ToolCall(rng.choice(['add', 'get_weather', 'a.b-c']), forced.dumps(arguments))


def _object(call, name):
  return f'{{"name": "{call.name}", "{name}": {call.arguments}}}'


WRITERS = {
  'hermes': lambda call: f'<tool_call>\n{_object(call, "arguments")}\n</tool_call>',
  'llama3': lambda call: _object(call, 'parameters'),
  'mistral': lambda call: f'[TOOL_CALLS] [{_object(call, "arguments")}]',
}


@pytest.mark.parametrize('name', FORMATS)
def test_what_is_written_is_read(name):
  """Random texts and calls, in random pieces; Llama's calls are the beginning of the answer."""
  rng = random.Random(0)
  for _ in range(200):
    calls = [_random_call(rng) for _ in range(rng.randrange(4))]
    before = '' if name == 'llama3' and calls else rng.choice(['', 'Hm <', 'é [T'])
    after = rng.choice(['', 'So.'])
    text = before + ''.join(map(WRITERS[name], calls)) + after
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(6)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
    assert _parsed(FORMATS[name].read, pieces) == (before + after, calls)


def test_only_the_first_calls_count_where_few_are_allowed():
  text = ''.join(WRITERS['hermes'](call) for call in (ADD, CITY, CITY)) + 'End.'
  assert _parsed(FORMATS['hermes'].read, [text[:90], text[90:]], 1) == ('End.', [ADD])
  text = '[TOOL_CALLS] [' + ', '.join(_object(call, 'arguments') for call in (ADD, CITY))
  assert _parsed(FORMATS['mistral'].read, [*text, ']'], 1) == ('', [ADD])


def test_forced_calls():
  listed = '[{"name": "add", "parameters": {"a": 1}}, {"name": "add", "parameters": {"a": 1}}]'
  assert _parsed(forced.read_list, [*listed]) == ('', [ADD, ADD])
  assert _parsed(forced.reader_of('add'), ['{"a"', ': 1}']) == ('', [ADD])
  for cut in ('[{"name": "add", "para', '[]', '[1]', ''):
    assert _parsed(forced.read_list, [cut]) == (cut, [])
  assert _parsed(forced.reader_of('add'), ['{"a"', ': ']) == ('{"a": ', [])


def test_where_a_value_ends():
  text = '{"a": "}\\"", "b": [{}]} {"c'
  assert value_end(text, 0) == 23
  assert value_end(text, 24) is None
  assert [value_end(text[:n], 0) for n in range(23)] == [None] * 23
