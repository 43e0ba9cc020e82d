"""Tables of README and docs/ from the records of speed benchmarks, and what all tables share."""

import pathlib
from collections.abc import Mapping
from typing import Any

from model.eval import records
from model.eval.records import BASE, Record

ROOT = pathlib.Path(__file__).resolve().parents[1]


def decoding(path: pathlib.Path, page: str = 'README.md') -> str:
  """The records of one run of `benchmark_decode` as a table, ours and the peers', at batch 1."""
  rows = [row for row in records.read(path) if row.config['batch'] == 1]
  own = rows[0].config
  dtype = own.get('dtype', 'float32')
  lines = [
    f'| | prefill, tokens/s | decode, tokens/s | decode, vs {dtype} | decode, of copy bandwidth |',
    '| --- | ---: | ---: | ---: | ---: |',
    *(_speed_line(row, dtype) for row in rows),
  ]
  head = '' if own['tied'] else ' with a head of its own'
  lines.append(
    f'\n{own["model"]}{_size(own)}{head}, random weights, a prompt '
    f'of {own["prompt"]} tokens, a {own["kv_cache"]} cache, '
    f'{rows[0].metrics["decode_tokens_per_s"].n} interleaved rounds on '
    f'{machine(rows[0])}, medians ± half an interquartile range; records with their command: '
    f'{link(path, page)}.'
  )
  return '\n'.join(lines)


def grouped(path: pathlib.Path) -> str:
  """The records of one run of `benchmark_grouped` on a GPU as a table."""
  rows = records.read(path)
  forms = ('dense', 'ragged_dot', 'blocks', 'at once')
  lines = [
    f'| rows | experts | {" | ".join(f"{form}, ms" for form in forms)} | at once, vs ragged_dot '
    '| gradients, vs ragged_dot |',
    f'| ---: | --- |{" ---: |" * (len(forms) + 2)}',
  ]
  for row in rows:
    gradients = row.metrics.get('gradients speedup')
    cells = [
      f'{row.config["rows"]:,}',
      row.recipe,
      *(f'{1e3 * row.value(f"{form} time"):.2f}' for form in forms),
      spread(row, 'at once speedup', '.2f'),
      '' if gradients is None else spread(row, 'gradients speedup', '.2f'),
    ]
    lines.append(f'| {" | ".join(cells)} |')
  one = rows[0]
  lines.append(
    f'\n{one.config["experts"]} experts of {one.config["inputs"]} x {one.config["outputs"]}, '
    f'rows in {one.config["dtype"]}, {one.config["groups"]} groups, medians of interleaved rounds; '
    f'`{one.command}` on {one.environment["device"]}, jax {one.environment["versions"]["jax"]}.'
  )
  return '\n'.join(lines)


def long_texts(path: pathlib.Path) -> str:
  """The records of one run of `long_context` as a table."""
  rows = records.read(path)
  one = rows[0]
  lines = [
    '| context | mixer, cache | prefill, s | decode, tokens/s | cache, MB | prefill holds, MB |',
    f'| ---: | --- |{" ---: |" * 4}',
  ]
  for row in rows:
    cells = [
      f'{row.config["context"]:,}',
      row.recipe,
      spread(row, 'prefill_s', '.2f'),
      spread(row, 'decode_tokens_per_s', '.1f'),
      f'{row.value("cache_bytes") / 1e6:,.1f}',
      f'{row.value("prefill_peak_bytes") / 1e6:,.0f}',
    ]
    lines.append(f'| {" | ".join(cells)} |')
  lines.append(
    f'\n{one.config["model"]}, {one.config["layers"]} layers in {one.config["dtype"]}, random '
    f'weights; {one.metrics["prefill_s"].n} interleaved rounds, medians ± half an interquartile '
    f'range; `{one.command}` on {machine(one)}.'
  )
  return '\n'.join(lines)


def beside_peers(path: pathlib.Path, page: str) -> str:
  """Speeds at long contexts, ours and the peers', from runs of `long_context`."""
  rows = records.read(path)
  lines = [
    '| context | weights, cache | prefill, tokens/s | decode, tokens/s |',
    '| ---: | --- | ---: | ---: |',
  ]
  for row in sorted(rows, key=lambda row: row.config['context']):
    peer = row.experiment.endswith('peer')
    rates = [f'{phase}_tokens_per_s' for phase in ('prefill', 'decode')]
    cells = [
      f'{row.config["context"]:,}',
      f'{row.recipe}, {row.config["kv_cache"]}' if peer else row.recipe,
      *(spread(row, rate, '.1f') if rate in row.metrics else '' for rate in rates),
    ]
    lines.append(f'| {" | ".join(cells)} |')
  commands = ', '.join(f'`{command}`' for command in dict.fromkeys(row.command for row in rows))
  lines.append(
    f'\nAt batch 1, medians of interleaved rounds ± half an interquartile range; {commands} on '
    f'{machine(rows[0])}; records: {link(path, page)}.'
  )
  return '\n'.join(lines)


