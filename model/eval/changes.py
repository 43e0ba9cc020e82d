"""Finds what became worse from a baseline run to others, beyond the noise in the records.

Quality is worse if it lost more than `STANDARD_ERRORS` of both records together. A time, a rate,
energy and a price are worse if the medians differ by more than the larger interquartile range,
which is about as strict at 5 to 7 rounds. Bytes are exact. Metrics without noise in the records, or
measured by another protocol, are not judged, and the report lists them.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

from model.eval import measures
from model.eval.measures import LOWER, Kind, Measure
from model.eval.runs import Row

STANDARD_ERRORS = 2.0
WORSE, BETTER, SAME, REFUSED, UNKNOWN = 'worse', 'better', 'same', 'refused', 'unknown'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """One metric of a row and of its like in the baseline.

  `verdict` is one of WORSE, BETTER, SAME, REFUSED (other protocols) and UNKNOWN (no noise known),
  the last two with reasons. The ratio is new / old; None if it is refused or has no meaning.
  """

  row: Row
  old: Row
  metric: str
  measure: Measure
  verdict: str
  reasons: tuple[str, ...] = ()

  @property
  def values(self) -> tuple[float, float]:
    """Old and new."""
    return self.old.record.metrics[self.metric].value, self.row.record.metrics[self.metric].value

  @property
  def ratio(self) -> float | None:
    old, new = self.values
    if self.verdict == REFUSED or not old or not math.isfinite(old) or not math.isfinite(new):
      return None
    return new / old

  @property
  def noises(self) -> tuple[float | None, float | None]:
    """The standard errors or interquartile ranges, old and new."""
    rows = self.old, self.row
    return tuple(measures.noise(row.record, self.metric)[0] for row in rows)


def like(row: Row, rows: Sequence[Row], baseline: str) -> Row | None:
  """The row of the baseline that this one is compared with, if there is one."""
  key = row.record.experiment, row.label
  if row.run == baseline:
    return None
  mine = (one for one in rows if one.run == baseline)
  return next((one for one in mine if (one.record.experiment, one.label) == key), None)


def compare(rows: Sequence[Row], baseline: str) -> list[Change]:
  """Every metric that a row and its like in the baseline have."""
  found = []
  for row in rows:
    old = like(row, rows, baseline)
    if old is not None:
      shared = (name for name in row.record.metrics if name in old.record.metrics)
      found += [_change(row, old, name) for name in shared]
  return found


def refusals(changes: Sequence[Change]) -> list[str]:
  """What was not compared and why, one line for each run, kind and reason."""
  counts = collections.Counter(
    (change.row.run, change.measure.kind.value, reason)
    for change in changes
    if change.verdict == REFUSED
    for reason in change.reasons
  )
  rows = {key: set() for key in counts}
  for change in changes:
    for reason in change.reasons if change.verdict == REFUSED else ():
      rows[change.row.run, change.measure.kind.value, reason].add(change.row.label)
  return [
    f'{run}, {kind}: {reason} ({_count(len(rows[run, kind, reason]))})'
    for run, kind, reason in counts
  ]


def unknowns(changes: Sequence[Change]) -> list[str]:
  """What could not be judged and why, one line for each metric and reason."""
  counts = collections.Counter(
    (change.metric, reason)
    for change in changes
    if change.verdict == UNKNOWN
    for reason in change.reasons
  )
  return [f'{metric}: {reason} ({_count(count)})' for (metric, reason), count in counts.items()]


def strangers(rows: Sequence[Row], baseline: str) -> list[str]:
  """The rows that only the baseline or only another run has, one line for each run."""
  labels: dict[str, dict] = {}
  for row in rows:
    labels.setdefault(row.run, {})[row.record.experiment, row.label] = row.label
  mine, lines = labels[baseline], []
  for run, others in labels.items():
    for what, some, rest in ((baseline, mine, others), (run, others, mine)):
      alone = [label for key, label in some.items() if key not in rest]
      if run != baseline and alone:
        lines.append(
          f'in {what} and not in {run if what == baseline else baseline}: {", ".join(alone)}'
        )
  return lines


def _count(rows: int) -> str:
  return f'{rows} row{"s" if rows > 1 else ""}'


def _change(row: Row, old: Row, name: str) -> Change:
  measure = measures.measure(name, row.record.metrics[name])
  verdict, reasons = _verdict(row, old, name, measure)
  return Change(
    row=row, old=old, metric=name, measure=measure, verdict=verdict, reasons=tuple(reasons)
  )


def _verdict(row: Row, old: Row, name: str, measure: Measure) -> tuple[str, list[str]]:
  different = measures.differences(name, row.record, old.record)
  if different:
    return REFUSED, different
  if measure.better is None:
    return SAME, []
  before, after = (one.record.metrics[name].value for one in (old, row))
  if not math.isfinite(before):
    return UNKNOWN, ['the baseline has no finite value']
  if not math.isfinite(after):
    return WORSE, ['no finite value any more']
  allowed, reason = _allowed(row, old, name, measure)
  if allowed is None:
    return UNKNOWN, [reason]
  loss = after - before if measure.better == LOWER else before - after
  return (WORSE if loss > allowed else BETTER if -loss > allowed else SAME), []


def _allowed(row: Row, old: Row, name: str, measure: Measure) -> tuple[float | None, str]:
  """The difference that noise may make; None and the reason where the records do not tell."""
  found = [measures.noise(one.record, name) for one in (old, row)]
  for noise, words in found:
    if noise is None:
      return None, words
  (first, _), (second, _) = found
  if measure.kind is Kind.QUALITY:
    return STANDARD_ERRORS * math.hypot(first, second), ''
  return max(first, second), ''
