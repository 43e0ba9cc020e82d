"""Tables of docs/ from the records of the studies: what is claimed, and what was measured.

`update_readme` writes them. A number of several seeds is their mean, with half their range.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from experiments import (
  arms,
  study_adapters,
  study_attention,
  study_caches,
  study_compressed_experts,
  study_distillation,
  study_experts,
  study_int8,
  study_linearised,
  study_pruning,
  study_qat,
  study_upcycling,
)
from experiments.arms import Runs
from model.eval import records
from model.eval.records import Record

STUDIES = {
  module.STUDY.name: module.STUDY
  for module in (
    study_adapters,
    study_attention,
    study_caches,
    study_compressed_experts,
    study_distillation,
    study_experts,
    study_int8,
    study_linearised,
    study_pruning,
    study_qat,
    study_upcycling,
  )
}
OF_COMPRESSING = ('study_caches', 'study_linearised')  # the studies in docs/compressing.md
OF_TRAINING = tuple(name for name in STUDIES if name not in OF_COMPRESSING)
COLUMNS = {  # metric -> its heading and format
  'cross_entropy': ('loss, nats per token', '.4f'),
  'recall': ('recall', '.1%'),
  'recall_near': ('near', '.1%'),
  'recall_far': ('far', '.1%'),
  'cached': ('numbers kept', ',.0f'),
  'aware_far': ('question seen: far', '.0%'),
  'aware_near': ('near', '.0%'),
  'agnostic_far': ('not seen: far', '.0%'),
  'agnostic_near': ('near', '.0%'),
  'cache_bytes': ('bytes', ',.0f'),
  'train_loss': ('training loss', '.4f'),
  'recovered': ('came back', '.0%'),
  'parameters_kept': ('parameters', '.1%'),
  'max_violation': ('MaxVio', '.3f'),
  'dead_experts': ('dead experts', '.1f'),
  'experts_changed': ('tokens with other experts', '.1%'),
  'logit_difference': ('logits, vs base', '.1e'),
  'entropy': ('entropy', '.3f'),
  'forward_kl': ('KL(teacher, student)', '.4f'),
  'reverse_kl': ('KL(student, teacher)', '.4f'),
  'calibration_error': ('calibration error', '.4f'),
  'own_forward_kl': ('own texts: KL(teacher, student)', '.4f'),
  'own_reverse_kl': ('own texts: KL(student, teacher)', '.4f'),
  'learning_rate': ('rate', '.0e'),
}
STUDENTS = {  # arms of the essay's table
  'teacher': 'the teacher',
  'scratch': 'half of its layers, from scratch',
  'all': 'half of its layers, random, distilled',
  'layers_all': "half of its layers, the teacher's own, distilled",
}
HALF = 'layers_half'  # their shape in the records of `study_speed`


def study(path: pathlib.Path) -> str:
  """The claims of a study with the number of seeds in which they hold, and its arms."""
  rows = records.read(path)
  found = STUDIES[rows[0].experiment]
  seeds = list(arms.by_seed(rows))
  lines = ['| claim | as measured | holds in seeds |', '| --- | --- | ---: |']
  for one in arms.count(found.claims, seeds):
    text = one.claim.text.replace('_', r'\_')
    lines.append(f'| {one.claim.name} | {text} | {one.held} of {one.seeds} |')
  return '\n'.join([*lines, '', *_arms(list(found.arms), seeds), '', _about(rows)])


def _arms(names: Sequence[str], seeds: Sequence[Runs]) -> list[str]:
  """The arms at their best rates, with the metrics that any of them has."""
  values = {name: [arms.at_best(runs, name) for runs in seeds if name in runs] for name in names}
  values = {name: found for name, found in values.items() if found}
  trained = any(one['learning_rate'] for found in values.values() for one in found)
  used = [m for m in COLUMNS if any(m in found[0] for found in values.values())]
  used = used if trained else [metric for metric in used if metric != 'learning_rate']
  lines = [
    f'| arm | {" | ".join(COLUMNS[metric][0] for metric in used)} |',
    f'| --- |{" ---: |" * len(used)}',
  ]
  for name, found in values.items():
    cells = [_cell([v[m] for v in found if m in v], COLUMNS[m][1]) for m in used]
    lines.append(f'| `{name}` | {" | ".join(cells)} |')
  return lines


def essay(path: pathlib.Path, speed: pathlib.Path) -> str:
  """A teacher and students of half its layers: quality kept, parameters, speed."""
  rows = [row for row in records.read(path) if row.recipe in STUDENTS]
  seeds = list(arms.by_seed(rows))
  shapes = {row.recipe: row for row in records.read(speed)}
  bits = lambda runs, name: arms.at_best(runs, name)['bits_per_byte']
  lines = [
    '| model | bits per byte | quality kept | parameters, M | decode, vs teacher |',
    '| --- | ---: | ---: | ---: | ---: |',
  ]
  for name, words in STUDENTS.items():
    runs = [one for one in seeds if one.keys() >= {name, 'teacher'}]
    shape = shapes['teacher' if name == 'teacher' else HALF]
    kept = [bits(one, 'teacher') / bits(one, name) for one in runs]
    cells = [
      words,
      _cell([bits(one, name) for one in runs], '.3f'),
      _cell(kept, '.1%'),
      f'{shape.value("parameters") / 1e6:.2f}',
      _speed(shape),
    ]
    lines.append(f'| {" | ".join(cells)} |')
  machine = shape.environment
  lines.append(
    f'\nQuality kept: bits per byte of the teacher, divided by those of the model, on the same '
    f'held-out text. Decoding at batch 1 on {machine["cpu"]}, {machine["cpu_cores"]} cores, '
    f'medians ± half an interquartile range. {_about(rows)}'
  )
  return '\n'.join(lines)


def training(path: pathlib.Path) -> str:
  """The speed and the memory of training by each method, beside torch's."""
  rows = records.read(path)
  lines = [
    '| model | method | tokens/s | of the peak | vs torch, eager | vs torch, compiled | peak, GB '
    '| torch, eager | torch, compiled |',
    f'| --- | --- |{" ---: |" * 7}',
  ]
  peers = {(r.config['preset'], r.recipe): r for r in rows if r.experiment.endswith('peer')}
  for row in rows:
    if row.experiment.endswith('peer'):
      continue
    preset, held = row.config['preset'], 'device_peak_bytes'
    of_torch = [peers.get((preset, f'torch {m}, {row.recipe}')) for m in ('eager', 'compiled')]
    cells = [
      f'{preset}, {row.config["batch_size"]} x {row.config["seq_len"]}',
      f'`{row.recipe}`',
      f'{row.value("tokens_per_s"):,.0f}',
      f'{row.value("model_flops_utilization"):.1%}',
      *(_ratio(row, f'tokens_per_s / torch {mode}') for mode in ('eager', 'compiled')),
      *('' if one is None else f'{one.value(held) / 1e9:.1f}' for one in (row, *of_torch)),
    ]
    lines.append(f'| {" | ".join(cells)} |')
  about = rows[0]
  commands = ', '.join(f'`{command}`' for command in dict.fromkeys(row.command for row in rows))
  lines.append(
    f'\nUseful FLOPs of the peak of dense bfloat16 products by the data sheet; medians of '
    f'{about.config["rounds"]} interleaved rounds, ratios ± half an interquartile range. '
    f'{commands} on {about.environment["device"]}, jax {about.environment["versions"]["jax"]}.'
  )
  return '\n'.join(lines)


