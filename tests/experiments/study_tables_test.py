"""Tables of the studies from invented records."""

import pytest

from experiments import study_tables
from model.eval import records
from model.eval.records import Metric, Record

ENVIRONMENT = {'device': 'cpu', 'cpu': 'A CPU', 'cpu_cores': 2, 'versions': {'jax': '0.10'}}


@pytest.fixture
def write(tmp_path):
  """A function (experiment, rows of (arm, seed, rate, metrics)) -> the path of their records."""

  def make(experiment, rows):
    path = tmp_path / f'{experiment}.jsonl'
    for arm, seed, rate, values in rows:
      metrics = {name: v if isinstance(v, Metric) else Metric(v, '1') for name, v in values.items()}
      records.append(
        path,
        Record(
          experiment=experiment,
          recipe=arm,
          command=f'python -m experiments.{experiment}',
          config={'teacher_fingerprint': 'x', 'learning_rate': rate},
          environment=ENVIRONMENT,
          seed=seed,
          metrics=metrics,
        ),
      )
    return path

  return make


def test_claims_are_counted_and_arms_are_shown_at_their_best_rate(write):
  loss = lambda value: {'train_loss': value, 'cross_entropy': value}
  path = write(
    'study_int8',
    [
      ('float', 0, 1e-3, loss(3.0)),
      ('float', 0, 2e-3, loss(2.0)),
      ('float', 1, 2e-3, loss(2.2)),
      ('int8_all', 0, 2e-3, loss(2.02)),
      ('int8_all', 1, 2e-3, loss(2.4)),
    ],
  )
  lines = study_tables.study(path).splitlines()
  assert '| Q1 | cross\\_entropy, int8\\_all < 1.015 x float | 1 of 2 |' in lines
  assert not any('int8\\_inputs' in line for line in lines)
  assert '| `float` | 2.1000 ± 0.1000 | 2.1000 ± 0.1000 | 2e-03 |' in lines
  assert (
    lines[-1]
    == '2 seeds, means ± half the range; `python -m experiments.study_int8` on cpu, jax 0.10.'
  )


def test_students_are_set_beside_their_teacher(write):
  bits = lambda value: {'bits_per_byte': value, 'cross_entropy': value}
  rows = [('teacher', seed, 0.0, bits(1.5)) for seed in (0, 1)]
  rows += [('scratch', 0, 2e-3, bits(2.0)), ('scratch', 1, 2e-3, bits(3.0))]
  rows += [(arm, 0, 2e-3, bits(1.6)) for arm in ('all', 'layers_all')]
  speed = lambda n, ratio: {'parameters': n, 'decode_speedup': Metric(ratio, '1', 9, 0.2)}
  shapes = [('teacher', 0, 0, speed(2e6, 1.0)), ('layers_half', 0, 0, speed(1.2e6, 1.8))]
  text = study_tables.essay(write('study_distillation', rows), write('study_speed', shapes))
  lines = text.splitlines()
  assert lines[2] == '| the teacher | 1.500 | 100.0% | 2.00 |  |'
  # 1.5 / 2 and 1.5 / 3
  assert (
    '| half of its layers, from scratch | 2.500 ± 0.500 | 62.5% ± 12.5% | 1.20 | 1.80 ± 0.10 |'
    in lines
  )
  assert any("the teacher's own, distilled | 1.600 | 93.8% | 1.20" in line for line in lines)
