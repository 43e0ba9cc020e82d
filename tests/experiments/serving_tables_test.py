"""Tables of docs/serving.md: what stands in the records stands in the lines."""

import pytest

from experiments import serving_tables
from model.eval import records
from model.eval.records import Metric, Record

SERVER = (
  {'load': 'closed', 'amount': 32, 'prompt_tokens': 128, 'new_tokens': 64},
  {
    'output_tokens_per_s': Metric(150.4, 'token/s', 2, 4.0),
    'ttft_median_s': Metric(1.5, 's'),
    'ttft_p95_s': Metric(2.25, 's'),
    'tpot_median_s': Metric(0.2, 's'),
    'tpot_p95_s': Metric(0.3, 's'),
  },
)
DRAFT = (
  {'target': 'bf16', 'tokens': 4},
  {
    'speedup': Metric(1.25, '1', 5, 0.02),
    'tokens_per_s': Metric(50, 'tokens/s'),
    'tokens_per_s_without': Metric(40, 'tokens/s'),
    'acceptance': Metric(0.61, '1', 100),
  },
)
CASCADE = (
  {},
  {
    'small quality': Metric(0.2, '1'),
    'large quality': Metric(0.3, '1'),
    'cascade quality': Metric(0.298, '1'),
    'deferred': Metric(0.4, '1'),
    'speedup': Metric(1.4, '1', 3, 0.1),
  },
)


@pytest.mark.parametrize(
  ('table', 'made', 'line'),
  [
    (serving_tables.servers, SERVER, '| `x` | 32 clients | 150 ± 2 | 1,500 | 2,250 | 200 | 300 |'),
    (serving_tables.drafts, DRAFT, '| `bf16` | `x` | 4 | 61% | 40 | 50 | 1.25 ± 0.01 |'),
    (serving_tables.cascades, CASCADE, '| `x` | 20.0% | 30.0% | 40.0% | 29.8% | 1.40 ± 0.05 |'),
  ],
)
def test_a_line_for_each_record(tmp_path, monkeypatch, table, made, line):
  monkeypatch.setattr('experiments.speed_tables.ROOT', tmp_path)
  config, metrics = made
  record = Record(
    experiment='x',
    recipe='x',
    command='python -m experiments.x',
    config=config,
    environment={'cpu': 'A CPU', 'cpu_cores': 2},
    seed=0,
    metrics=metrics,
  )
  records.append(tmp_path / 'x.jsonl', record)
  lines = table(tmp_path / 'x.jsonl').split('\n')
  assert lines[2] == line
  assert lines[0].count('|') == lines[1].count('|') == lines[2].count('|')
  assert 'on A CPU, 2 cores' in lines[-1]
