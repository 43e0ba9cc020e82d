"""The columns of the comparison: the metric of each, its format, and its meaning."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

from model.eval import library_tasks, select, tasks
from model.eval.records import Record

DASH = '–'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
  """One column of both tables: its names, how it formats a number, and what the number means."""

  metric: str
  title: str  # for a page
  short: tuple[str, str] | None  # for a terminal: the two lines of its heading; None: not there
  show: Callable[[float], str]
  meaning: str
  bar: bool = False  # a small bar in the cell
  bar_from: float = 0.0  # the value of an empty bar
  optional: bool = False  # left out where no record has the metric
  names_unit: bool = False  # the heading of a page ends in the unit of the metric
  error: str | None = None  # the metric of its standard error, which stands beside the number


def change(ratio: float) -> str:
  """A ratio as a change in per cent, or as a factor from 2 on."""
  return f'{ratio - 1:+.2%}' if ratio < 2 else f'×{ratio:,.4g}'


def _rate(value: float) -> str:
  return f'{value:,.0f}' if value >= 100 else f'{value:.1f}'


def _size(value: float) -> str:
  return f'{value / select.MEGABYTE:,.2f}' if value < 1e9 else f'{value / select.MEGABYTE:,.0f}'


def _accuracy(task: str) -> Column:
  return Column(
    metric=f'{tasks.ACCURACY}:{task}',
    title=f'{task}: right, %',
    short=(task.removeprefix('python_'), 'right, %'),
    show=lambda v: f'{100 * v:.1f}',
    meaning='The share of documents of this task that are right, ± its standard error; '
    'accuracy_change in the records has the difference to the base and its smaller error.',
    optional=True,
    error=f'{tasks.ACCURACY}_se:{task}',
  )


COLUMNS = (
  Column(
    metric='ppl',
    title='perplexity',
    short=('', 'perplexity'),
    show=lambda v: f'{v:,.2f}' if v < 1e5 else f'{v:.2e}',
    meaning='exp of the mean negative log likelihood per token of held-out text, computed by the '
    'products whose speed is shown; lower is better.',
  ),
  Column(
    metric='ppl_ratio',
    title='perplexity vs base',
    short=('ppl', 'vs base'),
    show=change,
    meaning="Perplexity against the base's: +1% is one per cent worse; a factor if at least twice.",
    bar=True,
    bar_from=1.0,
  ),
  Column(
    metric='widened_ppl_ratio',
    title='perplexity vs base, weights widened',
    short=None,
    show=change,
    meaning='The same weights multiplied in floating point. The difference to the column before '
    'is the price of products that round activations to be fast.',
    optional=True,
  ),
  Column(
    metric='kl_to_base',
    title='KL divergence, nats per token',
    short=('KL', 'nats'),
    show=lambda v: f'{v:.4f}',
    meaning='KL divergence from the base: how far the predicted distributions moved.',
  ),
  Column(
    metric='flip_rate',
    title='changed top predictions, %',
    short=('flips', '%'),
    show=lambda v: f'{100 * v:.2f}',
    meaning='Flip rate: the share of tokens whose most likely prediction is not that of the base.',
  ),
  *map(_accuracy, library_tasks.TASKS),
  Column(
    metric='experts_changed',
    title='tokens with other experts, %',
    short=('experts', '%'),
    show=lambda v: f'{100 * v:.2f}',
    meaning='The share of tokens whose set of experts is not that of the base, over all layers.',
    optional=True,
  ),
  Column(
    metric='linear_bytes',
    title='size of linear layers, MB',
    short=('linear', 'MB'),
    show=_size,
    meaning='Stored bytes of the linear layers’ weights, with scales and indices.',
    bar=True,
  ),
  Column(
    metric='linear_bytes_vs_bf16',
    title='size, of bfloat16',
    short=('of', 'bf16'),
    show=lambda v: f'{v:.3f}',
    meaning='This size divided by that of the same weights in bfloat16.',
  ),
  Column(
    metric='bits_per_weight',
    title='bits per weight',
    short=('bits', 'weight'),
    show=lambda v: f'{v:.2f}',
    meaning='Stored bits per element of the linear layers.',
  ),
  Column(
    metric='prefill_tokens_per_s',
    title='reading a prompt, tokens/s',
    short=('prefill', 'tok/s'),
    show=_rate,
    meaning='Prefill: prompt tokens processed per second.',
    bar=True,
  ),
  Column(
    metric='prefill_speedup',
    title='reading a prompt, speed vs base',
    short=('vs', 'base'),
    show=lambda v: f'{v:.2f}×',
    meaning='Speed of the prefill against the base, timed in the same rounds; above 1 is faster.',
  ),
  Column(
    metric='decode_tokens_per_s',
    title='generating, tokens/s',
    short=('decode', 'tok/s'),
    show=_rate,
    meaning='Decode: new tokens generated per second.',
    bar=True,
  ),
  Column(
    metric='decode_speedup',
    title='generating, speed vs base',
    short=('vs', 'base'),
    show=lambda v: f'{v:.2f}×',
    meaning='Speed of decoding against the base, timed in the same rounds; above 1 is faster.',
  ),
  Column(
    metric='energy_j_per_token',
    title='generating, joules per token',
    short=('energy', 'J/tok'),
    show=lambda v: f'{v:.4g}',
    meaning='Energy per new token by counters of the hardware, idle power included; see “How it '
    'was measured” for which counters.',
    optional=True,
  ),
  Column(
    metric='money_per_million_tokens',
    title='generating, price of a million tokens',
    short=('price', '/Mtok'),
    show=lambda v: f'{v:,.4g}',
    meaning='The price of the time of a million new tokens, from a price per hour that was given.',
    optional=True,
    names_unit=True,
  ),
)


def of_terminal(measured: Collection[str] = ()) -> tuple[Column, ...]:
  """The columns of a terminal; optional ones only if they are among the metrics `measured`."""
  shown = [c for c in COLUMNS if c.short is not None]
  return tuple(c for c in shown if not c.optional or c.metric in measured)


def of_page(records: Sequence[Record]) -> tuple[Column, ...]:
  """The columns of a page that shows these records."""
  units: dict[str, set[str]] = {}
  for record in records:
    for name, metric in record.metrics.items():
      units.setdefault(name, set()).add(metric.unit)
  shown = (c for c in COLUMNS if not c.optional or c.metric in units)
  named = lambda c: f'{c.title}, {" or ".join(sorted(units[c.metric]))}'
  return tuple(dataclasses.replace(c, title=named(c)) if c.names_unit else c for c in shown)


def value(record: Record, column: Column, records: Sequence[Record]) -> float | None:
  """The number in this column, or None if it was not measured."""
  if column.metric == 'ppl_ratio':
    return select.ppl_ratio(record, records)
  return record.value(column.metric)


def text(number: float | None, column: Column) -> str:
  """A number in the format of this column; an en dash if there is none."""
  if number is None:
    return DASH
  return column.show(number) if math.isfinite(number) else non_finite(number)


def cell(record: Record, column: Column, number: float | None) -> str:
  """A number of a record in the format of its column, with its standard error if it has one."""
  shown = text(number, column)
  error = None if column.error is None else record.value(column.error)
  return shown if error is None else f'{shown}±{text(error, column)}'


def bar_percent(number: float | None, column: Column, numbers: Sequence[float | None]) -> float:
  """The length of a cell's bar in per cent of the column's longest; 0: no bar."""
  finite = [n - column.bar_from for n in numbers if n is not None and math.isfinite(n)]
  longest = max(finite, default=0.0)
  if not column.bar or longest <= 0 or number is None or not math.isfinite(number):
    return 0.0
  return round(100 * max(0.0, number - column.bar_from) / longest, 1)


def spread(record: Record, column: Column) -> str:
  """The spread of the column's metric in words, or nothing."""
  metric = record.metrics.get(column.metric)
  if metric is None or metric.spread is None or not math.isfinite(metric.spread):
    return ''
  return f'interquartile range {column.show(metric.spread)}, n = {metric.n:,}'


def plain(number: float) -> str:
  """A number of any metric, to five digits or as an integer."""
  if not math.isfinite(number):
    return non_finite(number)
  if abs(number) < 1e15 and (number == int(number) or abs(number) >= 1e4):
    return f'{number:,.0f}'
  return f'{number:.5g}'


def non_finite(number: float) -> str:
  return 'NaN' if math.isnan(number) else ('∞' if number > 0 else '−∞')
