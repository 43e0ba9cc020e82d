"""benchmark_speculation and cascade: their smoke runs print and record what they say."""

import pytest
from absl import flags

from model.eval import records


@pytest.mark.slow
def test_a_smoke_run_records_each_draft(make_script, base, tmp_path, capsys):
  script = make_script('benchmark_speculation')
  output = tmp_path / 'r.jsonl'
  script('--smoke', '--always', '--tokens=2', '--prompt_tokens=32', f'--output={output}')
  flags.FLAGS.unparse_flags()
  shown = capsys.readouterr().out
  assert 'int4: 100% of the answers are those without a draft' in shown
  found = records.read(output)
  assert [one.recipe for one in found] == ['n-grams', 'int4']
  assert all(0 <= one.value('acceptance') <= 1 and one.value('speedup') > 0 for one in found)
  assert found[1].metrics['acceptance'].n >= 12


@pytest.mark.slow
def test_a_cascade_is_measured_and_drawn(make_script, base, tmp_path, capsys):
  script = make_script('cascade')
  output = tmp_path / 'r.jsonl'
  script('--smoke', '--prompt_tokens=24', f'--output={output}', f'--out={tmp_path}')
  flags.FLAGS.unparse_flags()
  assert 'deferred' in capsys.readouterr().out
  (found,) = records.read(output)
  assert 0 <= found.value('deferred') <= 1
  assert (tmp_path / 'cascade.png').stat().st_size > 5000
