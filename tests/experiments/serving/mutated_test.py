"""Calls with random damage get an answer or a 4xx, never a 500, and leave nothing behind."""

import copy
import json
import random

import pytest

from experiments.serving.tools.formats import FORMATS

CALLS = {
  'completions': {
    'model': 'tiny',
    'prompt': 'hello',
    'max_tokens': 3,
    'n': 1,
    'temperature': 0.5,
    'top_p': 0.9,
    'top_k': 5,
    'min_p': 0.1,
    'repetition_penalty': 1.1,
    'presence_penalty': 0.5,
    'frequency_penalty': 0.5,
    'logit_bias': {'5': 1.0},
    'stop': ['x'],
    'stop_token_ids': [7],
    'seed': 3,
    'echo': True,
    'logprobs': 2,
    'stream': False,
    'structured_outputs': {'regex': 'a+'},
  },
  'chat/completions': {
    'model': 'tiny',
    'messages': [
      {'role': 'system', 'content': 'be kind'},
      {'role': 'user', 'content': [{'type': 'text', 'text': 'hi'}]},
      {'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': '{}'}}]},
      {'role': 'tool', 'tool_call_id': 'c', 'content': '1'},
    ],
    'tools': [{'type': 'function', 'function': {'name': 'f', 'parameters': {'type': 'object'}}}],
    'tool_choice': 'auto',
    'max_completion_tokens': 3,
    'response_format': {
      'type': 'json_schema',
      'json_schema': {'name': 'x', 'schema': {'type': 'object', 'properties': {'a': {}}}},
    },
    'logprobs': True,
    'top_logprobs': 2,
    'stream': True,
    'stream_options': {'include_usage': True},
    'chat_template_kwargs': {'a': 1},
  },
}
CALLS['chat/completions?tools'] = {
  **CALLS['chat/completions'],
  'tool_choice': {'type': 'function', 'function': {'name': 'f'}},
  'parallel_tool_calls': False,
  'response_format': None,
  'stream': False,
}
VALUES = [
  None,
  True,
  0,
  -1,
  2**63,
  10**400,
  1.5,
  -0.0,
  1e308,
  5e-324,
  '',
  'x' * 3000,
  '\ud800',
  '\x00',
  '🎉\u202e',
  [],
  [[]],
  [None],
  [2**70],
  {},
  {'type': 'x'},
  {'': {}},
  {'$ref': '#'},
  '(((((a*)*)*)*)*)*',
  [{'role': 'user', 'content': '{{ 1 / 0 }}'}],
]
RAW = ['NaN', 'Infinity', '-Infinity', '1e999', '1' * 5000, '"\\ud800"', '[' * 100 + ']' * 100]


def _places(value, path=()):
  yield path
  inside = dict(enumerate(value)) if isinstance(value, list) else value
  for key, inner in inside.items() if isinstance(inside, dict) else ():
    yield from _places(inner, (*path, key))


def _damaged(call, rng):
  call = copy.deepcopy(call)
  marks = {}
  for _ in range(rng.randint(1, 3)):
    path = rng.choice([p for p in _places(call) if p])
    parent = call
    for key in path[:-1]:
      parent = parent[key]
    kind = rng.random()
    if kind < 0.2:
      del parent[path[-1]]
    elif kind < 0.85:
      parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    else:
      mark = f'mark-{len(marks)}'
      parent[path[-1]], marks[f'"{mark}"'] = mark, rng.choice(RAW)
  text = json.dumps(call)
  for mark, raw in marks.items():
    text = text.replace(mark, raw)
  data = bytearray(text.encode())
  if rng.random() < 0.15:  # not JSON, or not UTF-8
    data[rng.randrange(len(data))] = rng.randrange(256)
  return bytes(data)


@pytest.mark.parametrize('count', [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_calls_are_answered_or_refused(serve, http, until, count):
  running = serve(tool_format=FORMATS['hermes'])
  rng, seen = random.Random(count), {}
  for _ in range(count):
    path = rng.choice(list(CALLS))
    data = _damaged(CALLS[path], rng)
    headers = {'Content-Type': 'application/json'}
    answer = http.post(f'{running.url}/v1/{path}', content=data, headers=headers)
    seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
    assert answer.status_code in (200, 400, 404), (data, answer.text)
    if answer.status_code == 200:
      assert '"error"' not in answer.text, (data, answer.text)
    else:
      assert set(answer.json()['error']) == {'message', 'type', 'param', 'code'}
      assert len(answer.json()['error']['message']) < 1500
  assert seen[200] > count // 50 and seen[400] > count // 2
  until(lambda: running.worker.open == 0 and not running.engine.busy)
  assert running.worker.error is None
