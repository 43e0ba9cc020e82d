"""Tables of docs/serving.md from records: servers under load, drafts, and cascades."""

import pathlib
from collections.abc import Sequence

from experiments.speed_tables import link, machine, spread
from model.eval import records
from model.eval.records import Record

PAGE = 'docs/serving.md'


def servers(path: pathlib.Path) -> str:
  """One server and load a line."""
  rows = records.read(path)
  lines = [
    '| server | load | output, tokens/s | TTFT, ms: median | p95 | per token, ms: median | p95 |',
    f'| --- | --- |{" ---: |" * 5}',
    *(_server_line(row) for row in rows),
  ]
  about = rows[0]
  lines.append(
    f'\nPrompts of {about.config["prompt_tokens"]} tokens, answers of '
    f'{about.config["new_tokens"]}. {_source(rows, path)}'
  )
  return '\n'.join(lines)


def _server_line(row: Record) -> str:
  amount = f'{row.config["amount"]:g}'
  closed = row.config['load'] == 'closed'
  ms = lambda name: f'{1e3 * row.value(f"{name}_s"):,.0f}' if f'{name}_s' in row.metrics else ''
  cells = [
    f'`{row.recipe}`',
    f'{amount} clients' if closed else f'{amount} requests/s',
    _throughput(row),
    *(ms(f'{name}_{which}') for name in ('ttft', 'tpot') for which in ('median', 'p95')),
  ]
  return f'| {" | ".join(cells)} |'


def _throughput(row: Record) -> str:
  once = row.metrics['output_tokens_per_s'].n == 1
  return (
    f'{row.value("output_tokens_per_s"):.0f}' if once else spread(row, 'output_tokens_per_s', '.0f')
  )


def drafts(path: pathlib.Path) -> str:
  """One target with one draft a line."""
  rows = records.read(path)
  lines = [
    '| model | draft | proposals at a time | taken | tokens/s without | with | speed-up |',
    f'| --- | --- |{" ---: |" * 5}',
    *(_draft_line(row) for row in rows),
  ]
  lines.append(f'\n{_source(rows, path)}')
  return '\n'.join(lines)


def _draft_line(row: Record) -> str:
  taken = row.value('acceptance')
  cells = [
    f'`{row.config["target"]}`',
    f'`{row.recipe}`',
    str(row.config['tokens']),
    'none drafted' if taken is None else f'{taken:.0%}',
    f'{row.value("tokens_per_s_without"):.0f}',
    f'{row.value("tokens_per_s"):.0f}',
    spread(row, 'speedup', '.2f'),
  ]
  return f'| {" | ".join(cells)} |'


def cascades(path: pathlib.Path) -> str:
  """One cascade a line."""
  rows = records.read(path)
  lines = [
    '| small model | right alone | large alone | deferred | right together | speed, of the large '
    'alone |',
    f'| --- |{" ---: |" * 5}',
    *(_cascade_line(row) for row in rows),
  ]
  lines.append(f'\n{_source(rows, path)}')
  return '\n'.join(lines)


def _cascade_line(row: Record) -> str:
  shares = ('small quality', 'large quality', 'deferred', 'cascade quality')
  cells = [
    f'`{row.recipe}`',
    *(f'{row.value(name):.1%}' for name in shares),
    spread(row, 'speedup', '.2f'),
  ]
  return f'| {" | ".join(cells)} |'


def _source(rows: Sequence[Record], path: pathlib.Path) -> str:
  commands = ', '.join(f'`{command}`' for command in dict.fromkeys(row.command for row in rows))
  return (
    f'Medians ± half an interquartile range. {commands} on {machine(rows[0])}; records: '
    f'{link(path, PAGE)}.'
  )
