"""Tables in Markdown, by hand."""

import pytest

from model.eval import tables
from model.eval.records import Metric, Record


def _record(recipe, ppl, **more):
  metrics = {'ppl': Metric(ppl, '1'), **{name: Metric(v, '1') for name, v in more.items()}}
  return Record(
    experiment='e', recipe=recipe, command='c', config={}, environment={}, seed=0, metrics=metrics
  )


def test_cells_become_rows_with_numbers_on_the_right():
  table = tables.markdown(['name', 'n', 'm'], [['a', 1, 2.5], ['b', 3, 'x']])
  assert table == '| name | n | m |\n| --- | ---: | ---: |\n| a | 1 | 2.5 |\n| b | 3 | x |'
  with pytest.raises(ValueError, match='2 headings, but 1 cells'):
    tables.markdown(['name', 'n'], [['a']])


def test_records_have_the_columns_of_the_report():
  found = [_record('base', 20.0), _record('int8', 21.0, linear_bytes=1.5e6)]
  assert tables.of_records(found, ['ppl', 'ppl_ratio', 'linear_bytes']).splitlines() == [
    '| recipe | perplexity | perplexity vs base | size of linear layers, MB |',
    '| --- | ---: | ---: | ---: |',
    '| `base` | 20.00 | +0.00% | – |',
    '| `int8` | 21.00 | +5.00% | 1.50 |',
  ]
  with pytest.raises(ValueError, match='no column shows watts; there are ppl, '):
    tables.of_records(found, ['ppl', 'watts'])