def retrofit(path: pathlib.Path, page: str) -> str:
  """The records of runs of `long_context` on one model with several mixers as a table."""
  rows = records.read(path)
  names = dict.fromkeys(row.recipe for row in rows)
  found = {name: {} for name in names}  # -> {(context, metric): value}
  for row in rows:
    found[row.recipe] |= {(row.config['context'], key): m for key, m in row.metrics.items()}
  columns = _retrofit_columns(found)
  lines = [
    f'| mixer, cache | {" | ".join(columns)} |',
    f'| --- |{" ---: |" * len(columns)}',
  ]
  for name in names:
    cells = [_cell(found[name].get(key), form) for key, form in columns.values()]
    lines.append(f'| {" | ".join([name, *cells])} |')
  commands = ', '.join(f'`{command}`' for command in dict.fromkeys(row.command for row in rows))
  texts = ', '.join(dict.fromkeys(r.config['text'] for r in rows if 'text' in r.config))
  lines.append(
    f'\nHeld-out text: {texts}. Ratios are medians of interleaved rounds ± half an interquartile '
    f'range. {commands} on {machine(rows[0])}; records: {link(path, page)}.'
  )
  return '\n'.join(lines)


def _retrofit_columns(found) -> dict[str, tuple]:
  """The title of each column -> (context, metric), and how its number is written."""
  keys = sorted({key for metrics in found.values() for key in metrics}, key=lambda key: key[0])
  of = lambda metric: [context for context, name in keys if name == metric]
  columns, before = {}, 0
  for context in of('ppl'):
    columns[f'perplexity {before:,} to {context:,}'] = (context, 'ppl'), '.3f'
    before = context
  for context in of('needle_probability'):
    columns[f'needle in {context:,}'] = (context, 'needle_probability'), '.3f'
  for context in of('decode_speedup'):
    columns[f'cache at {context:,}, MB'] = (context, 'cache_bytes'), 'MB'
    columns[f'decode at {context:,}, vs dense'] = (context, 'decode_speedup'), '±'
  return columns


def _cell(metric: records.Metric | None, form: str) -> str:
  if metric is None:
    return ''
  if form == 'MB':
    return f'{metric.value / 1e6:,.1f}'
  if form == '±':
    return f'{metric.value:.2f} ± {metric.spread / 2:.2f}'
  return f'{metric.value:{form}}'


def _size(config: Mapping[str, Any]) -> str:
  """What stands in records of models with experts: depth, and parameters in all and of a token."""
  if config.get('active_parameters', 0) == config.get('parameters', 0):
    return ''
  total, active = config['parameters'] / 1e9, config['active_parameters'] / 1e9
  return f' of {config["layers"]} layers ({total:.2f} B parameters, {active:.2f} B of them active)'


def _speed_line(row: Record, dtype: str) -> str:
  ours = 'decode_speedup' in row.metrics
  name = {BASE: dtype}.get(row.recipe, row.recipe)
  cells = [
    f'Lissom {name}' if ours else name,
    spread(row, 'prefill_tokens_per_s', '.0f'),
    spread(row, 'decode_tokens_per_s', '.0f'),
    spread(row, 'decode_speedup', '.2f') if ours else '',
    f'{row.value("decode_of_copy"):.0%}' if ours else '',
  ]
  return f'| {" | ".join(cells)} |'


def machine(row: Record) -> str:
  """The device of a record, or the processor with its cores."""
  if row.environment.get('platform', 'cpu') != 'cpu':
    return row.environment['device']
  return f'{row.environment["cpu"]}, {row.environment["cpu_cores"]} cores'


def link(path: pathlib.Path, page: str = 'README.md') -> str:
  """A link from a page to a file of records."""
  up = '../' * page.count('/')
  return f'[`{path.relative_to(ROOT)}`]({up}{path.relative_to(ROOT)})'


def spread(row: Record, name: str, digits: str) -> str:
  """A metric ± half of its interquartile range."""
  metric = row.metrics[name]
  return f'{metric.value:{digits}} ± {metric.spread / 2:{digits}}'
