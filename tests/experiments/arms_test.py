"""Claims on invented runs, and a study that trains nothing: what is recorded, found and counted."""

import dataclasses
import math

import pytest
from absl import flags

from experiments import arms
from experiments.arms import Arm, Claim, Options, at_least, ratio, rises
from model.eval import records
from model.eval.records import Metric

ALL = ('a', 'b', 'c')


def _runs(**losses):
  return {arm: {0.1: {'cross_entropy': loss}} for arm, loss in losses.items()}


@pytest.mark.parametrize(
  'losses, slack, held',
  [
    ({'a': 1.0, 'b': 2.0, 'c': 3.0}, 1.0, True),
    ({'a': 1.0, 'b': 3.0, 'c': 2.0}, 1.0, False),
    ({'a': 1.0, 'b': 1.0, 'c': 2.0}, 1.0, False),  # equal is not lower
    ({'a': 1.004, 'b': 1.0, 'c': 1.0}, 1.005, True),
    ({'a': 1.006, 'b': 1.0, 'c': 1.0}, 1.005, False),
    ({'a': math.nan, 'b': 1.0, 'c': 2.0}, 1.0, False),
  ],
)
def test_a_metric_rises_from_arm_to_arm(losses, slack, held):
  assert rises('X', 'cross_entropy', ALL, slack).holds(_runs(**losses)) == held


def test_an_arm_counts_at_its_best_rate():
  sweep = {
    'lora': {1e-3: {'cross_entropy': 3.0, 'x': 1.0}, 1e-2: {'cross_entropy': 2.0, 'x': 5.0}},
    'full': {1e-3: {'cross_entropy': 2.1, 'x': 4.0}, 1e-2: {'cross_entropy': 9.0, 'x': 0.0}},
  }
  assert arms.at_best(sweep, 'lora') == {'cross_entropy': 2.0, 'x': 5.0, 'learning_rate': 1e-2}
  assert rises('X', 'x', ('full', 'lora')).holds(sweep)
  within = lambda low, high: ratio('L4', 'learning_rate', ('lora', 'full'), low, high)
  assert within(4, 30).holds(sweep)
  assert not within(11, 30).holds(sweep) and not within(4, 9).holds(sweep)
  assert at_least('P1', 'x', 'full', 4.0).holds(sweep)
  assert not at_least('P1', 'x', 'full', 4.1).holds(sweep)


def test_claims_are_counted_over_the_seeds_that_have_their_arms():
  claims = [rises('X', 'cross_entropy', ('a', 'b')), rises('Y', 'cross_entropy', ('a', 'd'))]
  seeds = [_runs(a=1.0, b=2.0), _runs(a=2.0, b=1.0), _runs(a=1.0, b=2.0), _runs(a=1.0)]
  (counted,) = arms.count(claims, seeds)  # no seed has d
  assert (counted.held, counted.seeds) == (2, 3)
  assert str(counted) == 'X: cross_entropy, a < b: held 2 of 3 seeds'


@dataclasses.dataclass(frozen=True)
class _Setting:
  about: dict


class _Trainer:
  """Trains nothing: the loss of an arm is its distance from the rate 0.2, plus the seed."""

  def __init__(self):
    self.trained = []

  def train(self, setting, arm, seed, rate, before):
    self.trained.append((seed, rate))
    start = before(arm.start) if arm.start else 0.0
    loss = start + abs(rate - 0.2) + seed
    return loss, {'cross_entropy': Metric(loss, 'nat/token')}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Arm(Arm):
  start: str | None = None


@pytest.fixture
def trainer():
  return _Trainer()


@pytest.fixture
def study(trainer):
  return arms.Study(
    name='study_test',
    arms={
      'first': _Arm(learning_rates=(0.1, 0.25)),
      'untrained': _Arm(start='first'),
    },
    claims=(rises('X', 'cross_entropy', ('first', 'untrained')),),
    smoke=('first',),
    prepare=lambda options: _Setting({'steps': options.steps, arms.TEACHER: 'abc'}),
    train=trainer.train,
  )


def test_records_that_are_there_count_and_are_not_made_again(study, trainer, tmp_path, capsys):
  out = tmp_path / 'study.jsonl'
  options = Options(seeds=2, output=str(out), steps=3)
  arms.run(study, dataclasses.replace(options, arms=('untrained',), seeds=1))
  assert trainer.trained == [(0, 0.0), (0, 0.1)]  # what it starts from, at its first rate
  assert {row.recipe for row in records.read(out)} == {'first', 'untrained'}
  assert 'X: cross_entropy, first < untrained: held 1 of 1 seeds' in capsys.readouterr().out
  trainer.trained.clear()
  arms.run(study, options)
  assert trainer.trained == [(0, 0.25), (1, 0.1), (1, 0.25), (1, 0.0)]
  printed = capsys.readouterr().out
  assert 'first < untrained: held 2 of 2 seeds' in printed
  assert len(records.read(out)) == 6
  trainer.trained.clear()
  arms.run(study, dataclasses.replace(options, steps=4))  # another study
  assert len(trainer.trained) == 6
  assert 'held 2 of 2 seeds' in capsys.readouterr().out
  rows = records.read(out)
  row = next(row for row in rows if row.recipe == 'untrained')
  assert (row.config['start'], row.config['learning_rate']) == ('first', 0.0)
  assert {row.config['steps'] for row in rows} == {3, 4}


def test_rates_are_replaced_for_arms_that_train(study, trainer):
  arms.run(study, Options(learning_rates=(0.5, 0.6), seeds=1))
  assert trainer.trained == [(0, 0.5), (0, 0.6), (0, 0.0)]


def test_smoke_is_few_arms_at_one_rate_and_one_seed(study, trainer):
  arms.run(study, Options(smoke=True))
  assert trainer.trained == [(0, 0.1)]


def test_unknown_arms_are_refused_before_any_work(study, trainer):
  with pytest.raises(ValueError, match=r"--arms has 'frist', which is not one of first, untrained"):
    arms.run(study, Options(arms=('frist',)))
  assert not trainer.trained


def test_other_teachers_make_other_runs():
  row = records.Record(
    experiment='x',
    recipe='a',
    command='',
    config={arms.TEACHER: 't', 'learning_rate': 0.1},
    environment={},
    seed=0,
    metrics={'cross_entropy': Metric(1.0, 'nat')},
  )
  other = dataclasses.replace(row, recipe='b', config={arms.TEACHER: 'u', 'learning_rate': 0.1})
  assert [set(runs) for runs in arms.by_seed([row, other])] == [{'a'}, {'b'}]


def test_flags_become_options():
  values = flags.FlagValues()
  holders = arms.define(values)
  values(['study', '--arms=a,b', '--learning_rates=1e-3,0.2', '--first_seed=2', '--smoke'])
  assert arms.options(holders) == Options(
    arms=('a', 'b'), learning_rates=(1e-3, 0.2), first_seed=2, smoke=True
  )
  values.unparse_flags()
  values(['study'])
  assert arms.options(holders) == Options()


def test_a_claim_may_be_any_function_of_the_runs():
  gap = Claim('L3', 'b - a > 1', ('a', 'b'), lambda runs: runs['b'][0.1]['cross_entropy'] > 2.0)
  assert arms.count([gap], [_runs(a=1.0, b=2.5), _runs(a=1.0, b=1.5)])[0].held == 1
