"""Tables of docs/measuring.md on tasks, from records of the main job and of `compare_lm_eval`."""

import pathlib

from experiments.speed_tables import link, machine
from model.eval import columns, records
from model.eval.records import BASE, Record

PAGE = 'docs/measuring.md'


def tasks(path: pathlib.Path) -> str:
  """The accuracies of one run of the main job, one recipe a line."""
  rows = records.read(path)
  names = list(rows[0].config['tasks'])
  lines = [
    f'| recipe | perplexity, vs base | {" | ".join(f"`{name}`, %" for name in names)} |',
    f'| --- |{" ---: |" * (1 + len(names))}',
    *(_task_line(row, names) for row in rows),
  ]
  lines.append(
    f'\nAccuracies ± standard errors, and in brackets their change against the base on the same '
    f'documents. `{rows[0].command}`; records: {link(path, PAGE)}.'
  )
  return '\n'.join(lines)


def _task_line(row: Record, names: list[str]) -> str:
  of = lambda kind, name: 100 * row.value(f'{kind}:{name}')
  cells = [f'`{row.recipe}`', '']
  if row.recipe != BASE:
    cells[1] = columns.change(row.value('ppl_ratio'))
  for name in names:
    cell = f'{of("accuracy", name):.1f} ± {of("accuracy_se", name):.1f}'
    if row.recipe != BASE:
      change, error = of('accuracy_change', name), of('accuracy_change_se', name)
      cell += f' ({change:+.1f} ± {error:.1f})'
    cells.append(cell)
  return f'| {" | ".join(cells)} |'


def lm_eval(path: pathlib.Path) -> str:
  """Log-likelihoods and times beside those of the harness' own class, one task a line."""
  rows = records.read(path)
  lines = [
    '| task | requests | ours from `hf` | ours from float64 | `hf` from float64 | equal greedy '
    'flags | seconds with compiling: ours | `hf` | later: ours | `hf` |',
    f'| --- |{" ---: |" * 9}',
    *(_lm_eval_line(row) for row in rows),
  ]
  about = rows[0]
  lines.append(
    f'\nLargest differences of a log-likelihood in nats. `{about.command}` on {machine(about)}, '
    f'lm_eval {about.config["lm_eval"]}; records: {link(path, PAGE)}.'
  )
  return '\n'.join(lines)


def _lm_eval_line(row: Record) -> str:
  cells = [
    f'`{row.recipe}`',
    f'{row.metrics["greedy_equal"].n}',
    *(f'{row.value(name):.1e}' for name in ('ours - hf', 'ours - float64', 'hf - float64')),
    f'{row.value("greedy_equal"):.0%}',
    *(f'{row.value(name):.1f}' for name in ('first_time', 'hf_first_time', 'time', 'hf_time')),
  ]
  return f'| {" | ".join(cells)} |'
