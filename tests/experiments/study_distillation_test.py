"""The study on a tiny teacher: its records, what they say of the arms, and wrong flags."""

import pytest

from model.eval import records


def test_each_arm_has_a_record_and_orders_are_counted(script, tmp_path, capsys):
  out = tmp_path / 'study.jsonl'
  script('--smoke', '--arms=kd,kd_sampled', f'--output={out}')
  rows = {row.recipe: row for row in records.read(out)}
  assert set(rows) == {'kd', 'kd_sampled'}
  for row in rows.values():
    assert 0 <= row.value('calibration_error') <= 1
    assert row.value('forward_kl') > 0 and row.value('own_reverse_kl') > 0
    assert 3 < row.value('cross_entropy') < 7  # of 512 tokens, a few updates away from chance
  # Two bytes for each of 50 ids, 8 for two sums, a digest a row.
  assert 108 < rows['kd_sampled'].value('bytes_per_token') < 110
  printed = capsys.readouterr().out
  assert 'D5, within 0.5 %: cross_entropy, kd_sampled < kd: ' in printed
  assert 'D6' not in printed  # its arms were not asked for
  script('--smoke', '--arms=kd', f'--output={out}')  # finds its record
  assert len(records.read(out)) == 2
  assert 'D5, within 0.5 %' in capsys.readouterr().out


@pytest.mark.slow
def test_an_arm_that_goes_on_trains_the_one_before_it_and_writes(script, tmp_path):
  out = tmp_path / 'study.jsonl'
  script('--smoke', '--arms=more_on_policy', f'--output={out}')
  first, second = records.read(out)
  assert (first.recipe, second.recipe) == ('layers_all', 'more_on_policy')
  assert second.config['written'] == 1.0
  assert second.value('own_forward_kl') < first.value('own_forward_kl')


def test_unknown_arms_are_refused(script):
  with pytest.raises(ValueError, match=r"--arms has 'kdd', which is not one of scratch, all"):
    script('--smoke', '--arms=kdd')
