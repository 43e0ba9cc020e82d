"""Tables in Markdown, for notebooks: of any cells, and of records in the columns of the report."""

from collections.abc import Sequence
from typing import Any

from model.eval import columns
from model.eval.records import Record


def markdown(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A table whose first column is on the left and whose others, the numbers, are on the right.

  Raises ValueError if a row has another number of cells than there are headings.
  """
  for row in rows:
    if len(row) != len(headings):
      raise ValueError(f'{len(headings)} headings, but {len(row)} cells: {row}')
  rules = ['---', *['---:'] * (len(headings) - 1)]
  return '\n'.join(f'| {" | ".join(map(str, row))} |' for row in [headings, rules, *rows])


def of_records(records: Sequence[Record], metrics: Sequence[str]) -> str:
  """One row for each recipe, and the columns of `model.eval.columns` with these metrics.

  Raises ValueError if there is no such column.
  """
  known = {column.metric: column for column in columns.COLUMNS}
  unknown = [metric for metric in metrics if metric not in known]
  if unknown:
    raise ValueError(f'no column shows {", ".join(unknown)}; there are {", ".join(known)}')
  shown = [known[metric] for metric in metrics]
  cell = lambda record, column: columns.cell(record, column, columns.value(record, column, records))
  return markdown(
    ['recipe', *(column.title for column in shown)],
    [[f'`{r.recipe}`', *(cell(r, column) for column in shown)] for r in records],
  )
