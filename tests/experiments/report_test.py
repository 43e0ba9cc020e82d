"""report: statuses that CI can use, and errors in one line."""

import dataclasses
import subprocess
import sys

import pytest
from absl import flags

from model.eval import records
from model.eval.records import Metric, Record


def _record(ppl, spread=1.0, **config):
  return Record(
    experiment='compress', recipe='int8', command='c', seed=0, environment={'cpu': 'X'},
    config={'text': 'a', **config},
    metrics={
      'ppl': Metric(ppl, '1', 9), 'ppl_se': Metric(0.1, '1', 9),
      'decode_tokens_per_s': Metric(9.0, 'token/s', 7, spread),
    },
  )  # fmt: skip


@pytest.fixture
def report(make_script, tmp_path, monkeypatch):
  """A function (words) -> the exit status of the script, among runs with these names."""
  monkeypatch.chdir(tmp_path)
  for name, row in (
    ('old', _record(5.0)), ('same', _record(5.1)), ('worse', _record(6.0)),
    ('other', dataclasses.replace(_record(6.0, text='b'), environment={'cpu': 'Y'})),
  ):  # fmt: skip
    records.append(tmp_path / name / 'records.jsonl', row)
  script = make_script('report')

  def call(*words):
    options = [word for word in words if word.startswith('--')]
    flags.FLAGS.unparse_flags()
    flags.FLAGS(['report', *options])
    try:
      script.module.main([word for word in words if word not in options])
    except SystemExit as end:
      return end.code
    return 0

  yield call
  flags.FLAGS.unparse_flags()


def test_a_regression_ends_with_1_if_asked(report, tmp_path, capsys):
  assert report('old', 'worse', '--out=r') == 0
  out = capsys.readouterr().out
  assert 'worse: worse, int8: ppl 5 ± 0.1 -> 6 ± 0.1 (×1.2)' in out
  assert '1 worse than old beyond the noise, 0 better, of 2 judged' in out
  assert '`worse`' in (tmp_path / 'r' / 'runs.md').read_text()
  assert report('old', 'worse', '--out=r', '--fail_on_regression') == 1
  assert report('old', 'same', '--out=r', '--fail_on_regression') == 0
  assert report('worse', '--baseline=old', '--out=r', '--fail_on_regression') == 1
  assert report('old', 'worse', '--baseline=worse', '--out=r', '--fail_on_regression') == 0
  assert '0 worse than worse beyond the noise, 1 better' in capsys.readouterr().out


@pytest.mark.parametrize(
  'words, message',
  [
    ([], 'name at least one run'),
    (['odl'], 'there is no run odl; did you mean old'),
    (['old', '--fail_on_regression'], '--fail_on_regression needs two runs, or a --baseline'),
    (['old', 'other', '--fail_on_regression'], 'nothing could be judged'),
    (['old', '--baseline=none'], 'there is no run none'),
    (['old', '--out=old'], 'old'),
  ],
)
def test_bad_input_is_refused(report, words, message):
  with pytest.raises(ValueError, match=message):
    report(*words)


@pytest.mark.slow
def test_flags_may_follow_the_runs_and_errors_are_one_line(tmp_path):
  records.append(tmp_path / 'a.jsonl', _record(5.0))
  command = [sys.executable, '-m', 'experiments.report']
  good = subprocess.run([*command, tmp_path / 'a.jsonl', f'--out={tmp_path / "r"}'])
  assert good.returncode == 0 and (tmp_path / 'r' / 'runs.html').is_file()
  bad = subprocess.run([*command, tmp_path / 'b.jsonl'], capture_output=True, text=True)
  assert (bad.returncode, bad.stderr.count('\n')) == (2, 1)
  assert bad.stderr.startswith('error: there is no run ')
