"""The generator of README's tables: parts are found, joined and refused as promised."""

import dataclasses
import pathlib

import pytest

from experiments import quality_tables, speed_tables, update_readme
from experiments.update_readme import Part
from model.eval import records
from model.eval.records import Metric, Record


def _record(recipe, ppl, size, speed, **changes):
  metrics = {
    'ppl': Metric(ppl, '1', 100),
    'ppl_ratio': Metric(ppl / 20, '1', 100),
    'kl_to_base': Metric(ppl / 1000, 'nat/token', 100),
    'stored_bytes': Metric(size, 'byte'),
    'linear_bytes_vs_bf16': Metric(size / 2e8, '1'),
    'decode_tokens_per_s': Metric(speed, 'token/s', 7, 8.0),
    'decode_speedup': Metric(speed / 50, '1', 7, 0.2),
  }
  return Record(
    experiment='compress',
    recipe=recipe,
    command='python -m experiments.compress',
    config={'model': 'real.gguf', 'recipe': {'name': recipe}},
    environment={'cpu': 'A CPU', 'cpu_cores': 2},
    seed=0,
    metrics=metrics,
    **changes,
  )


def _with_code(row, ppl):
  code = {f'{name}:python-source': m for name, m in _record('x', ppl, 1, 1).metrics.items()}
  texts = {'python-docs': {}, 'python-source': {}}
  return dataclasses.replace(row, config={'texts': texts}, metrics={**row.metrics, **code})


ENGLISH = [_record('base', 20.0, 4e8, 50), _record('int4', 21.0, 1e8, 150, without_kernel=3)]
BOTH = [_with_code(row, ppl) for row, ppl in zip(ENGLISH, (5.0, 22.5))]


@pytest.fixture
def write(tmp_path, monkeypatch):
  """A function (name, records) -> the path of their file."""
  monkeypatch.setattr(update_readme, 'ROOT', tmp_path)
  monkeypatch.setattr(speed_tables, 'ROOT', tmp_path)
  monkeypatch.setattr(update_readme, 'RESULTS', tmp_path)

  def make(name, rows) -> pathlib.Path:
    for row in rows:
      records.append(tmp_path / name, row)
    return tmp_path / name

  return make


def test_the_table_of_the_real_model_has_two_texts(write):
  lines = quality_tables.real(write('e.jsonl', BOTH)).splitlines()
  assert {line.count('|') for line in lines[:4]} == {13}
  assert lines[2] == ('| `base` | 20.000 |  |  | 5.000 |  |  | 400.0 | 2.000 | 50 ± 4 |  |  |')
  assert lines[3] == (
    '| `int4` | 21.000 | +5.00% | 0.0210 | 22.500 | +12.50% | 0.0225 | 100.0 | 0.500 | 150 ± 4 '
    '| 3.00 ± 0.10 | no kernel |'
  )
  assert 'A CPU, 2 cores' in lines[-1] and '[`e.jsonl`](e.jsonl)' in lines[-1]


def test_the_table_of_one_text_has_quality_and_size(write):
  lines = quality_tables.quality(write('e.jsonl', ENGLISH)).splitlines()
  assert {line.count('|') for line in lines[:4]} == {7}
  assert lines[2] == '| `base` | 20.000 |  |  | 2.000 | 400.0 |'
  assert lines[3] == '| `int4` | 21.000 | +5.00% | 0.0210 | 0.500 | 100.0 |'
  assert lines[-1] == '`python -m experiments.compress`; records: [`e.jsonl`](../e.jsonl).'


def test_rows_of_several_commands_name_them_all(write):
  other = dataclasses.replace(BOTH[1], recipe='more', command='python -m experiments.compress --x')
  last = quality_tables.real(write('e.jsonl', [*BOTH, other])).splitlines()[-1]
  assert last.startswith(
    '`python -m experiments.compress`, `python -m experiments.compress --x` on'
  )


