"""Several runs compared with a baseline: runs.md, runs.csv, runs.html and pareto.png.

One table has a row for each recipe of each run. A cell has the number, and after it the ratio to
the baseline's, or `≠` where the two were measured by different protocols. The lists above the table
name what became worse, what became better, and what was not compared or not judged and why. The CSV
has all metrics. Everything is made from records alone, and the page loads nothing.
"""

import base64
import csv
import dataclasses
import io
import pathlib
from collections.abc import Sequence

import jinja2

from model.eval import changes, columns, measures, runs_figure, tables
from model.eval.changes import BETTER, REFUSED, WORSE, Change
from model.eval.columns import Column
from model.eval.records import replacing
from model.eval.runs import Row, Run

FIGURE = 'pareto.png'
NOT_COMPARED = '≠'
MOST_COLUMNS = 10  # of metrics that the main job does not have
# Ratios to the base of the same run; the ratio to the baseline's is in each cell.
LEFT_OUT = {'ppl_ratio', 'widened_ppl_ratio', 'linear_bytes_vs_bf16'}
NOTES = (
  f'A row is compared with the row of the same name in the baseline. “{NOT_COMPARED}” stands where '
  'a number was measured by another protocol, which is named above, so that no ratio is given.',
  f'Worse means: quality lost more than {changes.STANDARD_ERRORS:g} standard errors of both '
  'records together; the median of a speed, an energy or a price changed by more than the larger '
  'of both interquartile ranges; more bytes.',
  'An interquartile range is that of the rounds of one run. It does not tell how runs differ in '
  'another hour or on another machine; speeds against the base of the same run do that better.',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """Runs, the name of the one that the others are compared with, and what came of it."""

  runs: tuple[Run, ...]
  rows: tuple[Row, ...]
  baseline: str
  changes: tuple[Change, ...]
  columns: tuple[Column, ...]

  def of(self, verdict: str) -> list[Change]:
    """The changes with this verdict."""
    return [change for change in self.changes if change.verdict == verdict]

  @property
  def judged(self) -> int:
    """How many numbers could be judged."""
    kept = {WORSE, BETTER, changes.SAME}
    return sum(c.verdict in kept and c.measure.better is not None for c in self.changes)


def compare(
  runs: Sequence[Run], rows: Sequence[Row], baseline: str, metrics: Sequence[str] = ()
) -> Comparison:
  """Compares the rows with those of the baseline, and chooses the columns.

  Rows of one recipe come to stand together.
  `metrics` names columns; by default they are those of the main job's report, or the first that
  can be judged. Raises ValueError if no record has a metric.
  """
  labels = [row.label for row in rows]
  return Comparison(
    runs=tuple(runs),
    rows=tuple(sorted(rows, key=lambda row: labels.index(row.label))),
    baseline=baseline,
    changes=tuple(changes.compare(rows, baseline)),
    columns=tuple(_columns(rows, metrics)),
  )


def write(comparison: Comparison, folder: pathlib.Path) -> None:
  """Writes all files into the folder."""
  drawn = _drawn(comparison)
  has_figure = runs_figure.write_png(drawn, folder / FIGURE)
  figure = (folder / FIGURE).read_bytes() if has_figure else None
  for name, text in (
    ('runs.md', markdown(comparison, has_figure)),
    ('runs.csv', as_csv(comparison)),
    ('runs.html', html(comparison, figure)),
  ):
    with replacing(folder / name) as partial:
      partial.write_text(text, encoding='utf-8', newline='')


def markdown(comparison: Comparison, has_figure: bool = False) -> str:
  """The comparison as a text for a pull request or an issue."""
  parts = [f'# Runs compared with `{comparison.baseline}`', _facts(comparison)]
  parts += _listed(_refused(comparison))
  for title, verdict in (('Worse', WORSE), ('Better', BETTER)):
    found = comparison.of(verdict)
    parts += [f'## {title} than `{comparison.baseline}` beyond the noise: {len(found)}']
    parts += [_changes(found)] if found else []
  parts += _listed(_rest(comparison))
  heads = ['run', 'recipe', *(column.title for column in comparison.columns)]
  body = [
    [
      f'`{row.run}`',
      f'`{row.label}`',
      *(' '.join(_cell(row, c, comparison)) for c in comparison.columns),
    ]
    for row in comparison.rows
  ]
  parts += ['## All recipes', _table(heads, body)]
  if has_figure:
    parts += [f'![Perplexity against bytes]({FIGURE})']
  parts += ['\n'.join(f'- {note}' for note in NOTES)]
  return '\n\n'.join(parts) + '\n'


def as_csv(comparison: Comparison) -> str:
  """All metrics: a row for each recipe of each run; a metric has its ratio to the baseline's."""
  names = list(dict.fromkeys(name for row in comparison.rows for name in row.record.metrics))
  found = {
    (c.row.run, c.row.label, c.row.record.experiment, c.metric): c for c in comparison.changes
  }
  heads = [head for name in names for head in (name, f'{name}: spread', f'{name} / baseline')]
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['run', 'recipe', 'experiment', *heads, 'not compared'])
  for row in comparison.rows:
    cells, refused = [], []
    for name in names:
      metric = row.record.metrics.get(name)
      change = found.get((row.run, row.label, row.record.experiment, name))
      noise = None if metric is None else measures.noise(row.record, name)[0]
      cells += [None if metric is None else metric.value, noise, change and change.ratio]
      refused += change.reasons if change and change.verdict == REFUSED else ()
    told = '; '.join(dict.fromkeys(refused))
    writer.writerow([row.run, row.label, row.record.experiment, *cells, told])
  return text.getvalue()


