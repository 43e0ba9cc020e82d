"""Tables of docs/compressing.md on vocabularies, from records of `vocabulary` and `fertility`."""

import pathlib
import shlex

from experiments.speed_tables import link, machine, spread
from model.eval import records
from model.eval.records import Record

PAGE = 'docs/compressing.md'
ELSEWHERE = ('--model', '--text', '--out', '--output')  # flags that do not tell rows apart


def vocabularies(path: pathlib.Path) -> str:
  """One change of a vocabulary a line."""
  rows = records.read(path)
  lines = [
    '| | tokens | parameters saved | bits/byte before | after | bytes/token before | after |',
    f'| --- |{" ---: |" * 6}',
    *(_vocabulary_line(row) for row in rows),
  ]
  about = rows[0]
  lines.append(
    f'\n`python -m experiments.vocabulary --model={about.config["model"]} --text=python-docs` with '
    f'the flags of a line, {about.config["max_windows"]} windows of {about.config["seq_len"]} '
    f'tokens; records: {link(path, PAGE)}.'
  )
  return '\n'.join(lines)


def _vocabulary_line(row: Record) -> str:
  words = shlex.split(row.command)[3:]
  own = [word for word in words if word.split('=')[0] not in ELSEWHERE]
  both = lambda name: [row.value(f'{name}_{when}') for when in ('before', 'after')]
  before, after = both('parameters')
  cells = [
    f'`{" ".join(own)}`',
    f'{row.value("vocab_size_after"):,.0f}',
    f'{1 - after / before:.1%}',
    *(f'{value:.3f}' for value in both('bits_per_byte') + both('bytes_per_token')),
  ]
  return f'| {" | ".join(cells)} |'


def fertility(path: pathlib.Path) -> str:
  """The speeds of models whose vocabularies differ, one a line."""
  rows = records.read(path)
  lines = [
    '| model | tokens | bytes per token | tokens/s | bytes/s | speed |',
    f'| --- |{" ---: |" * 5}',
    *(_fertility_line(row) for row in rows),
  ]
  about = rows[0]
  lines.append(
    f'\nIn float32 at batch 1, medians ± half an interquartile range; `{about.command}` on '
    f'{machine(about)}; records: {link(path, PAGE)}.'
  )
  return '\n'.join(lines)


def _fertility_line(row: Record) -> str:
  cells = [
    f'`{row.recipe}`',
    f'{row.value("vocab_size"):,.0f}',
    f'{row.value("bytes_per_token"):.3f}',
    spread(row, 'tokens_per_s', '.1f'),
    spread(row, 'text_bytes_per_s', '.0f'),
    spread(row, 'token_speedup', '.2f'),
  ]
  return f'| {" | ".join(cells)} |'
