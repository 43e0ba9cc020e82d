"""Completions by OpenAI's own client, over a scripted engine, whose tokens are known."""

import openai
import pytest

SCRIPT = 'hello world, né 東京 🎉 hello there. '


@pytest.fixture(scope='module')
def running(serve):
  return serve(SCRIPT, adapters=('twin', 'broken'))


@pytest.fixture(scope='module')
def create(running, client):
  made = client(running)
  return lambda **given: made.completions.create(**{'model': 'tiny', 'seed': 0} | given)


@pytest.fixture(scope='module')
def script(tokenizer):
  """The first tokens of a continuation by the seed 0, and their text."""
  tokens = tokenizer.encode(SCRIPT)

  def first(count, seed=0):
    chosen = [tokens[(seed + i) % len(tokens)] for i in range(count)]
    return chosen, tokenizer.continuation(tokenizer.encode('hello'), chosen)

  return first


def test_a_text_a_list_of_texts_tokens_and_lists_of_tokens(create, script, tokenizer):
  ids = tokenizer.encode('hello')
  for prompt, count in (('hello', 1), (['hello', 'hello'], 2), (ids, 1), ([ids, ids, ids], 3)):
    answer = create(prompt=prompt, max_tokens=9)
    assert answer.object == 'text_completion'
    assert [c.index for c in answer.choices] == list(range(count))
    assert {c.text for c in answer.choices} == {script(9)[1]}
    assert {c.finish_reason for c in answer.choices} == {'length'}
    assert answer.usage.prompt_tokens == count * len(ids)
    assert answer.usage.completion_tokens == 9 * count
    assert answer.usage.total_tokens == count * (9 + len(ids))
    assert answer.usage.prompt_tokens_details.cached_tokens == count * (len(ids) // 2)


def test_without_max_tokens_there_are_16(create, script):
  assert create(prompt='hello').choices[0].text == script(16)[1]


def test_choices_draw_by_seeds_one_after_the_other(create, script):
  answer = create(prompt=['hello', 'hello'], n=3, seed=4, max_tokens=5)
  assert [c.text for c in answer.choices] == [script(5, 4 + i)[1] for i in range(3)] * 2
  assert answer.usage.prompt_tokens == 4
  assert create(prompt='hello', seed=-1, max_tokens=1).choices  # as 2**63 - 1


@pytest.mark.parametrize('stop', [', né', ['nothing', '京'], '🎉', 'lo w', ['o', 'ello'], ' '])
def test_stop_strings(create, running, script, stop, until):
  whole = script(40)[1]
  stops = [stop] if isinstance(stop, str) else stop
  end = min(whole.index(s) + len(s) for s in stops if s in whole)
  met = max((s for s in stops if whole[:end].endswith(s)), key=len)
  for stream in (False, True):
    answer = create(prompt='hello', max_tokens=10**2, stop=stop, stream=stream)
    pieces = [part.choices[0] for part in answer] if stream else answer.choices
    assert ''.join(piece.text for piece in pieces) == whole[: end - len(met)]
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ('stop', met)
  until(lambda: not running.engine.requests)  # cancelled long before the 100 tokens
  kept = create(
    prompt='hello', max_tokens=100, stop=stop, extra_body={'include_stop_str_in_output': True}
  )
  assert kept.choices[0].text == whole[:end]


def test_end_tokens(create, tokenizer):
  tokens = tokenizer.encode(SCRIPT)
  asked = {'prompt': 'hello', 'max_tokens': 9}
  answer = create(**asked, extra_body={'stop_token_ids': [tokens[3]]})
  assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ('stop', 3)


def test_streams_join_to_what_comes_at_once(create, script):
  asked = {'prompt': 'hello', 'max_tokens': 30, 'n': 2, 'echo': True, 'logprobs': 2}
  whole = create(**asked)
  parts = list(create(**asked, stream=True, stream_options={'include_usage': True}))
  assert parts[-1].choices == []
  assert parts[-1].usage == whole.usage
  assert all(part.usage is None for part in parts[:-1])
  assert len({part.id for part in parts}) == 1
  for choice in whole.choices:
    own = [c for part in parts for c in part.choices if c.index == choice.index]
    assert ''.join(c.text for c in own) == choice.text == 'hello' + script(30, choice.index)[1]
    assert not any('\ufffd' in c.text for c in own)
    assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + ['length']
    for field in ('tokens', 'token_logprobs', 'top_logprobs', 'text_offset'):
      joined = [value for c in own for value in getattr(c.logprobs, field)]
      assert joined == getattr(choice.logprobs, field)


def test_scores_of_a_prompt_as_evaluations_ask_for_them(create, tokenizer):
  ids = tokenizer.encode('hello world')
  for most in (0, 1):
    (choice,) = create(prompt=ids, max_tokens=most, echo=True, logprobs=1).choices
    scores = choice.logprobs
    assert scores.token_logprobs[: len(ids)] == [None, *(-float(t) for t in ids[1:])]
    assert len(scores.tokens) == len(ids) + most
    assert scores.top_logprobs[0] is None
    assert scores.top_logprobs[1] == {tokenizer.decode([1]): -1.0, scores.tokens[1]: -ids[1]}
    assert choice.text.startswith('hello world')
    for token, offset in zip(scores.tokens[: len(ids)], scores.text_offset):
      assert choice.text[offset:].startswith(token)


def test_scores_with_stop_strings_are_those_of_the_text(create, tokenizer, script):
  # The stop string begins within the token ' world' and ends in the token after it.
  (choice,) = create(prompt='hello', max_tokens=20, stop='ld,', logprobs=0).choices
  assert choice.text == 'hello wor'
  assert ''.join(choice.logprobs.tokens) == 'hello world'
  (choice,) = create(prompt='hello', max_tokens=20, stop=' world', logprobs=0).choices
  assert ''.join(choice.logprobs.tokens) == choice.text == 'hello'


def test_half_characters_in_scores_are_bytes(create, script):
  (choice,) = create(prompt='hello', max_tokens=16, logprobs=0).choices
  halves = [token for token in choice.logprobs.tokens if token.startswith('bytes:')]
  assert halves
  data = b''.join(
    bytes.fromhex(t[6:].replace('\\x', '')) if t in halves else t.encode()
    for t in choice.logprobs.tokens
  )
  assert data.decode() == choice.text


def test_names_of_adapters_are_models(create, running):
  assert create(prompt='hello', model='twin').model == 'twin'
  with pytest.raises(openai.NotFoundError, match=r'no model .other. here.* has tiny, twin'):
    create(prompt='hello', model='other')
  with pytest.raises(openai.BadRequestError, match='this adapter does not fit'):
    create(prompt='hello', model='broken')


@pytest.mark.parametrize('stream', [False, True])
def test_regular_expressions(create, stream):
  asked = {'prompt': 'hello', 'max_tokens': 40, 'stream': stream, 'n': 2}
  body = {'structured_outputs': {'regex': '(he|ab){2}x'}}
  answer = create(**asked, extra_body=body)
  choices = [c for part in (answer if stream else [answer]) for c in part.choices]
  for i in range(2):
    text = ''.join(c.text for c in choices if c.index == i)
    assert text in {a + b + 'x' for a in ('he', 'ab') for b in ('he', 'ab')}


@pytest.mark.parametrize(
  'given, param, message',
  [
    ({'prompt': ''}, 'prompt', 'the prompt is empty'),
    ({'prompt': []}, 'prompt', 'prompt must be a text'),
    ({'prompt': ['a', 1]}, 'prompt', 'prompt must be a text'),
    ({'prompt': [[1], []]}, 'prompt', 'prompt must be a text'),
    ({'prompt': [320]}, 'prompt', 'tokens from 0 to 319'),
    ({'prompt': [-1]}, 'prompt', 'tokens from 0 to 319'),
    ({'prompt': [True]}, 'prompt', 'tokens from 0 to 319'),
    ({'prompt': [1] * 250}, 'prompt', '250 tokens and 16 new ones .* the context has 256 here'),
    ({'prompt': ['a'] * 129}, 'prompt', 'at most 128 prompts, not 129'),
    ({'prompt': ['a'] * 100, 'n': 2}, 'n', 'at most 128 choices, not 200'),
    ({'max_tokens': 0}, 'max_tokens', 'an integer from 1'),
    ({'suffix': 'x'}, 'suffix', 'suffix is not supported'),
    ({'best_of': 2}, 'best_of', 'the same as n, 1'),
    ({'logprobs': 21}, 'logprobs', 'an integer from 0 to 20'),
    ({'temperature': -1}, 'temperature', 'a number from 0 to 100, not -1'),
    ({'temperature': 'hot'}, 'temperature', "not 'hot'"),
    ({'top_p': 1.5}, 'top_p', 'a number from 0 to 1'),
    ({'seed': 2**63}, 'seed', 'an integer from'),
    ({'n': 0}, 'n', 'an integer from 1 to 128'),
    ({'stop': ['']}, 'stop', 'each of 1 to 1000 characters'),
    ({'stop': ['a'] * 17}, 'stop', 'at most 16 texts'),
    ({'presence_penalty': 3}, 'presence_penalty', 'a number from -2 to 2'),
    ({'logit_bias': {'320': 1}}, 'logit_bias', 'tokens of the vocabulary, from 0 to 319'),
    ({'logit_bias': {'1': 101}}, 'logit_bias.1', 'a number from -100 to 100'),
    ({'stream_options': {}}, 'stream_options', 'needs "stream": true'),
    ({'extra_body': {'guided_regex': '('}}, 'guided_regex', 'unclosed group'),
    ({'extra_body': {'use_beam_search': True}}, 'use_beam_search', 'is not supported'),
    ({'extra_body': {'ignore_eos': True, 'guided_regex': 'a'}}, 'ignore_eos', 'must be false'),
    (
      {'extra_body': {'guided_regex': 'a', 'response_format': {'type': 'json_object'}}},
      'guided_regex',
      'one grammar, not several: response_format, guided_regex',
    ),
  ],
)
def test_wrong_values_are_refused_with_their_names(create, given, param, message):
  with pytest.raises(openai.BadRequestError, match=message) as caught:
    create(**{'prompt': 'hello'} | given)
  assert caught.value.param == param
  assert caught.value.type == 'invalid_request_error'
