"""Tests benchmark_attention: a record per length, beside the jnp form and torch's."""

import pytest

from model.eval import records, timing


def test_each_length_is_a_record(script, tmp_path, capsys):
  out = tmp_path / 'attention.jsonl'
  script('--smoke', f'--output={out}')
  rows = records.read(out)
  assert [row.config['length'] for row in rows] == [64, 130]
  for row in rows:
    assert row.value('speedup over torch') > 0 and row.value('speedup over blocked') > 0
  assert rows[0].value('growth') == 1
  assert '4x2x16, 130 tokens, float32: ' in capsys.readouterr().out


def test_ratios_are_those_of_the_same_round(script, tmp_path, monkeypatch):
  speeds = (1.0, 2.0, 1.0, 2.0, 1.0)  # of the machine, for all calls alike

  def time(calls, **_):
    seconds = {'auto 64': 0.1, 'auto 130': 0.26, 'torch 64': 0.4, 'torch 130': 0.13}
    of = lambda name: tuple(seconds[name] / speed for speed in speeds)
    return {name: timing.Timing(samples_s=of(name), speedups=(1.0,) * 5) for name in calls}

  monkeypatch.setattr(timing, 'time_interleaved', time)
  out = tmp_path / 'attention.jsonl'
  script('--smoke', '--noblocked', f'--output={out}')
  rows = records.read(out)
  assert [row.value('speedup over torch') for row in rows] == pytest.approx([4, 0.5])
  assert rows[1].value('growth') == pytest.approx(2.6 * 64 / 130)
  assert rows[1].metrics['growth'].spread == pytest.approx(0)


@pytest.mark.slow
def test_a_window_is_not_asked_of_torch(script, tmp_path):
  out = tmp_path / 'attention.jsonl'
  script('--smoke', '--window=7', f'--output={out}')
  assert all('torch time' not in row.metrics for row in records.read(out))


@pytest.mark.parametrize(
  'flag, why', [('--heads=8x64', 'like 8x4x64'), ('--lengths=long', 'must be integers')]
)
def test_wrong_flags_are_named(script, flag, why):
  with pytest.raises(ValueError, match=why):
    script(flag)
