r"""Compares several runs, and names what became worse: in Markdown, CSV, a page and a picture.

  python -m experiments.report out/old out/new --out=out/report
  python -m experiments.report out/new --baseline=out/old --fail_on_regression --out=out/report

A run is a folder of `experiments.compress` or a .jsonl file of records. Ratios are to the run of
--baseline, by default the first. Numbers that were measured by other protocols (text, windows, BOS,
machine, load) get no ratio, and the report says which.

What became worse beyond its noise is printed: quality beyond standard errors, speed, energy and
price beyond interquartile ranges, bytes as they are. With --fail_on_regression the exit status is
then 1, so that CI can use it; it is 2 if the input is wrong or nothing could be judged.

Device: none is used. Minutes: below 1.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments import common
from model import files
from model.eval import changes, runs, runs_report
from model.eval.runs import Run
from model.eval.runs_report import Comparison

KIND = 'report'  # of the output folder
REGRESSED = 1  # exit status
MOST_PRINTED = 30

OUT = common.define_out('out/report', 'Folder for the report. An earlier one is replaced.')
BASELINE = flags.DEFINE_string(
  'baseline', None, 'The run that ratios refer to. Default: the first.'
)
METRICS = flags.DEFINE_list('metrics', [], "Columns of the table. Default: the main job's.")
FAIL = flags.DEFINE_bool('fail_on_regression', False, 'End with status 1 if a number is worse.')


def main(paths: Sequence[str] = ()) -> None:
  found, baseline = _runs(list(paths))
  comparison = runs_report.compare(found, runs.rows(found), baseline, METRICS.value)
  out = common.out(OUT.value)
  with files.atomic_folder(out, kind=KIND) as folder:
    runs_report.write(comparison, folder)
  print(_words(comparison, out))
  if FAIL.value and len(found) < 2:
    raise ValueError('--fail_on_regression needs two runs, or a --baseline')
  if FAIL.value and not comparison.judged:
    raise ValueError('nothing could be judged; see "Not compared" and "Not judged" in the report')
  if FAIL.value and comparison.of(changes.WORSE):
    sys.exit(REGRESSED)


def _runs(paths: list[str]) -> tuple[list[Run], str]:
  """The runs, and the name of the baseline, which is put first if it is not among them."""
  if not paths:
    raise ValueError('name at least one run: a folder of experiments.compress or a .jsonl file')
  baseline = BASELINE.value
  if baseline is None:
    found = runs.read(paths)
    return found, found[0].name
  places = [pathlib.Path(path).resolve() for path in paths]
  if pathlib.Path(baseline).resolve() not in places:
    paths, places = [baseline, *paths], [pathlib.Path(baseline).resolve(), *places]
  found = runs.read(paths)
  return found, found[places.index(pathlib.Path(baseline).resolve())].name


def _words(comparison: Comparison, out: pathlib.Path) -> str:
  lines = changes.refusals(comparison.changes)
  lines = [f'not compared: {line}' for line in lines]
  worse = comparison.of(changes.WORSE)
  lines += [f'worse: {runs_report.words(change)}' for change in worse[:MOST_PRINTED]]
  if len(worse) > MOST_PRINTED:
    lines.append(f'worse: {len(worse) - MOST_PRINTED} more; see the report')
  better = len(comparison.of(changes.BETTER))
  lines.append(
    f'{len(worse)} worse than {comparison.baseline} beyond the noise, {better} better, '
    f'of {comparison.judged} judged'
  )
  files = ('runs.html', 'runs.md', 'runs.csv', runs_report.FIGURE)
  return '\n'.join([*lines, '', *(f'{out}/{name}' for name in files if (out / name).is_file())])


if __name__ == '__main__':
  common.run(main, takes_arguments=True)
