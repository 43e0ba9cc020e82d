"""The shapes whose speed is measured: those that the studies train."""

import pytest

from model.eval import records


@pytest.mark.slow
def test_smaller_shapes_have_a_speed_beside_the_base(script, tmp_path):
  out = tmp_path / 'speed.jsonl'
  script('--smoke', f'--output={out}')
  rows = {row.recipe: row for row in records.read(out)}
  sizes = {name: row.value('parameters') for name, row in rows.items()}
  assert rows['teacher'].value('decode_speedup') == 1.0
  assert rows['layers_half'].config['layers'] == 2 and rows['layers_quarter'].config['layers'] == 3
  for size in ('quarter', 'half'):
    layers = sizes[f'layers_{size}']
    for kind in ('channels', 'width'):
      assert 0.95 * layers < sizes[f'{kind}_{size}'] <= layers
  assert all(row.value('decode_tokens_per_s') > 0 for row in rows.values())