def test_the_table_beside_llm_compressor(write):
  values = {'base_ppl': 20.0, 'ppl': 21.0, 'peer_ppl': 21.5, 'ppl / peer': 0.97674}
  values |= {'seconds': 30.0, 'peer_seconds': 60.0, 'seconds / peer': 0.5}
  metrics = {name: Metric(value, '1', 2) for name, value in values.items()}
  old = dataclasses.replace(ENGLISH[0], recipe='gptq_w4_g64', metrics=metrics)
  error = {'ppl / peer, standard error': Metric(0.00212, '1', 40)}
  new = dataclasses.replace(old, metrics=metrics | error)
  lines = quality_tables.peer(write('e.jsonl', [old, new])).splitlines()
  assert {line.count('|') for line in lines[:4]} == {8}
  assert lines[2] == '| `gptq_w4_g64` | 21.000 | 21.500 | 0.9767 | 30.0 | 60.0 | 0.50 |'
  assert '| 0.9767 ± 0.0021 |' in lines[3]
  assert 'at least 2 rounds a setting on A CPU' in lines[-1] and '(../e.jsonl)' in lines[-1]


def test_the_table_of_a_retrofit_joins_the_runs_of_each_mixer(write):
  def row(mixer, context, **metrics):
    known = {'context': context, 'text': 'some text'}
    return dataclasses.replace(_record(mixer, 1, 1, 1), config=known, metrics=metrics)

  ratio, cache = Metric(1.5, '1', 5, 0.2), Metric(2e6, 'byte')
  rows = (
    row('dense', 64, ppl=Metric(8, '1'), needle_probability=Metric(0.5, '1')),
    row('dense', 128, ppl=Metric(9, '1')),
    row('window8', 128, ppl=Metric(10, '1')),
    row('window8', 64, decode_speedup=ratio, cache_bytes=cache),
  )
  path = write('retrofit.jsonl', rows)
  head, _, *lines = speed_tables.retrofit(path, 'docs/x.md').split('\n')
  assert head == (
    '| mixer, cache | perplexity 0 to 64 | perplexity 64 to 128 | needle in 64 | cache at 64, MB '
    '| decode at 64, vs dense |'
  )
  assert lines[0] == '| dense | 8.000 | 9.000 | 0.500 |  |  |'
  assert lines[1] == '| window8 |  | 10.000 |  | 2.0 | 1.50 ± 0.10 |'


def test_a_part_stands_once_in_its_file_as_soon_as_its_records_exist(write, monkeypatch):
  count = lambda path: f'{len(records.read(path))} rows'
  part = Part(file='a.md', name='some', generate=count, results=('e.jsonl',))
  monkeypatch.setattr(update_readme, 'PARTS', (part,))
  text = 'before\n<!-- some -->\nold\nlines\n<!-- /some -->\nafter\n'
  assert update_readme.render('a.md', text) == text  # there is nothing to make it from
  write('e.jsonl', ENGLISH)
  new = update_readme.render('a.md', text)
  assert new == 'before\n<!-- some -->\n2 rows\n<!-- /some -->\nafter\n'
  assert update_readme.render('a.md', new) == new
  empty = text.replace('old\nlines\n', '')
  assert update_readme.render('a.md', empty) == new
  assert update_readme.render('b.md', 'another file') == 'another file'
  for wrong, times in (('', 0), (text * 2, 2)):
    with pytest.raises(ValueError, match=f'a.md needs the part some once, not {times} times'):
      update_readme.render('a.md', wrong)


def test_the_first_sentence_is_whole(tmp_path):
  path = tmp_path / 'x.py'
  path.write_text('"""GPTQ: after Frantar et al. (2022),\nor e.g. `x | y`: whole. Not this."""\n')
  whole = 'GPTQ: after Frantar et al. (2022), or e.g. `x \\| y`: whole.'
  assert update_readme._first_sentence(path) == whole