def _ratio(row: Record, name: str) -> str:
  metric = row.metrics.get(name)
  return '' if metric is None else f'{metric.value:.2f} ± {metric.spread / 2:.2f}'


def fine_tuning(path: pathlib.Path) -> str:
  """The held-out loss of fine-tuning by each method, before, on the way and at the end."""
  rows = records.read(path)
  name = 'held_out_loss_{}'.format
  steps = sorted(int(key.split('_')[-1]) for key in rows[0].metrics if name('after_') in key)
  every = max(1, len(steps) // 3)
  shown = steps[every - 1 :: every]
  lines = [
    f'| method | rank | trained, M | before | {" | ".join(f"after {s}" for s in shown)} | merged |',
    f'| --- |{" ---: |" * (4 + len(shown))}',
  ]
  for row in rows:
    adapter = row.config['adapter'] or {}
    where = ', '.join(f'`{target}`' for target in adapter.get('targets', ()))
    losses = [
      row.metrics.get(name(k)) for k in ('before', *(f'after_{s}' for s in shown), 'merged')
    ]
    cells = [
      f'`{row.recipe}`' + (f', {where}' if where else ''),
      f'{adapter.get("rank", "")}',
      f'{row.value("trained_parameters") / 1e6:.2f}',
      *('' if loss is None else f'{loss.value:.4f}' for loss in losses),
    ]
    lines.append(f'| {" | ".join(cells)} |')
  about = rows[0]
  lines.append(
    f'\nNats per token of held-out text before and after so many updates of '
    f'{about.config["batch_size"]} rows of {about.config["seq_len"]} tokens, in '
    f'{about.config["dtype"]}; `{about.command}` on {about.environment["device"]}.'
  )
  return '\n'.join(lines)


def healing(path: pathlib.Path) -> str:
  """The held-out loss of pruned models that are distilled from the original, on the way."""
  rows = records.read(path)
  about = rows[0]
  steps = about.config['steps']
  shown = [steps // 6, steps // 3, 2 * steps // 3, steps]
  lines = [
    '| student | parameters | the original | pruned '
    f'| {" | ".join(f"after {s}" for s in shown)} | came back |',
    f'| --- |{" ---: |" * (4 + len(shown))}',
  ]
  for row in rows:
    names = ('teacher', 'before', *(f'after_{s}' for s in shown))
    cells = [
      f'`{row.recipe}`',
      f'{row.value("parameters") / row.value("teacher_parameters"):.1%}',
      *(f'{row.value(f"held_out_loss_{name}"):.4f}' for name in names),
      f'{row.value("recovered"):.0%}',
    ]
    lines.append(f'| {" | ".join(cells)} |')
  lines.append(
    f'\nNats per token of held-out text after so many updates of {about.config["batch_size"]} rows '
    f'of {about.config["seq_len"]} tokens; `{about.command}` on {about.environment["device"]}.'
  )
  return '\n'.join(lines)


def _speed(shape: Record) -> str:
  speedup = shape.metrics['decode_speedup']
  return '' if shape.recipe == 'teacher' else f'{speedup.value:.2f} ± {speedup.spread / 2:.2f}'


def _cell(values: Sequence[float], digits: str) -> str:
  """The mean of the seeds ± half their range."""
  if not values:
    return ''
  mean, half = float(np.mean(values)), float(np.ptp(values)) / 2
  return f'{mean:{digits}} ± {half:{digits}}' if half else f'{mean:{digits}}'


def _about(rows: Sequence[Record]) -> str:
  seeds = len({row.seed for row in rows})
  where = sorted(
    {f'{row.environment["device"]}, jax {row.environment["versions"]["jax"]}' for row in rows}
  )
  command = rows[0].command
  others = ' and with the other arms' if len({row.command for row in rows}) > 1 else ''
  over = '1 seed' if seeds == 1 else f'{seeds} seeds, means ± half the range'
  return f'{over}; `{command}`{others} on {" and ".join(where)}.'
