"""Measured numbers, and the JSON line that keeps those of one run.

A `Record` holds what was run (experiment, recipe, command, config, seed), where (environment), the
results (metrics with units, sample sizes and spread), the matrices that no kernel makes fast, the
fallbacks (ledger) and remarks for a reader (notes). Lines are strict JSON: NaN and infinities are
written as the strings 'NaN', 'Infinity' and '-Infinity', and only metrics are read back as numbers.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import math
import numbers
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax

BASE = 'base'  # the recipe of the row that every ratio refers to
LEDGER_FIELDS = ('layer', 'event', 'detail')
NON_FINITE = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}


@dataclasses.dataclass(frozen=True)
class Metric:
  """One number: `n` is its sample size, `spread` its interquartile range, if there is one."""

  value: float
  unit: str
  n: int = 1
  spread: float | None = None

  def __post_init__(self):
    _set(self, value=float(self.value), n=int(self.n))
    if self.spread is not None:
      _set(self, spread=float(self.spread))
    if not isinstance(self.unit, str) or not self.unit:
      raise ValueError(f'a metric needs a unit (1 for a pure number), not {self.unit!r}')
    if self.n < 1:
      raise ValueError(f'a metric is measured on at least one thing, not {self.n}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """What one run measured.

  `without_kernel` counts the compressed matrices that no kernel of the device makes faster: no
  speed-up is expected of them. `ledger` rows have the keys layer, event and detail.
  """

  experiment: str
  recipe: str
  command: str
  config: dict[str, Any]
  environment: dict[str, Any]
  seed: int | None
  metrics: dict[str, Metric]
  without_kernel: int = 0
  ledger: tuple[dict[str, str], ...] = ()
  notes: tuple[str, ...] = ()

  def __post_init__(self):
    _set(self, ledger=tuple(self.ledger), notes=tuple(self.notes))
    for name in ('experiment', 'recipe', 'command'):
      _expect(getattr(self, name), str, name)
    for name in ('config', 'environment', 'metrics'):
      _expect(getattr(self, name), dict, name)
    if self.seed is not None:
      _expect(self.seed, int, 'seed')
    _expect(self.without_kernel, int, 'without_kernel')
    for name, metric in self.metrics.items():
      _expect(metric, Metric, f'the metric {name!r}')
    for row in self.ledger:
      _check_keys(row, LEDGER_FIELDS, 'a ledger row')
    for note in self.notes:
      _expect(note, str, 'a note')

  def value(self, name: str) -> float | None:
    """The value of a metric, or None where it was not measured."""
    return self.metrics[name].value if name in self.metrics else None


def to_line(record: Record) -> str:
  """The record as one line of strict JSON, without the line's end.

  Raises:
    ValueError: the config or the environment holds a value that JSON cannot represent.
  """
  plain = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
  plain['metrics'] = {name: dataclasses.asdict(metric) for name, metric in record.metrics.items()}
  return json.dumps(_plain(plain, 'record'), allow_nan=False, ensure_ascii=False)


def from_line(line: str) -> Record:
  """Reads what `to_line` wrote.

  Raises:
    ValueError: not JSON, a field is missing, unknown or given twice, or a value has a wrong type.
  """
  data = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_unique)
  _check_keys(data, tuple(f.name for f in dataclasses.fields(Record)), 'a record')
  _expect(data['metrics'], dict, 'metrics')
  for name in ('ledger', 'notes'):
    _expect(data[name], list, name)
  data['metrics'] = {name: _read_metric(name, value) for name, value in data['metrics'].items()}
  return Record(**data)


def append(path: str | os.PathLike, record: Record) -> None:
  """Adds the record as the last line of a .jsonl file, whole or not at all.

  A new file is written beside the old one and renamed, under a lock on the folder. So writers in
  other processes wait, and readers see complete lines.
  """
  path = pathlib.Path(os.path.realpath(path))
  line = to_line(record)
  path.parent.mkdir(parents=True, exist_ok=True)
  with _locked(path.parent):
    old = path.read_bytes() if path.exists() else b''
    if old and not old.endswith(b'\n'):
      old += b'\n'
    with replacing(path) as partial, open(partial, 'wb') as file:
      file.write(old + line.encode() + b'\n')
      file.flush()
      os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a file name beside `path`; the file written there becomes `path` if nothing raises."""
  path = pathlib.Path(path)
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    yield partial
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def read(path: str | os.PathLike) -> list[Record]:
  """Reads every record of a .jsonl file. Raises ValueError naming the file and the wrong line."""
  records = []
  with open(path, encoding='utf-8') as file:
    for number, line in enumerate(file, start=1):
      try:
        records.append(from_line(line))
      except ValueError as error:
        raise ValueError(f'{os.fspath(path)}, line {number}: {error}') from error
  return records


