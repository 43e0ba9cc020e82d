"""Runs to compare: folders of the main job, or files of records, and the rows that they share.

A row is a recipe of a run. Where a run has several records of one recipe, as a benchmark under
several loads has, the name of the row says in which settings they differ.
"""

import dataclasses
import difflib
import os
import pathlib
from collections.abc import Iterable, Sequence

from model.eval import records
from model.eval.records import Record

RECORDS = 'records.jsonl'  # of a folder of the main job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """The records of one run, by a name that no other run has."""

  name: str
  path: pathlib.Path
  records: tuple[Record, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One record under the name of its run; rows of other runs with this label are its like."""

  run: str
  label: str
  record: Record


def read(paths: Sequence[str | os.PathLike]) -> list[Run]:
  """Reads runs, each named by as much of the end of its path as tells it from the others.

  Raises:
    ValueError: a path does not exist, holds no records or a damaged line, or is named twice.
  """
  files = [_file(pathlib.Path(path)) for path in paths]
  found = [file.resolve() for file in files]
  twice = next((path for path, file in zip(paths, found) if found.count(file) > 1), None)
  if twice is not None:
    raise ValueError(f'the run {twice} is named twice')
  return [
    Run(name=name, path=file, records=_records(file))
    for name, file in zip(_names(found), files, strict=True)
  ]


def rows(runs: Sequence[Run]) -> list[Row]:
  """The rows of all runs, in order."""
  several = len({record.experiment for run in runs for record in run.records}) > 1
  fields = {}
  for run in runs:
    for key, group in _groups(run).items():
      known = fields.setdefault(key, [])
      known += [name for name in _telling(group) if name not in known]
  found = []
  for run in runs:
    taken: dict[str, int] = {}
    for record in run.records:
      label = _label(record, fields[record.experiment, record.recipe], several)
      taken[label] = count = taken.get(label, 0) + 1
      label = label if count == 1 else f'{label} #{count}'
      found.append(Row(run=run.name, label=label, record=record))
  return found


def _file(path: pathlib.Path) -> pathlib.Path:
  if path.is_dir():
    if (path / RECORDS).is_file():
      return path / RECORDS
    raise ValueError(f'{path} has no {RECORDS}; name a folder of experiments.compress, or a file')
  if path.is_file():
    return path
  beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
  near = difflib.get_close_matches(path.name, beside, n=1)
  raise ValueError(
    f'there is no run {path}' + (f'; did you mean {path.parent / near[0]}?' if near else '')
  )


def _records(file: pathlib.Path) -> tuple[Record, ...]:
  try:
    found = tuple(records.read(file))
  except UnicodeDecodeError:
    raise ValueError(f'{file} is not a text; records are lines of JSON in a .jsonl file') from None
  if not found:
    raise ValueError(f'{file} has no records')
  return found


def _names(files: Sequence[pathlib.Path]) -> list[str]:
  parts = [(*f.parts[:-1], f.stem) if f.name != RECORDS else f.parts[:-1] for f in files]
  for count in range(1, max((len(one) for one in parts), default=1) + 1):
    names = ['/'.join(one[-count:]) for one in parts]
    if len(set(names)) == len(names):
      return names
  return [os.fspath(file) for file in files]


def _groups(run: Run) -> dict[tuple[str, str], list[Record]]:
  groups: dict[tuple[str, str], list[Record]] = {}
  for record in run.records:
    groups.setdefault((record.experiment, record.recipe), []).append(record)
  return groups


def _telling(group: Sequence[Record]) -> list[str]:
  """As few settings as tell the records apart, the seed first."""
  chosen: list[str] = []
  names = ['seed', *dict.fromkeys(name for record in group for name in record.config)]
  count = lambda chosen: len({tuple(_setting(r, name) for name in chosen) for r in group})
  for name in names:
    if name != 'energy' and count([*chosen, name]) > count(chosen):
      chosen.append(name)
  return chosen


def _setting(record: Record, name: str) -> str | None:
  """A plain setting as text; None for what has parts."""
  value = record.seed if name == 'seed' else record.config.get(name)
  return None if isinstance(value, (dict, list)) or value is None else str(value)


def _label(record: Record, fields: Iterable[str], several: bool) -> str:
  settings = [(name, _setting(record, name)) for name in fields]
  told = ', '.join(f'{name}={value}' for name, value in settings if value is not None)
  name = f'{record.experiment}: {record.recipe}' if several else record.recipe
  return f'{name} ({told})' if told else name
