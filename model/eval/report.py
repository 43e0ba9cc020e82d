"""The comparison of recipes for people: pareto.png and report.html.

Everything is made from records alone. A metric that a record lacks is an en dash; a metric without
a column is listed below the table with its unit. The page is one file: it loads nothing from the
network, escapes every string, and can be read without JavaScript.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from model.eval import columns, figures, select
from model.eval.columns import DASH
from model.eval.records import BASE, Record, replacing

NO_KERNEL = 'no kernel'
DEFAULT_BUDGET = select.Budget(max_ppl_ratio=1.05)

PROTOCOL = (
  'Perplexity: the text is tokenized once and cut into consecutive windows of seq_len tokens; the '
  'last, shorter one is dropped and no BOS is added. In each window every token but the first is '
  'predicted; perplexity = exp(sum of NLL / count).',
  'KL divergence and flip rate compare with the base on the same windows.',
  'Quality and speed are those of the same program: the weights as they are prepared for this '
  'device, whose products may round activations. The perplexity of the same weights in '
  'floating-point products is given beside it where it differs (widened_ppl_ratio).',
  'Time: at least 3 warm-up calls, then at least 5 rounds in which all programs take turns; '
  'medians with interquartile ranges, and ratios to the base within each round.',
  'Bytes: those that are stored, with scales and indices. 1 MB is 1,000,000 bytes.',
  'Zeros that are multiplied save no time. “No kernel” marks recipes some of whose weights no '
  'kernel of this device makes faster.',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
  """What the page shows besides the records."""

  title: str = 'Compression report'
  choice: select.Choice | None = None  # None: the smallest recipe within 5 % of the perplexity
  use: Mapping[str, str] = dataclasses.field(default_factory=dict)  # recipe -> command to run it
  protocol: tuple[str, ...] = PROTOCOL


def html(records: Sequence[Record], page: Page | None = None) -> str:
  """The page as one string."""
  page = page or Page()
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  choice = page.choice or select.choose(records, DEFAULT_BUDGET)
  return environment.get_template('report.html.jinja').render(
    page=page,
    choice=choice,
    cards=_cards(choice.record or choice.nearest, records),
    columns=columns.of_page(records),
    rows=_rows(records),
    plain=columns.plain,
    chart=figures.svg(records),
    styles=figures.STYLES,
    labels=(figures.X_LABEL, figures.Y_LABEL),
    protocol=(*page.protocol, *(f'Energy per token: {s}.' for s in energy_sources(records))),
    ledger=[(r.recipe, event) for r in records for event in r.ledger],
    environments=_environments(records),
  )


def energy_sources(records: Sequence[Record]) -> list[str]:
  """What the energy was measured with, or why it was not, in order of the records."""
  return list(dict.fromkeys(r.config['energy'] for r in records if 'energy' in r.config))


def write(
  records: Sequence[Record], folder: str | os.PathLike, page: Page | None = None
) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes report.html and pareto.png into the folder and returns their paths."""
  if not records:
    raise ValueError('there are no records to report')
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  page_path, figure_path = folder / 'report.html', folder / 'pareto.png'
  figures.write_png(records, figure_path)
  with replacing(page_path) as partial:
    partial.write_text(html(records, page), encoding='utf-8')
  return page_path, figure_path


def _rows(records: Sequence[Record]) -> list[dict[str, Any]]:
  """The values of each row of the table, and of the details below it."""
  shown = columns.of_page(records)
  numbers = {c.metric: [columns.value(r, c, records) for r in records] for c in shown}
  rows = []
  for i, record in enumerate(records):
    cells = [_cell(record, c, numbers[c.metric][i], numbers[c.metric]) for c in shown]
    metrics = [(name, columns.plain(m.value), m) for name, m in sorted(record.metrics.items())]
    rows.append({'record': record, 'is_base': record.recipe == BASE, 'cells': cells})
    rows[-1]['metrics'] = metrics
  return rows


def _cell(record: Record, column: columns.Column, number, numbers) -> dict[str, Any]:
  return {
    'text': columns.cell(record, column, number),
    'sort': number if number is not None and math.isfinite(number) else '',
    'bar': columns.bar_percent(number, column, numbers),
    'spread': columns.spread(record, column),
  }


def _cards(record: Record | None, records: Sequence[Record]) -> list[tuple[str, str]]:
  """The three numbers under the headline: (number, what it is)."""
  if record is None:
    return []
  base = next((r.value(select.BYTES) for r in records if r.recipe == BASE), None)
  size, ratio = record.value(select.BYTES), select.ppl_ratio(record, records)
  speed = record.value('decode_speedup')
  cards = [
    (f'{base / size:.2f}×' if base and size else DASH, 'smaller than the base'),
    (columns.change(ratio) if ratio is not None else DASH, 'perplexity against the base'),
    (f'{speed:.2f}×' if speed is not None else DASH, 'decoding speed against the base'),
  ]
  if record.without_kernel:
    cards[2] = (cards[2][0], 'decoding speed: no kernel here, no speed-up expected')
  return cards


def _environments(records: Sequence[Record]) -> list[tuple[list[str], list[tuple[str, str]]]]:
  """Each distinct environment, apart from dates, as (recipes measured there, its facts)."""
  groups: dict[tuple, list[str]] = {}
  for record in records:
    facts = tuple((k, v) for k, v in _flat(record.environment) if k != 'date_utc')
    groups.setdefault(facts, []).append(record.recipe)
  dates = sorted(str(r.environment['date_utc']) for r in records if 'date_utc' in r.environment)
  when = [('date_utc', f'{dates[0]} to {dates[-1]}')] if dates else []
  return [(recipes, [*facts, *when]) for facts, recipes in groups.items()]


def _flat(data: Mapping, prefix: str = '') -> list[tuple[str, str]]:
  pairs = []
  for key, value in data.items():
    if isinstance(value, Mapping):
      pairs += _flat(value, f'{prefix}{key}.')
    else:
      pairs.append((f'{prefix}{key}', DASH if value is None else str(value)))
  return pairs
