"""What the main job prints."""

import dataclasses
import math
import sys

from experiments import terminal
from model.compress import recipe
from model.eval import columns, select
from model.eval.records import Metric, Record

COLUMNS = columns.of_terminal()
INT8 = recipe.Recipe(name='int8', steps=(), description='all in int8')
NAMES = ('base', 'int8', 'a_recipe_with_a_long_name')


def _record(name, **metrics):
  return Record(
    experiment='e', recipe=name, command='c', config={'seq_len': 8}, environment={}, seed=0,
    metrics={key: Metric(value, '1') for key, value in metrics.items()},
  )  # fmt: skip


ROWS = (
  _record('base', ppl=16.41, linear_bytes=1.5e6, decode_tokens_per_s=1234.5),
  _record('int8', ppl=16.5741, kl_to_base=0.00123, prefill_speedup=1.5),
  _record('a_recipe_with_a_long_name', ppl=123456.0),
)


def test_rows_appear_as_they_are_measured_in_the_columns_of_the_header(capsys):
  table = terminal.Table(NAMES[1:])
  table.header()
  _, second, line = capsys.readouterr().out.splitlines()
  assert second.split() == ['recipe', *' '.join(c.short[1] for c in COLUMNS).split()]
  shown = []
  for i, row in enumerate(ROWS):
    table.start(i, INT8)
    table.row(row)
    out, err = capsys.readouterr()
    assert err == f'[{i + 1}/2] int8: all in int8\n'  # no terminal here
    shown += out.splitlines()
  assert [row.split()[:3] for row in shown] == [
    ['base', '16.41', '+0.00%'],
    ['int8', '16.57', '+1.00%'],
    ['a_recipe_with_a_long_name', '1.23e+05', '×7,523'],
  ]
  ends = [second.index(c) + len(c) for c in ('perplexity', 'nats', 'bf16')]
  assert shown[1][: ends[1]].endswith(' 0.0012') and shown[0][: ends[0]].endswith(' 16.41')
  assert shown[2][: ends[0]].endswith(' 1.23e+05')
  assert len({len(x) for x in [second, *shown]}) == 1 and len(second) <= len(line) <= 120


def test_a_row_by_hand(capsys):
  numbers = {'linear_bytes_vs_bf16': 0.53, 'bits_per_weight': 8.48, 'widened_ppl_ratio': 1.0012}
  table = terminal.Table(['diverged'])
  table.row(ROWS[0])
  table.row(dataclasses.replace(_record('int8', ppl=16.5741, **numbers), without_kernel=3))
  table.row(_record('diverged', ppl=math.nan, ppl_ratio=math.inf))
  _, row, diverged = capsys.readouterr().out.splitlines()
  assert row.split() == [
    'int8',
    '16.57',
    '+1.00%',
    '–',
    '–',
    '–',
    '0.530',
    '8.48',
    '–',
    '–',
    '–',
    '–',
    'no',
    'kernel',
  ]
  assert diverged.split()[:3] == ['diverged', 'NaN', '∞'] and 'no kernel' not in diverged


def test_on_a_terminal_a_row_replaces_the_line_that_names_it(capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
  table = terminal.Table(NAMES)
  table.start(0, INT8)
  table.row(ROWS[0])
  assert capsys.readouterr().err == '[1/3] int8: all in int8\r\x1b[K'


def test_the_results_name_a_model_although_no_recipe_is_usable(tmp_path):
  row = _record('x', ppl=float('inf'))
  choice = select.choose([row], select.Budget(max_megabytes=1))
  text = terminal.results([row], choice, tmp_path)
  assert 'nothing to choose' in text
  assert f'--model={tmp_path}/models/x --text={tmp_path}/held_out.txt --seq_len=8' in text
