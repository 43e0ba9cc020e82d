"""Servers on real ports, over a scripted engine or a real one, in the event loop of a thread."""

import asyncio
import threading
import time
import types

import httpx
import numpy as np
import openai
import pytest

from experiments.serving import server
from experiments.serving.app import State, build
from experiments.serving.limits import Access, Limits
from experiments.serving.served import Served
from model.infer.grammar import Vocabulary
from model.infer.request import Progress, TokenLogprobs
from model.infer.worker import Worker
from model.tokenizer import Tokenizer

TEXTS = ['né 東京 🎉 {"a": [1, true], "b": null} hello world, hello there. One two three four.'] * 3
TEMPLATE = (
  "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}\n{% endfor %}"
  '{% if tools %}tools: {{ tools | tojson }}\n{% endif %}'
  '{% if add_generation_prompt %}<>{% endif %}'
)


class ScriptedEngine:
  """Follows the contract of an engine; each request repeats the tokens of `script` for ever.

  Scores are made up: token t has the log-probability -t. `failing` makes the next step raise.
  `gate` holds each step until it is set.
  """

  def __init__(self, script, vocab_size, slots=4, capacity=256):
    self.capacity = capacity
    self.script, self.vocab_size, self.slots = list(script), vocab_size, slots
    self.requests, self.known, self.number = {}, set(), 0
    self.failing, self.gate = False, threading.Event()
    self.gate.set()
    names = 'prompt_tokens generated_tokens prefix_queries prefix_hits preemptions drafted accepted'
    self.metrics = types.SimpleNamespace(
      running=0, waiting=0, cache_usage=0.0, **dict.fromkeys(names.split(), 0)
    )

  @property
  def busy(self):
    return bool(self.requests)

  def add(self, request):
    if request.adapter == 'broken':
      raise ValueError('this adapter does not fit')
    self.number += 1
    self.requests[self.number] = request, 0
    self.metrics.prompt_tokens += len(request.prompt)
    return self.number

  def cancel(self, number):
    self.requests.pop(number, None)

  def step(self):
    self.gate.wait(10)
    if self.failing:
      raise RuntimeError('scripted')
    found = []
    for number, (request, done) in list(self.requests.items())[: self.slots]:
      found.append(self._step(number, request, done))
      if found[-1].finish is None:
        self.requests[number] = request, done + len(found[-1].tokens)
      else:
        del self.requests[number]
    self.metrics.running = len(self.requests)
    return found

  def _step(self, number, request, done):
    first = {}
    if done == 0:
      asked = request.prompt_logprobs
      scored = () if asked is None else request.prompt[1:]
      scores = tuple(self._score(token, asked) for token in scored)
      first = {'prompt_logprobs': scores, 'cached_tokens': len(request.prompt) // 2}
    count = min(2, request.max_new_tokens - done)
    tokens, finish = [], None
    for i in range(done, done + count):
      token = self._next(request, i)
      if request.guide is not None:
        request.guide.advance(token)
      if token in request.stop_ids or (token == 0 and not request.ignore_eos):
        finish = 'stop'
        break
      tokens.append(token)
    if finish is None and done + len(tokens) >= request.max_new_tokens:
      finish = 'length'
    scores = () if request.logprobs is None else [self._score(t, request.logprobs) for t in tokens]
    self.metrics.generated_tokens += len(tokens)
    return Progress(
      request=number, tokens=tuple(tokens), logprobs=tuple(scores), finish=finish, **first
    )

  def _next(self, request, i):
    if request.guide is None:
      return self.script[(i + request.seed) % len(self.script)]
    bits = np.unpackbits(request.guide.mask().view(np.uint8), bitorder='little')
    allowed = np.flatnonzero(bits[: self.vocab_size])
    return int(allowed[(request.seed + 7 * i) % len(allowed)])

  def _score(self, token, count):
    return TokenLogprobs(token, -float(token), tuple((t, -float(t)) for t in range(1, count + 1)))


@pytest.fixture(scope='session')
def tokenizer():
  trained = Tokenizer.train_bpe(TEXTS, 300)
  return Tokenizer.from_files({**trained.files, 'chat_template.jinja': TEMPLATE.encode()})


class Running:
  """A server in a thread."""

  def __init__(self, engine, tokenizer, vocab_size, *, limits, access, **served):
    self.engine, self.state = engine, State()
    self.worker = Worker(engine, most=engine.slots + limits.queue)
    served = Served(
      name='tiny',
      tokenizer=tokenizer,
      vocabulary=Vocabulary(tokenizer, vocab_size, (0,)),
      capacity=engine.capacity,
      limits=limits,
      **served,
    )
    app = build(served, self.worker, self.state, access)
    bound, started = server.listen('127.0.0.1', 0), threading.Event()
    self.port = bound.getsockname()[1]
    self.url = server.url('127.0.0.1', bound)
    self._thread = threading.Thread(
      target=lambda: asyncio.run(server.serve(app, self.state, bound, self._on_start(started)))
    )
    self._thread.start()
    assert started.wait(20)

  def _on_start(self, started):
    def on_start(drain):
      self.drain, self.loop = drain, asyncio.get_running_loop()
      started.set()

    return on_start

  def close(self):
    if self._thread.is_alive():
      self.drain()
    self._thread.join(20)
    assert not self._thread.is_alive()


@pytest.fixture(scope='session')
def serve(tokenizer):
  """A function (script or engine, ...) -> a server; all are ended with the session."""
  running = []

  def start(script='hello world', *, engine=None, vocab_size=320, slots=4, capacity=256, **given):
    tokens = tokenizer.encode(script) if isinstance(script, str) else script
    engine = engine or ScriptedEngine(tokens, vocab_size, slots, capacity)
    defaults = {'limits': Limits(), 'access': Access()}
    running.append(Running(engine, tokenizer, vocab_size, **defaults | given))
    return running[-1]

  yield start
  for one in running:
    if isinstance(one.engine, ScriptedEngine):
      one.engine.gate.set()
    one.close()


@pytest.fixture(scope='session')
def client():
  """A function (server) -> a client of OpenAI's library for it."""
  made = []

  def make(running, key='none'):
    made.append(openai.OpenAI(base_url=f'{running.url}/v1', api_key=key, max_retries=0))
    return made[-1]

  yield make
  for one in made:
    one.close()


@pytest.fixture(scope='session')
def http():
  """A client that pools connections as applications do."""
  with httpx.Client(timeout=20) as one:
    yield one


@pytest.fixture(scope='session')
def until():
  """A function (condition) that waits until it holds."""

  def wait(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
      assert time.monotonic() < end, 'it does not happen'
      time.sleep(0.01)

  return wait
