"""Records: strict JSON both ways, appending, and what is told of the machine."""

import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import subprocess

import jax
import numpy as np
import pytest

from model.eval import records
from model.eval.records import Metric, Record

RESULTS = pathlib.Path(__file__).parents[3] / 'experiments' / 'results'


def _record(**changes):
  fields = {
    'experiment': 'compress',
    'recipe': 'int4 – «é»\n',
    'command': 'python -m experiments.compress --recipe=int4',
    'config': {'seq_len': 256, 'nested': {'list': [1, 2.5, None, True]}},
    'environment': {'git_revision': None},
    'seed': 0,
    'metrics': {'ppl': Metric(12.5, '1', 1000), 'time': Metric(0.25, 's', 5, 0.01)},
    'ledger': ({'layer': 'layers.0.ffn.up', 'event': 'fallback', 'detail': 'singular'},),
    'without_kernel': 7,
    'notes': ('no kernel for this format on cpu, no speed-up expected',),
  }
  return Record(**(fields | changes))


def _no_constant(name):
  raise AssertionError(f'{name} is not JSON')


def test_a_line_gives_the_record_back():
  line = records.to_line(_record())
  assert '\n' not in line
  assert records.from_line(line) == _record()


def test_the_line_has_the_documented_form():
  data = json.loads(records.to_line(_record()))
  names = 'experiment recipe command config environment seed metrics without_kernel ledger notes'
  assert ' '.join(data) == names
  assert data['metrics']['time'] == {'value': 0.25, 'unit': 's', 'n': 5, 'spread': 0.01}
  assert data['metrics']['ppl']['spread'] is None
  assert data['ledger'] == [{'layer': 'layers.0.ffn.up', 'event': 'fallback', 'detail': 'singular'}]


@pytest.mark.parametrize(
  ('value', 'name'), [(math.nan, 'NaN'), (math.inf, 'Infinity'), (-math.inf, '-Infinity')]
)
def test_numbers_that_json_lacks_are_strings_and_come_back(value, name):
  line = records.to_line(_record(metrics={'ppl': Metric(value, '1', 3, value)}))
  data = json.loads(line, parse_constant=_no_constant)
  assert data['metrics']['ppl']['value'] == name
  metric = records.from_line(line).metrics['ppl']
  assert np.array_equal([metric.value, metric.spread], [value, value], equal_nan=True)


def test_a_config_with_infinity_is_still_json():
  line = records.to_line(_record(config={'limit': [math.inf]}))
  assert json.loads(line, parse_constant=_no_constant)['config'] == {'limit': ['Infinity']}


def test_scalars_of_numpy_and_jax_become_numbers():
  metric = Metric(jax.numpy.float32(0.5), '1', np.int64(3), np.float32(0.25))
  assert dataclasses.astuple(metric) == (0.5, '1', 3, 0.25)
  data = json.loads(records.to_line(_record(config={'a': np.int32(3), 'b': np.float32(0.5)})))
  assert data['config'] == {'a': 3, 'b': 0.5}


def test_what_json_cannot_hold_is_named():
  with pytest.raises(ValueError, match=r'record\.config\.a\[1\] is a set'):
    records.to_line(_record(config={'a': [1, {2}]}))


def _changed(**changes):
  return json.dumps(json.loads(records.to_line(_record())) | changes)


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{', 'Expecting'),
    ('[]', 'a record must be a dict'),
    ('{"recipe": "a"}', 'missing: experiment, command'),
    (_changed(extra=1), "unknown: 'extra'"),
    (_changed(recipe=3), 'recipe must be a str, not 3'),
    (_changed(seed=True), 'seed must be a int, not True'),
    (_changed(without_kernel='no kernel'), "without_kernel must be a int, not 'no kernel'"),
    (_changed(notes='no'), 'notes must be a list'),
    (_changed(ledger=[{'layer': 'a'}]), 'missing: event, detail'),
    (_changed(metrics={'ppl': 3}), "metric 'ppl' must be a dict"),
    (_changed(metrics={'ppl': {'value': '3', 'unit': '1', 'n': 1, 'spread': None}}), 'a number'),
    (_changed(metrics={'ppl': {'value': 3, 'unit': '', 'n': 1, 'spread': None}}), 'needs a unit'),
    (_changed(metrics={'ppl': {'value': 3, 'unit': '1', 'n': 0, 'spread': None}}), 'at least one'),
    (_changed(seed=None).replace('null', 'NaN', 1), 'NaN is not JSON'),
    ('{"recipe": "a", "recipe": "b"}', 'given twice'),
  ],
)
def test_reading_is_strict(line, message):
  with pytest.raises(ValueError, match=message):
    records.from_line(line)


