"""Several runs compared: rows find their like, noise decides, and other protocols are refused."""

import csv
import dataclasses
import io
import math

import pytest

from model.eval import changes, measures, records, runs, runs_figure, runs_report
from model.eval.changes import BETTER, REFUSED, SAME, UNKNOWN, WORSE
from model.eval.measures import Kind
from model.eval.records import Metric, Record

TEXTS = {
  'docs': {'fingerprint': 'aaa', 'windows': 4},
  'code': {'fingerprint': 'bbb', 'windows': 4},
}
MACHINE = {'platform': 'cpu', 'device': 'cpu', 'device_count': 1, 'cpu': 'X', 'cpu_cores': 2}
NLL = 1000.0
METRICS = {
  'ppl': Metric(20.0, '1', 100),
  'ppl_se': Metric(1.0, '1', 4),
  'ppl_ratio': Metric(1.10, '1', 100),
  'ppl_ratio_se': Metric(0.01, '1', 4),
  'ppl:code': Metric(10.0, '1', 100),
  'nll_sum': Metric(NLL, 'nat', 100),
  'bits_per_byte': Metric(NLL / math.log(2) / 400, 'bit/byte', 100),
  'flip_rate': Metric(0.1, '1', 10_000),
  'linear_bytes_vs_bf16': Metric(0.25, '1'),
  'stored_bytes': Metric(1e6, 'byte'),
  'decode_tokens_per_s': Metric(100.0, 'token/s', 7, 5.0),
  'decode_speedup': Metric(2.0, '1', 7, 0.1),
  'ttft_median_s': Metric(0.2, 's', 48, 0.05),
  'compress_s': Metric(9.0, 's'),
  'energy_j_per_token': Metric(0.5, 'J/token', 7, 0.02),
  'money_per_million_tokens': Metric(3.0, 'EUR', 7, 0.1),
  'parameters': Metric(5.0, 'parameter'),
  'accuracy:words': Metric(0.5, '1', 100),
  'accuracy_se:words': Metric(0.02, '1', 100),
}


def record(recipe='int4', metrics=(), environment=(), seed=0, **config):
  """A record of the main job, with changes."""
  settings = {'texts': TEXTS, 'seq_len': 32, 'bos': 'none', 'batch': 1, 'energy': 'a counter'}
  settings |= {'tasks': {'words': {'fingerprint': 'd', 'documents': 9}}}
  return Record(
    experiment='compress',
    recipe=recipe,
    command='python -m experiments.compress',
    config={**settings, **config},
    environment={**MACHINE, **dict(environment)},
    seed=seed,
    metrics={**METRICS, **dict(metrics)},
  )


def run(name, *rows):
  return runs.Run(name=name, path=None, records=rows)


def compared(old, new, metrics=()):
  """The comparison of a run with one record to another one."""
  pair = [run('old', old), run('new', new)]
  return runs_report.compare(pair, runs.rows(pair), 'old', metrics)


def verdict(name, value, **changed):
  """The verdict on a metric with another value, and the reasons."""
  metric = dataclasses.replace(METRICS[name], value=value)
  comparison = compared(record(), record(metrics={name: metric}, **changed))
  (found,) = (c for c in comparison.changes if c.metric == name)
  return found


@pytest.mark.parametrize(
  'name, value, expected',
  [
    ('ppl', 22.8, SAME),  # two standard errors of a difference are 2.83
    ('ppl', 22.9, WORSE),
    ('ppl', 17.1, BETTER),
    ('ppl_ratio', 1.13, WORSE),
    ('ppl_ratio', 1.12, SAME),
    ('ppl', math.nan, WORSE),
    ('ppl:code', 30.0, UNKNOWN),
    ('flip_rate', 0.107, SAME),  # the standard error is 0.003
    ('flip_rate', 0.11, WORSE),
    ('accuracy:words', 0.45, SAME),
    ('accuracy:words', 0.44, WORSE),
    ('accuracy:words', 0.56, BETTER),
    ('stored_bytes', 1e6 + 1, WORSE),
    ('linear_bytes_vs_bf16', 0.24, BETTER),
    ('decode_tokens_per_s', 95.5, SAME),
    ('decode_tokens_per_s', 94.5, WORSE),
    ('decode_tokens_per_s', 105.5, BETTER),
    ('decode_speedup', 1.8, WORSE),
    ('ttft_median_s', 0.26, WORSE),
    ('compress_s', 99.0, UNKNOWN),
    ('energy_j_per_token', 0.53, WORSE),
    ('money_per_million_tokens', 2.8, BETTER),
    ('parameters', 50.0, SAME),
    ('bits_per_byte', METRICS['bits_per_byte'].value, SAME),
  ],
)
def test_noise_decides(name, value, expected):
  found = verdict(name, value)
  assert found.verdict == expected
  assert bool(found.reasons) == (expected == UNKNOWN or not math.isfinite(value))
  if math.isfinite(value):
    assert found.ratio == pytest.approx(value / METRICS[name].value)