def html(comparison: Comparison, figure: bytes | None = None) -> str:
  """The comparison as one page; `figure` is a PNG."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  cells = lambda row: [_cell(row, column, comparison) for column in comparison.columns]
  return environment.get_template('runs.html.jinja').render(
    comparison=comparison,
    facts=[_facts_of(run) for run in comparison.runs],
    refused=_refused(comparison),
    rest=_rest(comparison),
    worse=[_words(change) for change in comparison.of(WORSE)],
    better=[_words(change) for change in comparison.of(BETTER)],
    rows=[(row, cells(row)) for row in comparison.rows],
    figure=None if figure is None else base64.b64encode(figure).decode(),
    notes=NOTES,
  )


def words(change: Change) -> str:
  """A change in one line, for a terminal."""
  run, recipe, metric, old, new, ratio = _words(change)
  return f'{run}, {recipe}: {metric} {old} -> {new}{f" ({ratio})" if ratio else ""}'


def _columns(rows: Sequence[Row], metrics: Sequence[str]) -> list[Column]:
  records = [row.record for row in rows]
  units = {name: metric.unit for record in records for name, metric in record.metrics.items()}
  known = {column.metric: column for column in columns.of_page(records)}
  unknown = [name for name in metrics if name not in units]
  if unknown:
    raise ValueError(f'no record has {", ".join(unknown)}; there are {", ".join(sorted(units))}')
  names = metrics or [n for n in known if n in units and n not in LEFT_OUT]
  names = names or [n for n in units if _judgeable(n, records)][:MOST_COLUMNS] or list(units)
  return [known.get(name) or _plain_column(name, units[name]) for name in names]


def _judgeable(name: str, records) -> bool:
  metric = next(record.metrics[name] for record in records if name in record.metrics)
  return measures.measure(name, metric).better is not None


def _plain_column(name: str, unit: str) -> Column:
  title = name if unit == '1' else f'{name}, {unit}'
  return Column(metric=name, title=title, short=None, show=columns.plain, meaning='')


def _cell(row: Row, column: Column, comparison: Comparison) -> tuple[str, str]:
  """The number, and its ratio to the baseline's or the sign that there is none."""
  text = columns.text(row.record.value(column.metric), column)
  same = lambda c: c.row is row and c.metric == column.metric
  change = next(filter(same, comparison.changes), None)
  if change is None:
    return text, ''
  if change.verdict == REFUSED:
    return text, NOT_COMPARED
  return text, '' if change.ratio is None else f'×{change.ratio:.3f}'


def _words(change: Change) -> tuple[str, ...]:
  """Run, recipe, metric, old and new with their noise, and the ratio."""
  texts = []
  for value, noise in zip(change.values, change.noises, strict=True):
    text = columns.plain(value)
    texts.append(text if not noise else f'{text} ± {columns.plain(noise)}')
  ratio = '' if change.ratio is None else f'×{change.ratio:.4g}'
  return (change.row.run, change.row.label, change.metric, *texts, ratio)


def _changes(found: Sequence[Change]) -> str:
  heads = ['run', 'recipe', 'metric', 'old', 'new', 'ratio']
  return _table(heads, [[f'`{c}`' if i < 3 else c for i, c in enumerate(_words(x))] for x in found])


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
  safe = lambda cells: [cell.replace('|', '\\|').strip() for cell in cells]
  return tables.markdown(safe(heads), [safe(cells) for cells in body])


def _refused(comparison: Comparison) -> list[tuple[str, list[str]]]:
  """What was not compared, as lists with titles; an empty list is left out."""
  lines = changes.refusals(comparison.changes)
  lines += [f'{run} is not in the figure' for run in sorted(_not_drawn(comparison))]
  return [('Not compared, because the protocols differ', lines)] if lines else []


def _rest(comparison: Comparison) -> list[tuple[str, list[str]]]:
  """Likewise, what could not be compared or judged for other reasons."""
  models = dict.fromkeys(fact['model'] for fact in map(_facts_of, comparison.runs))
  lists = [
    ('Different models', list(models) if len(models) > 1 else []),
    ('In one run alone', changes.strangers(comparison.rows, comparison.baseline)),
    ('Not judged', changes.unknowns(comparison.changes)),
  ]
  return [(title, lines) for title, lines in lists if lines]


def _listed(lists: Sequence[tuple[str, list[str]]]) -> list[str]:
  return [
    part
    for title, lines in lists
    for part in (f'## {title}', '\n'.join(f'- {line}' for line in lines))
  ]


def _facts(comparison: Comparison) -> str:
  facts = [_facts_of(run) for run in comparison.runs]
  return _table(list(facts[0]), [list(fact.values()) for fact in facts])


def _facts_of(run: Run) -> dict[str, str]:
  """What was run and where, by the first record of the run."""
  first, about = run.records[0], run.records[0].environment
  texts = first.config.get('texts') or first.config.get('text') or columns.DASH
  revision = str(about.get('git_revision') or columns.DASH)[:10]
  return {
    'run': run.name,
    'records': str(len(run.records)),
    'model': str(first.config.get('model', columns.DASH)),
    'text': ', '.join(texts) if isinstance(texts, dict) else str(texts),
    'machine': measures.machine(first) or columns.DASH,
    'revision': revision + (' and changes' if about.get('git_dirty') else ''),
    'jax': str((about.get('versions') or {}).get('jax', columns.DASH)),
    'date': str(about.get('date_utc', columns.DASH))[:10],
  }


def _drawn(comparison: Comparison) -> list[Row]:
  """The rows whose quality may stand in one figure."""
  return [row for row in comparison.rows if row.run not in _not_drawn(comparison)]


def _not_drawn(comparison: Comparison) -> set[str]:
  """The runs whose perplexities are of another text, or cut in another way."""
  return {c.row.run for c in comparison.of(REFUSED) if c.metric == 'ppl_ratio'}
