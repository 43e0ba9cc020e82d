"""Tests reproduce_tables: its rows, its orders and the published numbers."""

import pytest

from experiments import common
from model.compress import recipe
from model.eval import records


@pytest.mark.slow
def test_rows_and_orders(script, tmp_path, capsys):
  out = tmp_path / 'tables.jsonl'
  script('--smoke', '--seeds=2', f'--output={out}', '--paper_model=llama-2-7b')
  rows = {row.recipe: row for row in records.read(out)}
  assert list(rows) == ['int3', 'gptq_int3']
  assert len(rows['int3'].config['draws_ppl']) == 1  # no calibration, so only one draw
  draws = rows['gptq_int3'].config['draws_ppl']
  assert len(draws) == 2 and draws[0] != draws[1]
  ppl = rows['gptq_int3'].metrics['ppl']
  assert ppl.value == pytest.approx(sum(draws) / 2)
  assert ppl.spread == pytest.approx(abs(draws[0] - draws[1]))
  text = capsys.readouterr().out
  assert 'published: 5.47' in text.splitlines()[0]
  assert 'gptq_int3 < int3' in text and 'gptq_int4' not in text


def test_every_recipe_of_the_tables_exists(script):
  tables, orders = script.module.TABLES, script.module.ORDERS
  names = {name for table in tables.values() for name in table.split()}
  for name in names:
    assert recipe.resolve(name, common.RECIPES).name == name
  assert {name for order in orders for name in order[:2]} <= names
  published = {key.split()[0] for rows in script.module.PUBLISHED.values() for key in rows}
  assert published - {'base'} <= names
