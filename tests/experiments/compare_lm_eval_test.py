"""Our class for lm-evaluation-harness is compared with its own one on the same requests."""

import importlib.util

import pytest

from model.eval import library_tasks, records

needs_harness = pytest.mark.skipif(
  importlib.util.find_spec('lm_eval') is None, reason='lm-evaluation-harness is not installed'
)


def test_missing_input_is_refused(script):
  with pytest.raises(ValueError, match='compare_lm_eval needs --model'):
    script()
  with pytest.raises(ValueError, match="there is no task 'python_word'"):
    script('--model=x', '--tasks=python_word')


@needs_harness
@pytest.mark.filterwarnings('default')  # what the harness and its datasets warn of
def test_both_classes_answer_the_same_requests(script, base, tmp_path, capsys):
  output = tmp_path / 'records.jsonl'
  few = ('--tasks=python_lines,python_words', '--documents=3', '--rounds=2')
  script(f'--model={base}', *few, f'--output={output}')
  lines, words = records.read(output)
  assert lines.config['task_fingerprint'] == library_tasks.load('python_lines', 3).fingerprint
  assert lines.metrics['greedy_equal'].n == 3 * library_tasks.CHOICES
  assert words.metrics['greedy_equal'].n == 3
  for row in (lines, words):
    assert row.value('greedy_equal') == 1
    assert 0 < row.value('ours - hf') < 1e-4
    assert 0 < row.value('ours - float64') < 1e-4
    assert row.value('hf_time / time') == row.value('hf_time') / row.value('time')
  assert capsys.readouterr().out.startswith('python_lines: largest difference ')
