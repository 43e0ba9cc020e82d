"""The whole server with a real engine and a tiny model, asked by OpenAI's own client."""

import concurrent.futures
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import presets
from model.infer.engine import Engine
from model.infer.generate import generate
from model.transformer import Transformer

TOLERANCE = 1e-5  # float32, by the engine and by the whole sequence
USER = [{'role': 'user', 'content': 'hello world'}]
SCHEMA = {
  'type': 'object',
  'properties': {'a': {'type': 'integer', 'maximum': 99}, 'b': {'enum': ['x', 'y']}},
  'required': ['a', 'b'],
  'additionalProperties': False,
}


@pytest.fixture(scope='module')
def model(tokenizer):
  config = presets.preset('tiny-llama').replace(vocab_size=320, eos_ids=tokenizer.eos_ids)
  return Transformer(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope='module')
def running(serve, model):
  return serve(engine=Engine(model, slots=2, capacity=256, part=16))


@pytest.fixture(scope='module')
def made(running, client):
  return client(running)


@pytest.fixture(scope='module')
def greedy(model, tokenizer):
  """A function (text of a prompt, count) -> the tokens that the library generates."""

  def continued(text, count):
    return generate(model, [tokenizer.encode(text)], max_new_tokens=count)[0]

  return continued


def test_completions_are_those_of_the_library(made, greedy, tokenizer):
  prompts = ['hello world', 'né 東京', 'One two three ' * 5]
  answer = made.completions.create(model='tiny', prompt=prompts, max_tokens=24, temperature=0)
  for prompt, choice in zip(prompts, answer.choices, strict=True):
    new = greedy(prompt, 24)
    assert choice.text == tokenizer.continuation(tokenizer.encode(prompt), new)
    assert choice.finish_reason == ('length' if len(new) == 24 else 'stop')


@pytest.mark.parametrize('stream', [False, True])
def test_chats_are_those_of_the_library(made, greedy, tokenizer, stream):
  prompt = '<user>hello world\n<>'
  answer = made.chat.completions.create(
    model='tiny', messages=USER, max_tokens=24, temperature=0, stream=stream
  )
  if stream:
    text = ''.join(part.choices[0].delta.content or '' for part in answer)
  else:
    text = answer.choices[0].message.content
  assert text == tokenizer.continuation(tokenizer.encode(prompt), greedy(prompt, 24))


def test_scores_are_those_of_the_whole_sequence(made, model, tokenizer):
  ids = tokenizer.encode('hello world, hello there. né 東京')
  logs_TV = jax.jit(lambda ids_BT: jax.nn.log_softmax(model(ids_BT)))(jnp.asarray([ids]))[0]
  expected = np.asarray(logs_TV)[np.arange(len(ids) - 1), ids[1:]]
  (choice,) = made.completions.create(
    model='tiny', prompt=ids, max_tokens=0, echo=True, logprobs=3
  ).choices
  scores = choice.logprobs
  assert scores.token_logprobs[0] is None
  np.testing.assert_allclose(scores.token_logprobs[1:], expected, atol=TOLERANCE)
  for top, row in zip(scores.top_logprobs[1:], logs_TV[:-1], strict=True):
    highest = sorted(np.asarray(row), reverse=True)[:3]
    np.testing.assert_allclose(sorted(top.values(), reverse=True)[:3], highest, atol=TOLERANCE)
  assert choice.finish_reason == 'length'


def test_a_seed_gives_the_same_alone_and_among_others(made):
  def ask(seed):
    answer = made.completions.create(
      model='tiny', prompt='hello', max_tokens=20, n=2, seed=seed, temperature=1.2, top_p=0.9
    )
    return [choice.text for choice in answer.choices]

  alone = [ask(seed) for seed in range(4)]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert list(pool.map(ask, range(4))) == alone
  assert len({text for texts in alone for text in texts}) > 4


def test_stop_strings_and_biases(made, tokenizer):
  asked = {'model': 'tiny', 'prompt': 'hello', 'temperature': 0}
  first, second = tokenizer.encode('he')[0], tokenizer.encode(' world')[0]
  forced = made.completions.create(**asked, max_tokens=3, logit_bias={str(first): 100})
  assert forced.choices[0].text == 'hehehe'
  stopped = made.completions.create(
    **asked, max_tokens=50, logit_bias={str(second): 100}, stop=['ld w', 'rl']
  )
  assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (' wo', 'stop')


@pytest.mark.parametrize('seed', range(3))
def test_json_schemas(made, seed):
  form = {'type': 'json_schema', 'json_schema': {'name': 'pair', 'schema': SCHEMA, 'strict': True}}
  answer = made.chat.completions.create(
    model='tiny', messages=USER, response_format=form, max_tokens=60, seed=seed
  )
  value = json.loads(answer.choices[0].message.content)
  assert set(value) == {'a', 'b'} and value['a'] <= 99 and value['b'] in ('x', 'y')


def test_a_shared_beginning_is_counted_as_cached(made):
  asked = {'model': 'tiny', 'prompt': 'One two three four. ' * 8, 'max_tokens': 2}
  first, second = (made.completions.create(**asked).usage for _ in range(2))
  assert first.prompt_tokens_details.cached_tokens == 0
  assert second.prompt_tokens // 2 < second.prompt_tokens_details.cached_tokens
  assert second.prompt_tokens_details.cached_tokens < second.prompt_tokens


def test_clients_that_leave_free_their_rows(made, running, until):
  for _ in range(6):
    stream = made.completions.create(
      model='tiny', prompt='hello', max_tokens=200, stream=True, extra_body={'ignore_eos': True}
    )
    next(iter(stream))
    stream.close()
  until(lambda: not running.engine.busy and running.worker.open == 0)
  assert running.engine.metrics.running == running.engine.metrics.waiting == 0