def environment(device: jax.Device | None = None) -> dict[str, Any]:
  """Code version, libraries and machine, on which numbers depend. `device`: JAX's first."""
  device = device or jax.devices()[0]
  revision, dirty = _git(pathlib.Path(__file__).resolve().parents[2])
  packages = ('jax', 'jaxlib', 'flax', 'numpy')
  versions = {name: importlib.metadata.version(name) for name in packages}
  return {
    'git_revision': revision,
    'git_dirty': dirty,
    'versions': {'python': platform.python_version(), **versions},
    'platform': device.platform,
    'device': device.device_kind,
    'device_count': jax.device_count(),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
    'os': platform.platform(),
    'cpu': _cpu_model(),
    'cpu_cores': len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count(),
    'date_utc': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }


def _git(root: pathlib.Path) -> tuple[str | None, bool | None]:
  """Revision of the checkout at `root`, and whether tracked files differ; Nones outside of one."""

  def git(*arguments):
    command = ['git', '-C', str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

  try:
    # Installed inside somebody's project, git would answer for that project.
    if pathlib.Path(git('rev-parse', '--show-toplevel')).resolve() != root:
      return None, None
    return git('rev-parse', 'HEAD'), bool(git('status', '--porcelain', '--untracked-files=no'))
  except (OSError, subprocess.CalledProcessError):
    return None, None


def _cpu_model() -> str:
  with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8') as file:
    for line in file:
      if line.lower().startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)  # which also unlocks


def _plain(value, where: str):
  """`value` as what `json.dumps` writes strictly; numpy and JAX scalars become Python numbers."""
  if value is None or isinstance(value, (bool, str)):
    return value
  if isinstance(value, dict):
    for key in value:
      _expect(key, str, f'a key of {where}')
    return {key: _plain(item, f'{where}.{key}') for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item, f'{where}[{i}]') for i, item in enumerate(value)]
  if isinstance(value, numbers.Integral):
    return int(value)
  if isinstance(value, numbers.Real):
    return _finite_or_name(float(value))
  raise ValueError(f'{where} is a {type(value).__name__}, which JSON cannot hold: {value!r}')


def _finite_or_name(value: float) -> float | str:
  if math.isfinite(value):
    return value
  return 'NaN' if math.isnan(value) else ('Infinity' if value > 0 else '-Infinity')


def _read_metric(name: str, data) -> Metric:
  _check_keys(data, ('value', 'unit', 'n', 'spread'), f'the metric {name!r}')
  _expect(data['n'], int, f'n of the metric {name!r}')
  return Metric(
    _number(data['value'], f'the value of {name!r}'),
    data['unit'],
    data['n'],
    None if data['spread'] is None else _number(data['spread'], f'the spread of {name!r}'),
  )


def _number(value, what: str) -> float:
  if isinstance(value, str) and value in NON_FINITE:
    return NON_FINITE[value]
  _expect(value, (int, float), what)
  return value


def _expect(value, kind, what: str) -> None:
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    wanted = kind.__name__ if isinstance(kind, type) else 'number'
    raise ValueError(f'{what} must be a {wanted}, not {value!r}')


def _check_keys(data, names: tuple[str, ...], what: str) -> None:
  _expect(data, dict, what)
  missing = [name for name in names if name not in data]
  unknown = [repr(name) for name in data if name not in names]
  if missing or unknown:
    raise ValueError(
      f'{what} has the fields {", ".join(names)}; '
      f'missing: {", ".join(missing) or "none"}; unknown: {", ".join(unknown) or "none"}'
    )


def _unique(pairs):
  data = dict(pairs)
  if len(data) != len(pairs):
    raise ValueError(f'a field is given twice among {", ".join(key for key, _ in pairs)}')
  return data


def _no_constant(name):
  raise ValueError(f'{name} is not JSON')


def _set(instance, **values):
  for name, value in values.items():
    object.__setattr__(instance, name, value)
