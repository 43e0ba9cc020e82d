"""The engine: each request gets what it gets alone, whatever else runs, comes and goes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from model import sharding
from model.config import ModelConfig
from model.infer import batch, programs
from model.infer.engine import BLOCK, Engine
from model.infer.generate import generate
from model.infer.request import Request
from model.infer.speculation import Speculation
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers import linear
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, linears
from ops import quantized, sparse
from ops.rope import RopeConfig
from ops.sampling import SamplingConfig

LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=4, kv_heads=2, head_width=16), ffn=FeedForwardConfig(width=64)
)
CONFIG = ModelConfig(
  family='llama',
  vocab_size=89,
  width=32,
  layers=(LAYER,) * 2,
  max_positions=256,
  rope=RopeConfig(),
  eos_ids=(2,),
)
CAPACITY = 160


def _two_of_four(w_IO):
  mask_IO = sparse.n_of_m_mask(abs(w_IO), 2, 4)
  return sparse.compress(w_IO, mask_IO, 2, 4).map_values(lambda v: quantized.quantize(v, 'int4'))


WEIGHTS = {
  'float32': lambda w_IO: w_IO,
  'int8': lambda w_IO: quantized.quantize(w_IO, 'int8'),
  '2:4+int4': _two_of_four,
}


def _model(weights='float32', config=CONFIG):
  model = Transformer(config, rngs=nnx.Rngs(0))
  for i, layer in enumerate(linears(model).values()):
    w_IO = 0.4 * jax.random.normal(jax.random.key(i), layer.weight.shape)
    layer.weight.set_value(WEIGHTS[weights](w_IO))
  return model


MODEL = _model()


def _engine(model=MODEL, **options):
  return Engine(model, **{'slots': 5, 'capacity': CAPACITY, 'part': 32, **options})


def _requests(count, seed=0):
  rng = np.random.default_rng(seed)
  tokens = lambda n: rng.integers(3, CONFIG.vocab_size, n).tolist()
  shared = tokens(2 * BLOCK + 5)
  for i in range(count):
    prompt = tokens(int(rng.integers(1, 60)))
    yield Request(
      prompt=(shared + prompt[:20]) if i % 4 == 0 else prompt,
      max_new_tokens=int(rng.integers(1, 30)),
      sampling=SamplingConfig(
        temperature=float(rng.choice([0.0, 0.7, 1.3])),
        top_k=(None, 7)[i % 2],
        top_p=(None, 0.8, None)[i % 3],
        min_p=(None, None, None, None, 0.1)[i % 5],
        repetition_penalty=(1.0, 1.0, 1.2)[i % 3],
        presence_penalty=(0.0, 0.5)[i % 2],
        logit_bias=((5, 2.0), (6, -50.0)) if i % 7 == 0 else (),
      ),
      seed=int(rng.integers(0, 2**40)),
      ignore_eos=i % 6 == 0,
      priority=int(i % 9 == 0),
    )


def _at_random(engine, requests, rng):
  """Adds requests while others run, and cancels some: the tokens of those that ended."""
  left, found, ids, cancelled, ended = list(requests)[::-1], {}, {}, set(), set()
  while left or engine.busy:
    for _ in range(int(rng.integers(0, 3))):
      if left:
        request = left.pop()
        ids[engine.add(request)] = request
    running = [id for id in ids if id not in cancelled and id not in ended]
    if running and rng.random() < 0.05:
      gone = running[rng.integers(len(running))]
      cancelled.add(gone)
      engine.cancel(gone)
    for progress in engine.step():
      assert progress.request not in cancelled
      new = found.setdefault(progress.request, [])
      new.extend(progress.tokens)
      if progress.finish is not None:
        ended.add(progress.request)
  return [(request, found[id]) for id, request in ids.items() if id in ended], cancelled


@pytest.mark.parametrize(
  ('weights', 'cache', 'count'),
  [
    pytest.param('float32', 'float', 40, marks=pytest.mark.slow),
    ('2:4+int4', 'int8', 24),
    *(
      pytest.param(weights, cache, 500, marks=pytest.mark.slow)
      for weights in WEIGHTS
      for cache in ('float', 'int8')
    ),
  ],
)
def test_each_gets_what_it_gets_alone(weights, cache, count, rng):
  model = _model(weights)
  engine = _engine(model, cache_format=cache)
  alone = _engine(model, cache_format=cache, slots=1, prefix_bytes=0)
  ended, cancelled = _at_random(engine, _requests(count), rng)
  assert len(ended) + len(cancelled) == count
  assert len(cancelled) > 0 and engine.metrics.prefix_hits > 0
  for request, new in ended:
    assert new == alone.run([request])[0], request
  assert (engine.metrics.running, engine.metrics.waiting, engine.busy) == (0, 0, False)


def test_a_request_gets_what_generate_gives_it():
  requests = [dataclasses.replace(r, ignore_eos=False) for r in _requests(20)]
  requests = [r for r in requests if not r.sampling.remembers]
  assert len(requests) > 4
  for request, new in zip(requests, _engine().run(requests)):
    settings = {'sampling_config': request.sampling, 'max_new_tokens': request.max_new_tokens}
    if request.seed < 2**32:
      assert new == generate(MODEL, [request.prompt], seed=request.seed, **settings)[0]


PROGRAMS = (
  'read', 'score', 'choose', 'decode', 'draft', 'verify', 'admit', 'remember', 'rearrange', 'keep',
  'fetch',
)  # fmt: skip


@pytest.mark.parametrize('speculation', [None, Speculation(draft=MODEL, tokens=2, always=True)])
def test_nothing_is_compiled_once_it_is_warm(speculation):
  engine = _engine(slots=3, speculation=speculation)
  engine.warm()
  compiled = lambda: {name: getattr(programs, name)._cache_size() for name in PROGRAMS}
  before = compiled()
  scored = Request(prompt=[5] * 50, max_new_tokens=3, logprobs=1, prompt_logprobs=1)
  engine.run([*_requests(20), scored])
  assert compiled() == before


def test_a_shared_beginning_is_read_once():
  engine, shared = _engine(), list(range(3, 3 + 2 * BLOCK)) + [5, 6, 7]
  first = Request(prompt=[*shared, 11], max_new_tokens=3)
  engine.run([first])
  assert engine.metrics.prefix_hits == 0
  id = engine.add(Request(prompt=[*shared, 12, 13], max_new_tokens=3))
  (progress, *_) = engine.step()
  assert (progress.request, progress.cached_tokens) == (id, 2 * BLOCK)
  assert engine.metrics.prefix_hits == 2 * BLOCK


def test_the_next_turn_of_a_chat_finds_the_answer_too():
  engine = _engine()
  prompt = list(range(3, 3 + BLOCK))
  (answer,) = engine.run([Request(prompt=prompt, max_new_tokens=BLOCK + 1, ignore_eos=True)])
  turn = Request(prompt=[*prompt, *answer, 9, 9], max_new_tokens=4)
  id = engine.add(turn)
  assert next(p.cached_tokens for p in engine.step() if p.request == id) == 2 * BLOCK
  alone = _engine(prefix_bytes=0).run([turn])[0]
  assert _engine().run([turn])[0] == alone


def test_layers_without_beginnings_to_share_read_every_prompt():
  windowed = dataclasses.replace(LAYER.mixer, window=24)
  layers = (
    dataclasses.replace(LAYER, mixer=windowed),
    dataclasses.replace(LAYER, mixer=linear.retnet(2, 8, 16)),
  )
  model = _model(config=dataclasses.replace(CONFIG, layers=layers))
  engine, alone = _engine(model), _engine(model, slots=1)
  requests = list(_requests(5))
  for request, new in zip(requests, engine.run(requests)):
    assert new == alone.run([request])[0]
  assert engine.metrics.prefix_queries == 0


def test_a_request_of_higher_priority_takes_a_row_and_the_other_continues_as_alone():
  low = [
    Request(prompt=[3 + i] * 40, max_new_tokens=80, seed=i, ignore_eos=True,
            sampling=SamplingConfig(temperature=1.0, frequency_penalty=0.3))
    for i in range(2)
  ]  # fmt: skip
  high = Request(prompt=[9, 8, 7], max_new_tokens=5, priority=1, ignore_eos=True)
  engine, found = _engine(slots=2), {}
  ids = [engine.add(request) for request in low]
  for _ in range(6):
    for p in engine.step():
      found.setdefault(p.request, []).extend(p.tokens)
  ids.append(engine.add(high))
  order = []
  while engine.busy:
    for p in engine.step():
      found.setdefault(p.request, []).extend(p.tokens)
      if p.finish:
        order.append(p.request)
  assert engine.metrics.preemptions == 1
  assert order[0] == ids[2]
  for id, request in zip(ids, [*low, high]):
    assert found[id] == _engine(slots=1).run([request])[0]


def test_log_probabilities_are_those_of_the_model():
  prompt = list(range(3, 50))
  request = Request(prompt=prompt, max_new_tokens=4, logprobs=3, prompt_logprobs=2, ignore_eos=True)
  engine, tokens, logs, scores = _engine(), [], [], []
  engine.add(request)
  engine.add(Request(prompt=[7], max_new_tokens=9))
  while engine.busy:
    for p in engine.step():
      if p.request == 0:
        tokens, logs = [*tokens, *p.tokens], [*logs, *p.logprobs]
        scores += p.prompt_logprobs
  expected_TV = np.asarray(jax.nn.log_softmax(MODEL(np.asarray([prompt + tokens]))[0], -1))
  rows = [*scores, *logs]
  assert len(scores) == len(prompt) - 1 and len(logs) == 4
  for i, row in enumerate(rows):
    own_V = expected_TV[i]
    count = 2 if i < len(scores) else 3
    assert row.token == (prompt + tokens)[i + 1]
    np.testing.assert_allclose(row.logprob, own_V[row.token], atol=1e-4)
    best = np.argsort(-own_V)[:count]
    assert [token for token, _ in row.likeliest] == best.tolist()
    np.testing.assert_allclose([log for _, log in row.likeliest], own_V[best], atol=1e-4)


def test_a_prompt_alone_can_be_scored():
  engine = _engine()
  engine.add(Request(prompt=[5, 6, 7], max_new_tokens=0, prompt_logprobs=0))
  (progress,) = engine.step()
  assert (progress.finish, progress.tokens, len(progress.prompt_logprobs)) == ('length', (), 2)
  assert not engine.busy


class Alternating:
  """Allows even and odd tokens in turn, and nothing after `length` of them."""

  def __init__(self, length):
    self.length, self.taken = length, []

  def mask(self):
    bits = np.zeros(96, bool)
    if len(self.taken) < self.length:
      bits[np.arange(len(self.taken) % 2, 89, 2)] = True
    return np.packbits(bits, bitorder='little').view(np.uint32)

  def advance(self, token):
    self.taken.append(token)


def test_a_guide_decides_which_tokens_may_come():
  draw = SamplingConfig(temperature=1.0)
  guided = Request(
    prompt=[5], max_new_tokens=20, sampling=draw, guide=Alternating(7), ignore_eos=True
  )
  free = Request(prompt=[6, 7], max_new_tokens=20, sampling=draw, ignore_eos=True)
  new, other = _engine().run([guided, free])
  assert [token % 2 for token in new] == [0, 1, 0, 1, 0, 1, 0]
  assert other == _engine().run([free])[0]
  assert {token % 2 for token in other} == {0, 1}


def test_a_batch_that_half_empties_is_halved_a_little_later():
  engine = _engine(slots=4, burst=1)
  for new in (9, 9, 30, 30):
    engine.add(Request(prompt=(5, 6), max_new_tokens=new, ignore_eos=True))
  steps = []
  while engine.busy:
    engine.step()
    steps.append((len(engine._batch.running), engine._batch.width))
  assert (4, 4) in steps
  half = [width for running, width in steps[steps.index((4, 4)) :] if running == 2]
  assert half[: batch.PATIENCE] == [4] * batch.PATIENCE
  assert set(half[batch.PATIENCE :]) == {2}


def test_cancelled_requests_leave_nothing():
  engine = _engine(slots=2)
  ids = [engine.add(Request(prompt=[5] * 70, max_new_tokens=50, seed=i)) for i in range(4)]
  for _ in range(4):
    engine.step()
  for id in ids:
    engine.cancel(id)
    engine.cancel(id)
  assert not engine.busy
  assert engine.step() == []
  assert (engine.metrics.running, engine.metrics.waiting) == (0, 0)


@pytest.mark.parametrize(
  ('request_', 'message'),
  [
    (Request(prompt=[5], max_new_tokens=CAPACITY), '161 positions, but there are 160'),
    (Request(prompt=[89], max_new_tokens=1), 'token 89 is outside the vocabulary of 89'),
    (Request(prompt=[5], max_new_tokens=1, adapter='x'), "no adapter 'x'"),
    (
      Request(prompt=[5], max_new_tokens=1, sampling=SamplingConfig(logit_bias=((90, 1.0),))),
      'token 90 is outside',
    ),
  ],
)
def test_what_can_never_run_is_refused(request_, message):
  engine = _engine()
  with pytest.raises(ValueError, match=message):
    engine.add(request_)
  assert not engine.busy


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'prompt': [], 'max_new_tokens': 1}, 'at least one token'),
    ({'prompt': [1], 'max_new_tokens': 0}, 'at least 1, not 0'),
    ({'prompt': [1], 'max_new_tokens': 1, 'logprobs': 21}, 'within 0 and 20, not 21'),
    ({'prompt': [1], 'max_new_tokens': 1, 'seed': -1}, 'seed is within'),
  ],
)
def test_requests_that_make_no_sense_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Request(**fields)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'slots': 0}, 'slots must be at least 1'),
    ({'part': 48}, 'power of two'),
    ({'burst': 9}, 'within 1 and 8, not 9'),
  ],
)
def test_engines_that_make_no_sense_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    _engine(**options)


def test_eight_devices_give_what_one_gives():
  model = _model()
  sharding.shard(model, sharding.make_mesh(data=2, fsdp=2, model=2))
  requests = list(_requests(3))
  assert _engine(model).run(requests) == _engine().run(requests)