def test_the_larger_spread_counts():
  noisy = Metric(90.0, 'token/s', 7, 11.0)
  name = 'decode_tokens_per_s'
  (found,) = (
    c for c in compared(record(), record(metrics={name: noisy})).changes if c.metric == name
  )
  assert (found.verdict, found.noises) == (SAME, (5.0, 11.0))


@pytest.mark.parametrize(
  'changed, reason, refused',
  [
    ({'seq_len': 64}, 'window length: 32 against 64', {'ppl', 'ppl:code', 'flip_rate'}),
    ({'bos': 'window'}, 'bos: none against window', {'ppl', 'ppl:code', 'flip_rate'}),
    (
      {'texts': {**TEXTS, 'code': {'fingerprint': 'ccc', 'windows': 4}}},
      'text: bbb, 4 windows against ccc, 4 windows',
      {'ppl:code'},
    ),
    (
      {'metrics': {'bits_per_byte': Metric(NLL / math.log(2) / 401, 'bit/byte')}},
      'bytes of the predicted tokens: 400 against 401',
      {'ppl', 'flip_rate'},
    ),
    (
      {'tasks': {'words': {'fingerprint': 'e', 'documents': 9}}},
      'task: d, 9 documents against e, 9 documents',
      {'accuracy:words'},
    ),
    (
      {'environment': {'cpu': 'Y'}},
      'machine: cpu, X, 2 cores against cpu, Y, 2 cores',
      {'decode_speedup', 'energy_j_per_token'},
    ),
    (
      {'environment': {'device_count': 2}},
      'machine: cpu, X, 2 cores against cpu, 2 devices, X, 2 cores',
      {'decode_speedup'},
    ),
    (
      {'environment': {'platform': 'gpu', 'device': 'H100'}},
      'machine: cpu, X, 2 cores against H100',
      {'decode_speedup'},
    ),
    ({'batch': 8}, 'batch: 1 against 8', {'decode_speedup', 'money_per_million_tokens'}),
    ({'energy': 'another'}, 'counters: a counter against another', {'energy_j_per_token'}),
    (
      {'metrics': {'money_per_million_tokens': Metric(3.0, 'USD', 7, 0.1)}},
      'unit: EUR against USD',
      {'money_per_million_tokens'},
    ),
  ],
)
def test_another_protocol_gives_no_ratio(changed, reason, refused):
  comparison = compared(record(), record(**changed))
  found = {c.metric: c for c in comparison.of(REFUSED)}
  assert refused <= set(found)
  assert all(found[name].reasons == (reason,) and found[name].ratio is None for name in refused)
  kinds = {c.measure.kind for c in found.values()}
  assert Kind.BYTES not in kinds and len(kinds & {Kind.QUALITY, Kind.SPEED}) < 2
  lines = changes.refusals(comparison.changes)
  assert any(line.endswith(f': {reason} (1 row)') and line.startswith('new, ') for line in lines)
  assert f'- {lines[0]}' in runs_report.markdown(comparison)


def test_a_text_that_no_record_names_is_no_protocol():
  found = compared(record(texts=None), record(texts=None)).of(REFUSED)
  assert {c.metric for c in found} == {n for n in METRICS if n.startswith(('ppl', 'flip'))} - {
    'ppl_se', 'ppl_ratio_se',
  }  # fmt: skip
  assert {c.reasons for c in found} == {('no record names the text',)}


def test_rows_of_one_recipe_are_told_apart_by_what_differs_and_meet_in_other_runs():
  loads = [record(load='closed', amount=n, requests=9) for n in (1, 8)]
  found = runs.rows([run('old', *loads), run('new', loads[1], record('int8', load='open'))])
  assert [row.label for row in found] == [
    'int4 (amount=1)', 'int4 (amount=8)', 'int4 (amount=8)', 'int8'
  ]  # fmt: skip
  assert changes.like(found[2], found, 'old') is found[1]
  assert changes.like(found[3], found, 'old') is None
  assert changes.strangers(found, 'old') == [
    'in old and not in new: int4 (amount=1)', 'in new and not in old: int8'
  ]  # fmt: skip
  seeds = [record(seed=seed) for seed in (0, 1)]
  assert [row.label for row in runs.rows([run('a', *seeds)])] == ['int4 (seed=0)', 'int4 (seed=1)']
  twice = runs.rows([run('a', record(), record())])
  assert [row.label for row in twice] == ['int4', 'int4 #2']
  other = dataclasses.replace(record(), experiment='serve')
  assert [row.label for row in runs.rows([run('a', record(), other)])] == [
    'compress: int4', 'serve: int4'
  ]  # fmt: skip


def test_runs_are_read_and_named_by_the_ends_of_their_paths(tmp_path):
  for name in ('a/run', 'b/run'):
    records.append(tmp_path / name / 'records.jsonl', record())
  records.append(tmp_path / 'c.jsonl', record())
  found = runs.read([tmp_path / 'a/run', tmp_path / 'b/run/records.jsonl', tmp_path / 'c.jsonl'])
  assert [one.name for one in found[:2]] == ['a/run', 'b/run']
  assert found[2].name.endswith('/c')
  assert [one.name for one in runs.read([tmp_path / 'a/run', tmp_path / 'c.jsonl'])] == ['run', 'c']


