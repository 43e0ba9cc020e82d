"""The choice and the front, against brute force and by hand."""

import math

import pytest

from model.eval import select
from model.eval.records import Metric, Record
from model.eval.select import Budget


def _record(recipe, megabytes=None, ppl=None, **more):
  metrics = {name: Metric(value, '1') for name, value in more.items()}
  if megabytes is not None:
    metrics['stored_bytes'] = Metric(megabytes * 1e6, 'byte')
  if ppl is not None:
    metrics['ppl'] = Metric(ppl, '1')
  return Record(
    experiment='e', recipe=recipe, command='c', config={}, environment={}, seed=0, metrics=metrics
  )


RECORDS = [
  _record('base', 40, 10.0),
  _record('int8', 10, 10.1),
  _record('int4', 5, 11.0),
  _record('int4-bad', 5, 14.0),
  _record('int2', 3, 30.0),
  _record('broken', 1, math.nan),
  _record('unmeasured', 1),
]


@pytest.mark.parametrize(
  ('budget', 'recipe'),
  [
    (Budget(max_megabytes=12), 'int8'),
    (Budget(max_megabytes=100), 'int8'),
    (Budget(max_megabytes=9.99), 'int4'),
    (Budget(max_megabytes=5), 'int4'),
    (Budget(max_megabytes=3), 'int2'),
    (Budget(max_ppl_ratio=1.02), 'int8'),
    (Budget(max_ppl_ratio=1.1), 'int4'),
    (Budget(max_ppl_ratio=5), 'int2'),
  ],
)
def test_the_best_within_the_budget(budget, recipe):
  choice = select.choose(RECORDS, budget)
  assert choice.record.recipe == recipe and choice.nearest is choice.record
  assert choice.reason.startswith(f'{recipe} ')


def test_a_budget_of_quality_counts_the_program_that_is_timed():
  rounded = _record('rounded', 2, 11.5, ppl_ratio=1.15, widened_ppl_ratio=1.01)
  records = [*RECORDS, rounded]
  assert select.choose(records, Budget(max_ppl_ratio=1.1)).record.recipe == 'int4'
  assert select.choose(records, Budget(max_ppl_ratio=1.15)).record is rounded


def test_the_reason_gives_the_numbers_in_one_sentence():
  reason = select.choose(RECORDS, Budget(max_megabytes=9)).reason
  assert reason == (
    'int4 has the lowest perplexity of the 3 recipes in 9 MB: 5 MB (12% of the base) at '
    'perplexity 11 (+10.0%).'
  )


@pytest.mark.parametrize(
  ('budget', 'nearest', 'number'),
  [(Budget(max_megabytes=2), 'int2', '3 MB'), (Budget(max_ppl_ratio=1.001), 'int8', '+1.0%')],
)
def test_what_comes_nearest_where_nothing_fits(budget, nearest, number):
  choice = select.choose(RECORDS, budget)
  assert choice.record is None and choice.nearest.recipe == nearest
  assert nearest in choice.reason and number in choice.reason and 'No recipe' in choice.reason


def test_nothing_to_choose_from():
  choice = select.choose([RECORDS[0], *RECORDS[-2:]], Budget(max_megabytes=9))
  assert choice.record is None and choice.nearest is None and 'nothing to choose' in choice.reason
  choice = select.choose(RECORDS[1:], Budget(max_ppl_ratio=2))
  assert choice.record is None and 'perplexity of the base is not known' in choice.reason


@pytest.mark.parametrize(
  'limits',
  [{}, {'max_megabytes': 1, 'max_ppl_ratio': 1}, {'max_megabytes': 0}, {'max_ppl_ratio': math.nan}],
)
def test_bad_budgets(limits):
  with pytest.raises(ValueError, match='budget'):
    Budget(**limits)


def test_the_ratio_as_measured_goes_before_the_ratio_computed():
  base, other = RECORDS[0], _record('a', 1, 20.0)
  measured = _record('b', 1, 20.0, ppl_ratio=1.9)
  assert select.ppl_ratio(other, [base, other]) == 2.0
  assert select.ppl_ratio(measured, [base, measured]) == 1.9
  assert select.ppl_ratio(other, [other]) is None


def test_the_front_by_brute_force(rng):
  records = [_record(f'r{i}', *pair) for i, pair in enumerate(rng.integers(1, 9, (40, 2)).tolist())]
  both = lambda r: (r.value('stored_bytes'), r.value('ppl'))
  beaten = lambda r: any(
    a <= both(r)[0] and b <= both(r)[1] and (a, b) != both(r) for a, b in map(both, records)
  )
  front = select.pareto_front(records)
  assert [both(r) for r in front] == sorted({both(r) for r in records if not beaten(r)})


def test_the_front_leaves_out_what_was_not_measured():
  front = select.pareto_front(RECORDS)
  assert [r.recipe for r in front] == ['int2', 'int4', 'int8', 'base']
  assert select.pareto_front(RECORDS, 'nothing') == []
