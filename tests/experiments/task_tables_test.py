"""Tables of tasks, of vocabularies, and of long contexts beside peers say what records say."""

import dataclasses

import pytest

from experiments import speed_tables, task_tables, vocabulary_tables
from model.eval import records
from model.eval.records import Metric, Record


@pytest.fixture
def write(tmp_path, monkeypatch):
  """A function (records) -> the path of their file."""
  monkeypatch.setattr(speed_tables, 'ROOT', tmp_path)

  def make(*rows):
    for row in rows:
      records.append(tmp_path / 'e.jsonl', row)
    return tmp_path / 'e.jsonl'

  return make


def _record(recipe, command='python -m experiments.x', config=None, n=4, **metrics):
  return Record(
    experiment='x',
    recipe=recipe,
    command=command,
    config=config or {},
    environment={'cpu': 'A CPU', 'cpu_cores': 2},
    seed=0,
    metrics={name: Metric(value, '1', n, 0.2) for name, value in metrics.items()},
  )


def test_accuracies_stand_beside_their_change(write):
  config = {'tasks': {'words': {}}}
  right = {'accuracy:words': 0.25, 'accuracy_se:words': 0.03}
  change = {'accuracy_change:words': -0.02, 'accuracy_change_se:words': 0.01, 'ppl_ratio': 1.05}
  rows = _record('base', config=config, **right), _record('int4', **right, **change)
  lines = task_tables.tasks(write(*rows)).splitlines()
  assert lines[0] == '| recipe | perplexity, vs base | `words`, % |'
  assert lines[2] == '| `base` |  | 25.0 ± 3.0 |'
  assert lines[3] == '| `int4` | +5.00% | 25.0 ± 3.0 (-2.0 ± 1.0) |'


def test_differences_of_log_likelihoods_and_times(write):
  names = ('ours - hf', 'ours - float64', 'hf - float64', 'greedy_equal')
  names += ('first_time', 'hf_first_time', 'time', 'hf_time')
  values = (5e-4, 1e-5, 4.9e-4, 1.0, 8.0, 5.0, 1.44, 5.06)
  row = _record('words', config={'lm_eval': '0.4'}, n=17, **dict(zip(names, values)))
  lines = task_tables.lm_eval(write(row)).splitlines()
  assert lines[2] == (
    '| `words` | 17 | 5.0e-04 | 1.0e-05 | 4.9e-04 | 100% | 8.0 | 5.0 | 1.4 | 5.1 |'
  )
  assert 'A CPU, 2 cores, lm_eval 0.4' in lines[-1]


def test_a_vocabulary_is_named_by_the_flags_that_made_it(write):
  command = 'python -m experiments.vocabulary --model=a --method=trim --whole --out=b --output=c'
  values = {'vocab_size_after': 13376, 'parameters_before': 200, 'parameters_after': 150}
  values |= {'bits_per_byte_before': 1.25, 'bits_per_byte_after': 1.5}
  values |= {'bytes_per_token_before': 4.0, 'bytes_per_token_after': 3.5}
  config = {'model': 'a', 'max_windows': 40, 'seq_len': 256}
  path = write(_record('trim', command, config, **values))
  lines = vocabulary_tables.vocabularies(path).splitlines()
  assert lines[2] == (
    '| `--method=trim --whole` | 13,376 | 25.0% | 1.250 | 1.500 | 4.000 | 3.500 |'
  )


def test_the_speeds_of_vocabularies(write):
  values = {'vocab_size': 13376, 'bytes_per_token': 3.9, 'tokens_per_s': 25.0}
  row = _record('out/trimmed', **values, text_bytes_per_s=98.0, token_speedup=1.17)
  lines = vocabulary_tables.fertility(write(row)).splitlines()
  assert lines[2] == '| `out/trimmed` | 13,376 | 3.900 | 25.0 ± 0.1 | 98 ± 0 | 1.17 ± 0.10 |'


def test_long_contexts_stand_beside_peers(write):
  own = _record('int8', config={'context': 2048}, prefill_tokens_per_s=376.0)
  config = {'context': 512, 'kv_cache': 'q8_0'}
  other = dataclasses.replace(
    _record('other q8_0', config=config, decode_tokens_per_s=6.0), experiment='long_context peer'
  )
  lines = speed_tables.beside_peers(write(own, other), 'docs/measuring.md').splitlines()
  assert lines[2:4] == [
    '| 512 | other q8_0, q8_0 |  | 6.0 ± 0.1 |',
    '| 2,048 | int8 | 376.0 ± 0.1 |  |',
  ]