def test_append_adds_lines_and_read_names_the_wrong_one(tmp_path):
  path = tmp_path / 'new' / 'results.jsonl'
  for recipe in 'ab':
    records.append(path, _record(recipe=recipe))
  assert [r.recipe for r in records.read(path)] == ['a', 'b']
  assert [p.name for p in path.parent.iterdir()] == ['results.jsonl']
  path.write_text(path.read_text() + '{"torn')  # as another program may leave it
  records.append(path, _record(recipe='c'))
  assert len(path.read_text().splitlines()) == 4
  with pytest.raises(ValueError, match='line 3'):
    records.read(path)


def test_a_failed_append_leaves_the_file_alone(tmp_path, monkeypatch):
  path = tmp_path / 'results.jsonl'
  records.append(path, _record())
  before = path.read_bytes()

  def fail(handle):
    raise OSError('disk full')

  monkeypatch.setattr(records.os, 'fsync', fail)
  with pytest.raises(OSError, match='disk full'):
    records.append(path, _record())
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


def _append_some(path, name):
  for i in range(10):
    records.append(path, _record(recipe=f'{name}{i}'))


def test_processes_that_append_at_once_lose_nothing(tmp_path):
  path = tmp_path / 'results.jsonl'
  context = multiprocessing.get_context('forkserver')
  workers = [context.Process(target=_append_some, args=(path, name)) for name in 'ab']
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join(60)
  got = [r.recipe for r in records.read(path)]
  assert sorted(got) == sorted(f'{name}{i}' for name in 'ab' for i in range(10))


def test_missing_kernels_are_counted_in_a_field_and_not_read_off_the_notes():
  assert records.from_line(records.to_line(_record())).without_kernel == 7
  told = _record(without_kernel=0, notes=('no kernel is missing: a speed-up is expected',))
  assert told.without_kernel == 0
  line = json.loads(records.to_line(told))
  del line['without_kernel']
  with pytest.raises(ValueError, match='missing: without_kernel'):
    records.from_line(json.dumps(line))


@pytest.mark.parametrize('path', sorted(RESULTS.glob('*.jsonl')), ids=lambda path: path.stem)
def test_the_committed_records_are_read(path):
  rows = records.read(path)
  assert [records.to_line(row) for row in rows] == path.read_text().splitlines()


def test_environment_names_the_machine():
  told = records.environment()
  assert told['versions']['jax'] == jax.__version__
  assert told['platform'] == 'cpu' and told['device'] and told['cpu']
  assert told['xla_flags'] == os.environ.get('XLA_FLAGS', '')
  assert told['cpu_cores'] >= 1 and told['device_count'] == len(jax.devices())
  assert told['date_utc'].endswith('+00:00')
  json.dumps(told, allow_nan=False)


def _git(folder, *arguments):
  identity = ['-c', 'user.name=n', '-c', 'user.email=e@example.org', '-c', 'commit.gpgsign=false']
  subprocess.run(['git', '-C', folder, *identity, *arguments], check=True, capture_output=True)


def test_the_revision_is_that_of_the_checkout_itself(tmp_path):
  folder = pathlib.Path(tmp_path).resolve()
  assert records._git(folder) == (None, None)
  _git(folder, 'init')
  (folder / 'file').write_text('1')
  _git(folder, 'add', 'file')
  _git(folder, 'commit', '-m', 'one')
  revision, dirty = records._git(folder)
  assert len(revision) == 40 and dirty is False
  (folder / 'file').write_text('2')
  assert records._git(folder) == (revision, True)
  (folder / 'inner').mkdir()  # a package installed inside somebody's project
  assert records._git(folder / 'inner') == (None, None)
