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


def _write(path, experiment, recipe, config, metrics):
  row = Record(
    experiment=experiment,
    recipe=recipe,
    command='python -m experiments.SCRIPT',
    config=config,
    environment=ENVIRONMENT,
    seed=0,
    metrics={name: v if isinstance(v, Metric) else Metric(v, '1') for name, v in metrics.items()},
  )
  records.append(path, row)


def test_training_is_set_beside_torch(tmp_path):
  path = tmp_path / 'training.jsonl'
  config = {'preset': 'tiny-llama', 'batch_size': 4, 'seq_len': 32, 'rounds': 5}
  both = {'tokens_per_s': 2000.0, 'device_peak_bytes': 3e9, 'model_flops_utilization': 0.375}
  ratio = {'tokens_per_s / torch eager': Metric(1.25, '1', 5, 0.02)}
  _write(path, 'benchmark_training', 'full', config, both | ratio)
  peer = both | {'device_peak_bytes': 4e9}
  _write(path, 'benchmark_training peer', 'torch eager, full', config, peer)
  lines = study_tables.training(path).splitlines()
  row = '| tiny-llama, 4 x 32 | `full` | 2,000 | 37.5% | 1.25 ± 0.01 |  | 3.0 | 4.0 |  |'
  assert lines[2] == row and len(lines) == 5


def test_losses_of_fine_tuning_are_shown_along_the_way(tmp_path):
  path = tmp_path / 'finetune.jsonl'
  config = {'steps': 6, 'batch_size': 2, 'seq_len': 8, 'dtype': 'float32'}
  losses = {f'held_out_loss_after_{step}': 3 - step / 10 for step in (2, 4, 6)}
  metrics = {'held_out_loss_before': 3.0, 'trained_parameters': 2e6, **losses}
  adapter = {'rank': 8, 'targets': ['layers.*']}
  _write(path, 'finetune', 'full', config | {'adapter': None}, metrics)
  merged = {'held_out_loss_merged': 2.5}
  _write(path, 'finetune', 'lora', config | {'adapter': adapter}, metrics | merged)
  lines = study_tables.fine_tuning(path).splitlines()
  assert lines[0].startswith(
    '| method | rank | trained, M | before | after 2 | after 4 | after 6 |'
  )
  assert lines[2] == '| `full` |  | 2.00 | 3.0000 | 2.8000 | 2.6000 | 2.4000 |  |'
  assert (
    lines[3] == '| `lora`, `layers.*` | 8 | 2.00 | 3.0000 | 2.8000 | 2.6000 | 2.4000 | 2.5000 |'
  )