@pytest.mark.parametrize(
  'names, message',
  [
    (['runn'], 'there is no run .*runn; did you mean .*run[?]$'),
    (['x/y/z'], 'there is no run .*z$'),
    (['empty'], 'empty has no records.jsonl; name a folder of experiments.compress'),
    (['none.jsonl'], 'none.jsonl has no records$'),
    (['damaged.jsonl'], 'damaged.jsonl, line 2: '),
    (['picture.png'], 'picture.png is not a text'),
    (['run', 'run/records.jsonl'], 'run.* is named twice'),
  ],
)
def test_bad_runs_are_refused_in_one_line(tmp_path, names, message):
  records.append(tmp_path / 'run' / 'records.jsonl', record())
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'none.jsonl').touch()
  line = records.to_line(record())
  (tmp_path / 'damaged.jsonl').write_text(f'{line}\n{line[:40]}\n')
  (tmp_path / 'picture.png').write_bytes(b'\x89PNG\r\n\xff\xfe')
  with pytest.raises(ValueError, match=message) as error:
    runs.read([tmp_path / name for name in names])
  assert '\n' not in str(error.value)


@pytest.fixture
def three():
  """Three runs: one is slower, one has another text."""
  slow = Metric(50.0, 'token/s', 7, 5.0)
  base = record('base', {'linear_bytes_vs_bf16': Metric(2.0, '1'), 'ppl_ratio': Metric(1.0, '1')})
  other = {'docs': {'fingerprint': 'zzz', 'windows': 4}, 'code': TEXTS['code']}
  three = [
    run('old', base, record()),
    run('<b>new|', base, record(metrics={'decode_tokens_per_s': slow})),
    run('other', base, record(texts=other)),
  ]
  return runs_report.compare(three, runs.rows(three), 'old')


def test_the_table_has_numbers_ratios_and_refusals(three):
  lines = runs_report.markdown(three, has_figure=True).splitlines()
  (new,) = (line for line in lines if line.startswith('| `<b>new\\|` | `int4` | 20'))
  (other,) = (line for line in lines if line.startswith('| `other` | `int4` | 20'))
  assert '| 50.0 ×0.500 |' in new and '| 20.00 ×1.000 |' in new
  assert '| 20.00 ≠ |' in other and '| 100 ×1.000 |' in other
  assert '## Worse than `old` beyond the noise: 1' in lines
  assert '![Perplexity against bytes](pareto.png)' in lines
  rows = [line.split('|')[1].strip(' `') for line in lines if '| `int4` | 20' in line]
  assert rows[0] == 'old' and len(rows) == 3  # rows of one recipe stand together


def test_the_csv_has_every_metric(three):
  rows = list(csv.DictReader(io.StringIO(runs_report.as_csv(three))))
  assert [(row['run'], row['recipe']) for row in rows[-3:]] == [
    ('old', 'int4'), ('<b>new|', 'int4'), ('other', 'int4')
  ]  # fmt: skip
  old, new, other = rows[-3:]
  assert (new['decode_tokens_per_s'], new['decode_tokens_per_s: spread']) == ('50.0', '5.0')
  assert (new['decode_tokens_per_s / baseline'], old['decode_tokens_per_s / baseline']) == (
    '0.5',
    '',
  )
  assert (other['ppl / baseline'], other['ppl']) == ('', '20.0')
  assert other['not compared'].startswith('text: aaa, 4 windows against zzz')


def test_the_page_escapes_names_and_loads_nothing(three):
  page = runs_report.html(three, figure=b'PNG')
  assert '&lt;b&gt;new|' in page and '<b>new' not in page
  assert 'src="data:image/png;base64,UE5H"' in page
  assert 'http' not in page.replace('http-equiv', '')
  assert '1 number worse than old' in page and 'Not compared' in page
  assert '<li>other is not in the figure</li>' in page


def test_the_figure_leaves_out_runs_on_another_text(three, tmp_path):
  runs_report.write(three, tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {
    'runs.md', 'runs.csv', 'runs.html', 'pareto.png'
  }  # fmt: skip
  drawn = runs_figure.points(runs_report._drawn(three))
  assert {one.run for one in drawn} == {'old', '<b>new|'}
  assert {one.point.recipe for one in drawn} == {'base', 'int4'}
  plain = record(metrics={'linear_bytes_vs_bf16': Metric(math.nan, '1')})
  assert not runs_figure.write_png(runs.rows([run('a', plain)]), tmp_path / 'x.png')
  assert not (tmp_path / 'x.png').exists()


def test_other_columns_can_be_asked_for():
  found = compared(record(), record(), ['ttft_median_s', 'ppl'])
  assert [column.title for column in found.columns] == ['ttft_median_s, s', 'perplexity']
  with pytest.raises(ValueError, match='no record has speed; there are accuracy:words'):
    compared(record(), record(), ['speed'])


def test_the_noise_of_a_share_is_binomial():
  noise, words = measures.noise(record(), 'flip_rate')
  assert (noise, words) == (pytest.approx(0.003), 'standard error')
