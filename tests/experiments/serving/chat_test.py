"""Chats by OpenAI's own client, over a scripted engine, whose tokens are known."""

import json

import openai
import pytest

SCRIPT = 'hello world, hello there. '
USER = [{'role': 'user', 'content': 'hi'}]
TOOL = {'type': 'function', 'function': {'name': 'add', 'parameters': {'type': 'object'}}}
CALL = {'id': 'c1', 'type': 'function', 'function': {'name': 'add', 'arguments': '{"a": 1}'}}
SCHEMA = {
  'type': 'object',
  'properties': {'a': {'type': 'integer', 'maximum': 99}, 'b': {'enum': ['x', 'y']}},
  'required': ['a', 'b'],
  'additionalProperties': False,
}


@pytest.fixture(scope='module')
def running(serve):
  return serve(SCRIPT)


@pytest.fixture(scope='module')
def create(running, client):
  made = client(running)
  defaults = {'model': 'tiny', 'seed': 0, 'messages': USER, 'max_tokens': 8}
  return lambda **given: made.chat.completions.create(**defaults | given)


@pytest.fixture
def prompt_of(create, running, tokenizer, monkeypatch):
  """A function (call) -> the text of the prompt that the engine got."""
  seen, add = [], running.engine.add
  monkeypatch.setattr(running.engine, 'add', lambda request: seen.append(request) or add(request))

  def prompt(**given):
    create(**given)
    return tokenizer.decode(seen[-1].prompt)

  return prompt


def test_an_answer_and_its_stream(create, tokenizer):
  text = tokenizer.decode(tokenizer.encode(SCRIPT)[:8])
  answer = create()
  assert answer.object == 'chat.completion'
  (choice,) = answer.choices
  assert (choice.message.role, choice.message.content) == ('assistant', text)
  assert (choice.finish_reason, choice.logprobs) == ('length', None)
  prompt = len(tokenizer.encode('<user>hi\n<>'))
  assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 8)
  parts = list(create(stream=True, stream_options={'include_usage': True}))
  assert {part.object for part in parts} == {'chat.completion.chunk'}
  assert parts[-1].usage == answer.usage
  deltas = [part.choices[0].delta for part in parts[:-1]]
  assert deltas[0].role == 'assistant'
  assert ''.join(delta.content or '' for delta in deltas) == text


def test_scores(create, tokenizer):
  for stream in (False, True):
    answer = create(logprobs=True, top_logprobs=2, stream=stream)
    choices = [part.choices[0] for part in answer] if stream else answer.choices
    scores = [one for choice in choices for one in choice.logprobs.content]
    assert [s.logprob for s in scores] == [-float(t) for t in tokenizer.encode(SCRIPT)[:8]]
    assert bytes(b for s in scores for b in s.bytes).decode() == 'hello world, hello there.'
    assert [top.logprob for top in scores[0].top_logprobs] == [-1.0, -2.0]
    assert scores[0].top_logprobs[0].token == tokenizer.decode([1])
  assert create(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_without_a_limit_the_context_is_filled(create, running):
  answer = create(max_tokens=None)
  assert answer.usage.total_tokens == running.engine.capacity
  answer = create(max_tokens=3, max_completion_tokens=5)
  assert answer.usage.completion_tokens == 5


def test_messages_reach_the_template(prompt_of):
  parts = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
  messages = [{'role': 'developer', 'content': 'be kind'}, {'role': 'user', 'content': parts}]
  assert prompt_of(messages=messages) == '<system>be kind\n<user>a\nb\n<>'
  assert prompt_of(extra_body={'add_generation_prompt': False}) == '<user>hi\n'
  tools = f'tools: {json.dumps([TOOL])}\n'
  assert prompt_of(tools=[TOOL]) == f'<user>hi\n{tools}<>'
  assert prompt_of(tools=[TOOL], tool_choice='none') == '<user>hi\n<>'
  called = [
    *USER,
    {'role': 'assistant', 'content': None, 'tool_calls': [CALL]},
    {'role': 'tool', 'tool_call_id': 'c1', 'content': '2'},
  ]
  assert prompt_of(messages=called) == '<user>hi\n<assistant>\n<tool>2\n<>'


@pytest.mark.parametrize('seed', range(3))
def test_json_schemas(create, seed):
  form = {'type': 'json_schema', 'json_schema': {'name': 'pair', 'schema': SCHEMA, 'strict': True}}
  answer = create(response_format=form, max_tokens=100, seed=seed)
  value = json.loads(answer.choices[0].message.content)
  assert set(value) == {'a', 'b'} and value['a'] <= 99 and value['b'] in ('x', 'y')
  assert answer.choices[0].finish_reason == 'stop'


@pytest.mark.parametrize(
  'body',
  [
    {'guided_choice': ['yes "sir"', 'no']},
    {'structured_outputs': {'choice': ['no', 'yes "sir"']}},
    {'structured_outputs': {'grammar': 'start: "no" | "yes \\"sir\\""'}},
    {'structured_outputs': {'regex': 'no|yes "sir"'}},
  ],
)
def test_other_forms(create, body):
  assert create(extra_body=body).choices[0].message.content in ('no', 'yes "sir"')


@pytest.mark.parametrize(
  'given, param, message',
  [
    ({'messages': []}, 'messages', '1 to 2000 messages'),
    ({'messages': ['hi']}, 'messages', r"messages\[0\] must be an object, not 'hi'"),
    ({'messages': [{'role': 'king', 'content': ''}]}, 'messages[0].role', 'one of system'),
    ({'messages': [{'role': 'user'}]}, 'messages[0].content', 'a text or a list'),
    (
      {'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {}}]}]},
      'messages[0].content',
      'this model reads text alone',
    ),
    (
      {'messages': [*USER, {'role': 'assistant', 'tool_calls': [{}]}]},
      'messages[1].tool_calls',
      'each with a name',
    ),
    ({'max_tokens': 300}, 'prompt', 'the context has 256 here'),
    ({'top_logprobs': 2}, 'top_logprobs', 'needs "logprobs": true'),
    ({'response_format': {'type': 'xml'}}, 'response_format.type', 'text, json_object or'),
    (
      {'response_format': {'type': 'json_schema', 'json_schema': {'name': 'x'}}},
      'response_format',
      'must be a JSON schema',
    ),
    (
      {
        'response_format': {
          'type': 'json_schema',
          'json_schema': {'name': 'x', 'schema': {'type': 'nope'}},
        }
      },
      'response_format',
      'cannot be followed',
    ),
    ({'modalities': ['audio']}, 'modalities', 'not supported'),
    ({'extra_body': {'chat_template': '{{ 1 }}'}}, 'chat_template', 'not supported'),
    (
      {'extra_body': {'chat_template_kwargs': {'messages': []}}},
      'chat_template_kwargs.messages',
      'its own place',
    ),
  ],
)
def test_wrong_values_are_refused_with_their_names(create, given, param, message):
  with pytest.raises(openai.BadRequestError, match=message) as caught:
    create(**given)
  assert caught.value.param == param
