"""A cascade: the small model's answer where it is sure, the large one's elsewhere."""

import dataclasses

import numpy as np
import pytest

from model.infer import cascade
from model.infer.cascade import Cascade
from model.infer.request import TokenLogprobs
from tests.model.infer.engine_test import _engine, _model, _requests

SMALL = _model('2:4+int4')


def _cascade(threshold, **options):
  return Cascade(_engine(SMALL), _engine(), threshold=threshold, **options)


def _run(engine, requests):
  ids = [engine.add(request) for request in requests]
  new, logs = {id: [] for id in ids}, {id: [] for id in ids}
  while engine.busy:
    for progress in engine.step():
      new[progress.request] += progress.tokens
      logs[progress.request] += progress.logprobs
  return [new[id] for id in ids], [logs[id] for id in ids]


@pytest.mark.parametrize('score', cascade.SCORES)
def test_doubt_decides_who_answers(score):
  requests = [dataclasses.replace(r, logprobs=2) for r in _requests(10)]
  small, logs = _run(_engine(SMALL), requests)
  large, _ = _run(_engine(), requests)
  sure = [cascade.SCORES[score](one) for one in logs]
  middle = sorted(sure)[5]
  both = _cascade(middle, score=score)
  found, _ = _run(both, requests)
  expected = [s if how >= middle else b for s, b, how in zip(small, large, sure)]
  assert found == expected
  assert both.deferred == sum(how < middle for how in sure) and both.answered == 10 - both.deferred
  assert small != large
  answers = both.small.metrics.generated_tokens + both.large.metrics.generated_tokens
  assert both.metrics.generated_tokens == answers > sum(map(len, found))
  assert _run(_cascade(np.inf), requests)[0] == large
  assert _run(_cascade(-np.inf), requests)[0] == small


def test_cancelled_requests_leave_both_engines():
  both = _cascade(np.inf)
  ids = [both.add(request) for request in _requests(4)]
  for _ in range(3):
    both.step()
  for id in ids:
    both.cancel(id)
  assert not both.busy and both.step() == []


def test_with_a_name_only_those_who_ask_for_it_are_answered_by_the_small_model():
  both = _cascade(-np.inf, name='x-cascade')
  request = next(_requests(1))
  named = dataclasses.replace(request, adapter='x-cascade')
  found, _ = _run(both, [request, named])
  assert found == [_engine().run([request])[0], _engine(SMALL).run([request])[0]]
  with pytest.raises(ValueError, match="no adapter 'y'"):
    both.add(dataclasses.replace(request, adapter='y'))


def test_scores_of_the_prompt_are_those_of_the_large_model():
  both = _cascade(-np.inf)
  request = dataclasses.replace(next(_requests(1)), prompt_logprobs=0)
  both.add(request)
  told = []
  while both.busy:
    told += both.step()
  assert both.answered == 0
  assert len(told[0].prompt_logprobs) == len(request.prompt) - 1
  tokens = [token for progress in told for token in progress.tokens]
  assert tokens == _engine().run([request])[0]


def _scores(*pairs):
  return [TokenLogprobs(5, a, ((5, a), (6, b))) for a, b in pairs]


def test_scores_of_an_answer():
  answer = _scores((-0.5, -2.0), (-1.5, -2.0))
  assert cascade.logprob(answer) == -1.0
  assert cascade.margin(answer) == 1.0
  assert cascade.logprob([]) == cascade.margin([]) == 0.0


def test_a_curve_by_hand():
  points = cascade.curve([0.9, 0.1, 0.5, 0.7], [1, 0, 0, 1], [1, 1, 0, 1], small_cost=0.25)
  rounded = [(p.deferred, p.quality, p.cost) for p in points]
  assert rounded == [
    (0.0, 0.5, 0.25), (0.25, 0.75, 0.5), (0.5, 0.75, 0.75), (0.75, 0.75, 1.0), (1.0, 0.75, 1.25),
  ]  # fmt: skip
  best = cascade.threshold(points, share=0.99)
  assert (best.threshold, best.cost) == (0.5, 0.5)
  assert cascade.threshold(points, share=0.5).cost == 0.25
  with pytest.raises(ValueError, match='1 scores'):
    cascade.curve([1.0], [1, 0], [1, 0])


def test_a_score_that_there_is_not_is_refused():
  with pytest.raises(ValueError, match='logprob, margin'):
    _cascade(0.0, score='luck')
