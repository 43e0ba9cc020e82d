"""Tests benchmark_ops: one record per format, with fractions of the memory bandwidth."""

import pytest

from model.eval import records, timing


def test_each_format_is_a_record(script, tmp_path, capsys):
  out = tmp_path / 'ops.jsonl'
  script('--smoke', f'--output={out}')
  rows = records.read(out)
  assert [row.recipe for row in rows] == ['int8', 'int4_g128']
  for row in rows:
    assert row.value('copy_bandwidth') > 0 and row.value('read_bandwidth') > 0
    assert row.value('xla of copy') > 0 and row.value('xla of read') > 0
  # 256 x 512 codes with a float32 scale per column, or two codes per byte and a scale per 128.
  assert [row.value('weight_bytes') for row in rows] == [131072 + 2048, 65536 + 2048]
  assert '256x512, 1 rows, int8' in capsys.readouterr().out


def test_fractions_of_the_bandwidth_are_computed_per_round(script, tmp_path, monkeypatch):
  # A machine whose speed is halved in every other round, for all calls alike.
  speeds = (1.0, 2.0, 1.0, 2.0, 1.0)

  def time(calls, **_):
    per_call = {'copy': 0.25, 'read': 0.5}
    samples = {name: tuple(per_call.get(name, 0.01) / s for s in speeds) for name in calls}
    return {
      name: timing.Timing(samples_s=own, speedups=(1.0,) * len(own))
      for name, own in samples.items()
    }

  monkeypatch.setattr(timing, 'time_interleaved', time)
  out = tmp_path / 'ops.jsonl'
  script('--smoke', f'--output={out}')
  for row in records.read(out):
    share = row.metrics['xla of copy']
    # --smoke reads and writes 4 MiB for the copy, and sums 4 MiB.
    assert share.value == pytest.approx(row.value('weight_bytes') / 0.01 / (2**23 / 0.25))
    assert share.spread == pytest.approx(0)
    assert row.value('xla of read') == pytest.approx(share.value * 4)
