"""The pictures of README that are drawn from committed records, for `experiments.update_readme`.

A picture names the records that it shows by a hash in its file, so that one that is out of date is
found without drawing it, whatever fonts and versions this machine has.
"""

import dataclasses
import pathlib
import sys

from model.eval import figures, records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
  """A Pareto chart and the records that it is drawn from, both in one folder."""

  file: str
  results: str


PICTURES = (Picture(file='smollm2_pareto.png', results='smollm2_cpu.jsonl'),)


def update(folder: pathlib.Path, *, check: bool) -> None:
  """Draws what is out of date anew. With `check` it raises ValueError naming it instead."""
  for picture in PICTURES:
    path, results = folder / picture.file, folder / picture.results
    if not results.is_file() or is_fresh(path, results):
      continue
    if check:
      raise ValueError(f'{path} is out of date; run python -m experiments.update_readme')
    figures.write_png(records.read(results), path)
    print(f'{picture.file} was drawn again', file=sys.stderr)


def is_fresh(path: pathlib.Path, results: pathlib.Path) -> bool:
  """Whether there is a picture of these records."""
  source = figures.source(records.read(results))
  return path.is_file() and f'Source\0{source}'.encode() in path.read_bytes()
