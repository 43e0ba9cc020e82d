"""What the main job prints: a list of recipes, a table row by row, and the files it wrote."""

import dataclasses
import pathlib
import sys
from collections.abc import Collection, Sequence

from experiments import common
from experiments.comparison import LAYERS, MODELS, RECORDS
from experiments.inputs import HELD_OUT
from model.compress import recipe, registry
from model.compress.recipe import Recipe
from model.eval import columns, report, select
from model.eval.records import BASE, Record

MIN_WIDTH = 7  # of a column: all that `columns` shows of usual models fits in
CLEAR_LINE = '\r\x1b[K'


class Table:
  """A table whose rows appear one by one, in columns of a width that is known before.

  `measured` names optional metrics that have a column.

  Rows go to stdout. The recipe at work goes to stderr: on a terminal as a line that the next row
  replaces.
  """

  def __init__(self, names: Sequence[str], measured: Collection[str] = ()):
    self._columns = columns.of_terminal(measured)
    self._name_width = max(map(len, ['recipe', BASE, *names]))
    self._widths = [max(MIN_WIDTH, *map(len, column.short)) for column in self._columns]
    self._count, self._rows = len(names), []

  def header(self) -> None:
    """Prints the two lines of headings."""
    self._print('', [column.short[0] for column in self._columns])
    self._print('recipe', [column.short[1] for column in self._columns])
    print('-' * (self._name_width + sum(self._widths) + len(self._widths)), flush=True)

  def start(self, i: int, one: Recipe) -> None:
    """Names the recipe that is at work."""
    line = f'[{i + 1}/{self._count}] {one.name}: {one.description}'
    transient = sys.stderr.isatty()
    print(line, end='' if transient else '\n', file=sys.stderr, flush=True)

  def row(self, record: Record) -> None:
    """Prints what was measured of a recipe."""
    self._rows.append(record)
    if sys.stderr.isatty():
      print(CLEAR_LINE, end='', file=sys.stderr, flush=True)
    values = [(c, columns.value(record, c, self._rows)) for c in self._columns]
    cells = [columns.cell(record, c, value) for c, value in values]
    self._print(record.recipe, cells, report.NO_KERNEL if record.without_kernel else '')

  def _print(self, name: str, cells: Sequence[str], mark: str = '') -> None:
    padded = [cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True)]
    print(' '.join([name.ljust(self._name_width), *padded, mark]).rstrip(), flush=True)


def listing() -> str:
  """Recipes and techniques, one per line."""
  lines = ['recipes:']
  for name in recipe.names(common.RECIPES):
    one = recipe.load(common.RECIPES / f'{name}.yaml')
    lines.append(f'  {name:18} {one.description}')
  lines.append('techniques (each is a recipe of one step, too):')
  for row in registry.TECHNIQUES.values():
    options = ', '.join(f.name for f in dataclasses.fields(row.spec))
    lines.append(f'  {row.name:18} {row.summary} Options: {options}. {row.paper}')
  return '\n'.join(lines)


def results(
  rows: Sequence[Record], choice: select.Choice, out: pathlib.Path, totals: str = ''
) -> str:
  """The chosen recipe, what the energy was measured with, and the files that were written.

  `totals`: the estimate for the whole run, if there is one.
  """
  best = choice.record or choice.nearest or rows[-1]
  return '\n'.join(
    [
      '',
      choice.reason,
      '',
      *(f'energy:  {source}' for source in report.energy_sources(rows)),
      *(f'total:   {text}' for text in [totals] if text),
      f'page:    {out}/report.html',
      f'picture: {out}/pareto.png',
      f'layers:  {out}/{LAYERS}',
      f'records: {out}/{RECORDS}',
      f'models:  {out}/{MODELS}/NAME; for instance',
      f'  python -m experiments.evaluate --model={out}/{MODELS}/{best.recipe} '
      f'--text={out}/{HELD_OUT} --seq_len={best.config["seq_len"]} --json',
    ]
  )
