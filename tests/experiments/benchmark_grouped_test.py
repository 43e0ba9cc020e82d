"""Tests benchmark_grouped: a record per format, beside ragged_dot, with the bytes touched."""

import numpy as np
import pytest

from model.eval import records


def test_each_format_is_a_record(script, tmp_path, capsys):
  out = tmp_path / 'grouped.jsonl'
  script('--smoke', f'--output={out}')
  rows = records.read(out)
  assert [row.recipe for row in rows] == ['float32', 'int4']
  for row in rows:
    assert row.value('ragged_dot time') > 0 and row.value('dense time') > 0
    assert row.value('blocks speedup') > 0 and row.value('touched_bytes') > 0
  assert rows[0].value('gradients speedup') > 0
  # 4 experts of 128 x 64 numbers, or of two codes per byte with a float32 scale per column.
  assert [row.value('weight_bytes') for row in rows] == [4 * 32768, 4 * (4096 + 256)]
  assert '4 experts 128x64, 32 rows, uniform, int4' in capsys.readouterr().out


def test_groups_have_all_rows(script):
  rng = np.random.default_rng(0)
  for draw in script.module.GROUPS.values():
    for rows, experts in ((5, 8), (2048, 16)):
      sizes_E = draw(rng, rows, experts)
      assert sizes_E.shape == (experts,) and sizes_E.sum() == rows and (sizes_E >= 0).all()


@pytest.mark.parametrize(
  'flag, why', [('--groups=odd', "'odd'"), ('--shapes=16x256', 'like 16x256x512')]
)
def test_wrong_flags_are_named(script, flag, why):
  with pytest.raises(ValueError, match=why):
    script(flag)
