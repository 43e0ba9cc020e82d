"""Speculation: the same tokens as without, drawn as the model says, and only where it pays."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.infer.engine import Engine
from model.infer.request import Request
from model.infer.speculation import AGAIN, ROUNDS, Governor, Speculation, propose
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers import linear
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, linears
from ops import quantized
from ops.rope import RopeConfig
from ops.sampling import SamplingConfig

LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=16), ffn=FeedForwardConfig(width=48)
)
WINDOW = dataclasses.replace(LAYER, mixer=dataclasses.replace(LAYER.mixer, window=20))
CONFIG = ModelConfig(
  family='llama', vocab_size=67, width=32, layers=(LAYER,) * 2, max_positions=256,
  rope=RopeConfig(), eos_ids=(2,),
)  # fmt: skip


def _model(format=None, config=CONFIG):
  model = Transformer(config, rngs=nnx.Rngs(0))
  for i, layer in enumerate(linears(model).values()):
    w_IO = 0.5 * jax.random.normal(jax.random.key(i), layer.weight.shape)
    layer.weight.set_value(w_IO if format is None else quantized.quantize(w_IO, format))
  return model


MODEL = _model()


def _engine(model=MODEL, **options):
  return Engine(model, **{'slots': 4, 'capacity': 128, 'part': 32, **options})


def _requests():
  rng = np.random.default_rng(3)
  for i in range(8):
    prompt = rng.integers(3, 67, int(rng.integers(1, 40))).tolist()
    yield Request(
      prompt=prompt * (1 + i % 2),
      max_new_tokens=int(rng.integers(1, 40)),
      sampling=SamplingConfig(
        temperature=(0.0, 0.0, 0.8)[i % 3],
        top_p=(None, 0.9)[i % 2],
        repetition_penalty=(1.0, 1.1)[i % 2],
        frequency_penalty=(0.0, 0.2)[i % 2],
      ),
      seed=i,
      logprobs=2 if i == 5 else None,
    )


WAYS = {
  'n-grams': lambda: Speculation(tokens=3, always=True),
  'its int4 form': lambda: Speculation(draft=_model('int4'), tokens=3, always=True),
}


@pytest.mark.parametrize(
  ('way', 'layers'), [('n-grams', (LAYER, WINDOW)), ('its int4 form', (LAYER,) * 2)]
)
def test_tokens_are_those_without(way, layers):
  model = _model(config=dataclasses.replace(CONFIG, layers=layers))
  engine, plain = _engine(model, slots=2, speculation=WAYS[way]()), _engine(model, slots=2)
  assert engine.run(list(_requests())) == plain.run(list(_requests()))
  assert 0 < engine.metrics.accepted < engine.metrics.drafted


def test_a_draft_that_is_the_model_is_always_right():
  engine = _engine(speculation=Speculation(draft=_model(), tokens=3, always=True), slots=1)
  request = Request(
    prompt=[5, 6, 7], max_new_tokens=41, sampling=SamplingConfig(temperature=1.0), ignore_eos=True
  )
  engine.run([request])
  assert engine.metrics.accepted == engine.metrics.drafted == 30  # and 10 tokens after them


def test_guides_and_beginnings_work_with_a_draft():
  spec = Speculation(draft=_model('int4'), tokens=3, always=True)
  engine = _engine(speculation=spec)
  request = Request(prompt=list(range(3, 60)), max_new_tokens=20, ignore_eos=True)
  first, second = engine.run([request]), engine.run([request])
  assert first == second == _engine().run([request])
  assert engine.metrics.prefix_hits > 0


@pytest.mark.slow
def test_what_is_drawn_has_the_distribution_of_the_model():
  spec = Speculation(draft=_model('int4'), tokens=2, always=True)
  engine = _engine(speculation=spec, slots=16)
  prompt, draws = [5, 6, 7], 1200
  sampling = SamplingConfig(temperature=0.7)
  requests = [
    Request(prompt=prompt, max_new_tokens=2, sampling=sampling, seed=i, ignore_eos=True)
    for i in range(draws)
  ]
  # The second token is the first one that was verified.
  counts = collections.Counter(new[1] for new in engine.run(requests))
  first_V = np.asarray(jax.nn.softmax(MODEL(np.asarray([prompt]))[0, -1] / 0.7))
  pairs = np.asarray([[*prompt, v] for v in range(67)])
  second_VV = np.asarray(jax.nn.softmax(MODEL(pairs)[:, -1] / 0.7, -1))
  expected_V = draws * first_V @ second_VV
  likely = expected_V > 5
  observed_V = np.asarray([counts[v] for v in range(67)])
  pooled = lambda a: np.append(a[likely], a[~likely].sum())
  chi_square = ((pooled(observed_V) - pooled(expected_V)) ** 2 / pooled(expected_V)).sum()
  freedom = int(likely.sum())
  assert freedom > 8
  assert chi_square < freedom + 4 * (2 * freedom) ** 0.5
  assert 0 < engine.metrics.accepted < engine.metrics.drafted


def test_n_grams_propose_what_came_after_their_last_occurrence():
  text = [1, 2, 3, 4, 9, 2, 3, 5, 6, 2, 3]
  assert propose(text, 2, longest=2) == [5, 6]
  assert propose(text, 9, longest=3) == [5, 6, 2, 3]
  assert propose([1, 2, 3, 4, 9, 2, 3], 2, longest=3) == [4, 9]
  assert propose([7, 1, 7], 4, longest=1) == [1, 7]
  assert propose([1, 2, 3], 4) == propose([1], 4) == []


def _rounds(governor, seconds, count, width=1, **options):
  """Rounds in which speculating gives three tokens and the other way one: how many speculated."""
  chosen = []
  for _ in range(count):
    chosen.append(governor.wants(width, **options))
    governor.took(width, chosen[-1], seconds[chosen[-1]], 3 if chosen[-1] else 1)
  return sum(chosen)


def test_the_governor_takes_the_faster_way_and_tries_the_other_now_and_then():
  governor, count = Governor(), 10 * AGAIN
  assert count - _rounds(governor, {True: 2.0, False: 1.0}, count) < ROUNDS + 1 + 10
  # It becomes slower, and faster again.
  assert _rounds(governor, {True: 4.0, False: 1.0}, count) < 5 * AGAIN
  assert _rounds(governor, {True: 4.0, False: 1.0}, count) <= 12
  _rounds(governor, {True: 1.5, False: 1.0}, 12 * AGAIN)
  assert count - _rounds(governor, {True: 1.5, False: 1.0}, count) <= 12


def test_a_wider_batch_is_judged_by_itself():
  governor = Governor()
  _rounds(governor, {True: 1.0, False: 1.0}, 50)
  _rounds(governor, {True: 9.0, False: 1.0}, 50, width=8)
  assert governor.wants(1) and not governor.wants(8)


def test_where_speculation_loses_it_ends_and_the_tokens_stay(monkeypatch):
  engine = _engine(speculation=Speculation(draft=_model('int4'), tokens=3), slots=1)
  took = Governor.took
  slow = lambda self, width, spec, _, tokens: took(self, width, spec, 9.0 if spec else 1.0, tokens)
  monkeypatch.setattr(Governor, 'took', slow)
  requests = [Request(prompt=[5, i], max_new_tokens=60, ignore_eos=True) for i in range(6, 12)]
  assert engine.run(requests) == _engine(slots=1).run(requests)
  assert engine.metrics.drafted <= 3 * 3 * (ROUNDS + 1)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Speculation(tokens=8), '1 to 7 tokens, not 8'),
    (lambda: Speculation(longest=0), 'at least one token'),
    (
      lambda: _engine(
        speculation=Speculation(draft=_model(config=dataclasses.replace(CONFIG, vocab_size=66)))
      ),
      'the draft has 66 tokens, but the model 67',
    ),
    (
      lambda: _engine(
        _model(
          config=dataclasses.replace(
            CONFIG, layers=(dataclasses.replace(LAYER, mixer=linear.retnet(2, 8, 16)),)
          )
        ),
        speculation=Speculation(),
      ),
      'cannot',
    ),
    (lambda: _engine(cache_format='int4', speculation=Speculation()), 'cannot'),
  ],
)
def test_what_cannot_work_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
