"""The study on a tiny teacher: its records, what they say of the arms, and wrong flags."""

import pytest

from model.eval import records

ARMS = 'kd,kd_sampled,more_on_policy'


def test_each_arm_has_a_record_and_orders_are_counted(script, tmp_path, capsys):
  out = tmp_path / 'study.jsonl'
  script('--smoke', f'--arms={ARMS}', f'--output={out}')
  rows = {row.recipe: row for row in records.read(out)}
  # The arm that another one goes on from is trained too.
  assert set(rows) == {'layers_all', *ARMS.split(',')}
  for row in rows.values():
    assert 0 <= row.value('calibration_error') <= 1
    assert row.value('forward_kl') > 0 and row.value('own_reverse_kl') > 0
    # The cross entropy of a text is at least the entropy of what gave it, up to the models' error.
    assert 3 < row.value('cross_entropy') < 7
  # Two bytes for each of 50 ids, 8 for two sums, a digest a row.
  assert 108 < rows['kd_sampled'].value('bytes_per_token') < 110
  assert rows['layers_all'].value('forward_kl') < rows['kd'].value('forward_kl')
  printed = capsys.readouterr().out
  assert 'D5, within 0.5 %: cross_entropy, kd_sampled < kd: ' in printed
  assert 'D6' not in printed  # its arms were not asked for
  script('--smoke', '--arms=kd', f'--output={out}')  # finds its record
  assert len(records.read(out)) == 4
  assert 'D5, within 0.5 %' in capsys.readouterr().out


def test_unknown_arms_are_refused(script):
  with pytest.raises(ValueError, match=r"--arms has 'kdd', which is not one of scratch, all"):
    script('--smoke', '--arms=kdd')
