"""Calls of tools by OpenAI's own client, over an engine that answers what a script says."""

import json

import openai
import pytest

from experiments.serving.tools.formats import FORMATS

USER = [{'role': 'user', 'content': 'hi'}]
ARGUMENTS = {
  'type': 'object',
  'properties': {'a': {'type': 'integer', 'maximum': 9}, 'unit': {'enum': ['c', 'f']}},
  'required': ['a', 'unit'],
  'additionalProperties': False,
}
TOOLS = [
  {'type': 'function', 'function': {'name': n, 'parameters': ARGUMENTS, 'strict': True}}
  for n in ('add', 'get')
]
CALL = '{"name": "add", "arguments": {"a": 1, "unit": "c"}}'
ANSWER = f'I do. <tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>'


@pytest.fixture(scope='module')
def running(serve, tokenizer):
  return serve([*tokenizer.encode(ANSWER), 0], tool_format=FORMATS['hermes'], capacity=1024)


@pytest.fixture(scope='module')
def create(running, client):
  made = client(running)
  defaults = {'model': 'tiny', 'seed': 0, 'messages': USER, 'tools': TOOLS, 'max_tokens': 200}
  return lambda **given: made.chat.completions.create(**defaults | given)


def _check(message, finish, count=2):
  assert finish == 'tool_calls'
  assert len(message.tool_calls) == count == len({call.id for call in message.tool_calls})
  for call in message.tool_calls:
    assert (call.type, call.function.name) == ('function', 'add')
    assert json.loads(call.function.arguments) == {'a': 1, 'unit': 'c'}


def test_calls_at_once(create):
  for given in ({}, {'tool_choice': 'auto'}):
    (choice,) = create(**given).choices
    assert choice.message.content == 'I do. '
    _check(choice.message, choice.finish_reason)
  (choice,) = create(parallel_tool_calls=False).choices
  _check(choice.message, choice.finish_reason, 1)


def test_calls_in_a_stream(create, running, client):
  parts = [part.choices[0] for part in create(stream=True)]
  assert ''.join(part.delta.content or '' for part in parts) == 'I do. '
  calls = [call for part in parts for call in part.delta.tool_calls or ()]
  assert [call.index for call in calls] == [0, 1]
  assert [part.finish_reason for part in parts if part.finish_reason] == ['tool_calls']
  stream = client(running).chat.completions.stream(
    model='tiny', seed=0, messages=USER, tools=TOOLS, max_tokens=200
  )
  with stream as events:  # the client's own accumulation
    (choice,) = events.get_final_completion().choices
  assert choice.message.content == 'I do. '
  _check(choice.message, choice.finish_reason)
  assert choice.message.tool_calls[0].function.parsed_arguments == {'a': 1, 'unit': 'c'}


def test_without_tools_the_answer_is_text(create):
  for given in ({'tools': openai.NOT_GIVEN}, {'tool_choice': 'none'}):
    (choice,) = create(**given).choices
    assert (choice.message.content, choice.message.tool_calls) == (ANSWER, None)
    assert choice.finish_reason == 'stop'


def test_an_answer_that_is_cut_within_a_call_is_text(create, tokenizer):
  (choice,) = create(max_tokens=20).choices
  assert choice.message.content == tokenizer.decode(tokenizer.encode(ANSWER)[:20])
  assert (choice.finish_reason, choice.message.tool_calls) == ('length', None)


def test_special_tokens_are_text_where_calls_are_looked_for(serve, client, tokenizer):
  """Mistral's mark is a special token; here END_OF_TEXT plays its part."""
  script = [*tokenizer.encode('hello '), 0, *tokenizer.encode('world')]
  made = client(serve(script, tool_format=FORMATS['mistral'], capacity=1024))
  ask = lambda **given: made.chat.completions.create(
    model='tiny', messages=USER, seed=0, max_tokens=len(script), extra_body={'ignore_eos': True},
    **given
  )  # fmt: skip
  assert ask().choices[0].message.content == 'hello world'
  assert ask(tools=TOOLS).choices[0].message.content == 'hello <|endoftext|>world'


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('stream', [False, True])
def test_forced_calls_follow_their_schemas(client, seed, stream, running):
  named = {'type': 'function', 'function': {'name': 'get'}}
  for choice, names in (('required', {'add', 'get'}), (named, {'get'})):
    events = client(running).chat.completions.create(
      model='tiny', messages=USER, tools=TOOLS, tool_choice=choice, seed=seed, max_tokens=150,
      parallel_tool_calls=False, stream=stream,
    )  # fmt: skip
    choices = [part.choices[0] for part in events] if stream else events.choices
    messages = [one.delta if stream else one.message for one in choices]
    (call,) = [call for message in messages for call in message.tool_calls or ()]
    assert not any(message.content for message in messages)
    assert call.function.name in names
    values = json.loads(call.function.arguments)
    assert set(values) == {'a', 'unit'} and values['a'] <= 9 and values['unit'] in 'cf'
    assert choices[-1].finish_reason == 'tool_calls'


def test_results_go_back_into_the_template(create, running, tokenizer, monkeypatch):
  """The messages of a whole turn with tools, as the client returns them."""
  seen, add = [], running.engine.add
  monkeypatch.setattr(running.engine, 'add', lambda request: seen.append(request) or add(request))
  message = create().choices[0].message
  results = [
    {'role': 'tool', 'tool_call_id': call.id, 'content': '2'} for call in message.tool_calls
  ]
  create(messages=[*USER, message, *results], max_tokens=1)
  prompt = tokenizer.decode(seen[-1].prompt)
  assert prompt.startswith('<user>hi\n<assistant>I do. \n<tool>2\n<tool>2\ntools: ')


@pytest.mark.parametrize(
  'given, param, message',
  [
    ({'tools': [{'type': 'function'}]}, 'tools', 'a list of functions'),
    (
      {'tools': [{'type': 'function', 'function': {'name': 'f', 'parameters': [1]}}]},
      'tools',
      'whose parameters are JSON schemas',
    ),
    ({'tool_choice': 'any'}, 'tool_choice', 'must be none, auto, required or'),
    ({'tool_choice': {'type': 'allowed_tools'}}, 'tool_choice', 'must be none, auto'),
    (
      {'tool_choice': {'type': 'function', 'function': {'name': 'no'}}},
      'tool_choice',
      "names 'no'; the tools are add, get",
    ),
    (
      {'tools': openai.NOT_GIVEN, 'tool_choice': 'required'},
      'tool_choice',
      'needs tools to choose from',
    ),
    (
      {'tool_choice': 'required', 'response_format': {'type': 'json_object'}},
      'response_format',
      'a call has one grammar, not several: tool_choice, response_format',
    ),
  ],
)
def test_wrong_values_are_refused(create, given, param, message):
  with pytest.raises(openai.BadRequestError, match=message) as caught:
    create(**given)
  assert caught.value.param == param
