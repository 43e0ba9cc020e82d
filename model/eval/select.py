"""Choosing among measured recipes: the best one within a budget, and the Pareto front.

Within a budget of bytes the lowest perplexity is best, within a budget of quality the fewest bytes.
Bytes are those of the whole model (`stored_bytes`), because all of it has to fit on a device.
Perplexity (`ppl`) is that of the model as it is timed. The base is never chosen.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from model.eval.records import BASE, Record

MEGABYTE = 1e6
BYTES = 'stored_bytes'
PERPLEXITY = 'ppl'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """Exactly one limit."""

  max_megabytes: float | None = None  # of 10^6 bytes, for all parameters
  max_ppl_ratio: float | None = None  # perplexity / the base's perplexity

  def __post_init__(self):
    limits = [x for x in (self.max_megabytes, self.max_ppl_ratio) if x is not None]
    if len(limits) != 1:
      raise ValueError('a budget is either max_megabytes or max_ppl_ratio: give exactly one')
    if not (limits[0] > 0 and math.isfinite(limits[0])):
      raise ValueError(f'a budget must be a positive number, not {limits[0]}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """The best record within a budget, or None and the record nearest to it, with the reason."""

  record: Record | None
  nearest: Record | None
  reason: str  # one sentence


def choose(records: Sequence[Record], budget: Budget) -> Choice:
  """Picks the best recipe within the budget among those whose bytes and perplexity are known."""
  candidates = [r for r in records if r.recipe != BASE and _measured(r)]
  if not candidates:
    reason = 'No recipe has both a finite perplexity and a size, so there is nothing to choose.'
    return Choice(record=None, nearest=None, reason=reason)
  if budget.max_megabytes is not None:
    return _smallest_perplexity(candidates, records, budget.max_megabytes)
  return _smallest_bytes(candidates, records, budget.max_ppl_ratio)


def ppl_ratio(record: Record, records: Sequence[Record]) -> float | None:
  """Perplexity divided by the base's: as recorded, or computed from the base's row, or None."""
  ratio = record.value('ppl_ratio')
  if ratio is not None:
    return ratio
  if record.recipe == BASE:
    return 1.0
  ppl = record.value(PERPLEXITY)
  base = next((r.value(PERPLEXITY) for r in records if r.recipe == BASE), None)
  return ppl / base if ppl is not None and base else None


def pareto_front(
  records: Sequence[Record],
  cost: Callable[[Record], float | None] | str = BYTES,
  loss: Callable[[Record], float | None] | str = PERPLEXITY,
) -> list[Record]:
  """The records that no other beats in both `cost` and `loss`, in order of cost.

  `cost` and `loss` are names of metrics or functions of a record. Records without a finite value of
  both are left out; of equal records the first is kept.
  """
  cost, loss = _reader(cost), _reader(loss)
  known = [r for r in records if _finite(cost(r)) and _finite(loss(r))]
  front, best = [], math.inf
  for record in sorted(known, key=lambda r: (cost(r), loss(r))):
    if loss(record) < best:
      front.append(record)
      best = loss(record)
  return front


def _smallest_perplexity(candidates, records, limit: float) -> Choice:
  fitting = [r for r in candidates if r.value(BYTES) <= limit * MEGABYTE]
  if not fitting:
    nearest = min(candidates, key=lambda r: (r.value(BYTES), r.value(PERPLEXITY)))
    reason = (
      f'No recipe fits in {limit:g} MB; {nearest.recipe} comes nearest with '
      f'{_describe(nearest, records)}.'
    )
    return Choice(record=None, nearest=nearest, reason=reason)
  best = min(fitting, key=lambda r: (r.value(PERPLEXITY), r.value(BYTES)))
  reason = (
    f'{best.recipe} has the lowest perplexity of the {_count(fitting)} in {limit:g} MB: '
    f'{_describe(best, records)}.'
  )
  return Choice(record=best, nearest=best, reason=reason)


def _smallest_bytes(candidates, records, limit: float) -> Choice:
  ratio = lambda r: ppl_ratio(r, records)
  known = [r for r in candidates if _finite(ratio(r))]
  if not known:
    reason = 'The perplexity of the base is not known, so no ratio to it can be kept.'
    return Choice(record=None, nearest=None, reason=reason)
  fitting = [r for r in known if ratio(r) <= limit]
  if not fitting:
    nearest = min(known, key=lambda r: (ratio(r), r.value(BYTES)))
    reason = (
      f"No recipe keeps perplexity within {limit:g} times the base's; {nearest.recipe} comes "
      f'nearest with {_describe(nearest, records)}.'
    )
    return Choice(record=None, nearest=nearest, reason=reason)
  best = min(fitting, key=lambda r: (r.value(BYTES), r.value(PERPLEXITY)))
  reason = (
    f'{best.recipe} is the smallest of the {_count(fitting)} within {limit:g} times the '
    f"base's perplexity: {_describe(best, records)}."
  )
  return Choice(record=best, nearest=best, reason=reason)


def _describe(record: Record, records: Sequence[Record]) -> str:
  """Size and perplexity in words, compared with the base's if those are known."""
  base = next((r.value(BYTES) for r in records if r.recipe == BASE), None)
  ratio = ppl_ratio(record, records)
  share = f' ({record.value(BYTES) / base:.0%} of the base)' if base else ''
  change = f' ({ratio - 1:+.1%})' if _finite(ratio) else ''
  size = f'{record.value(BYTES) / MEGABYTE:,.4g} MB{share}'
  return f'{size} at perplexity {record.value(PERPLEXITY):,.4g}{change}'


def _count(fitting) -> str:
  return f'{len(fitting)} recipe{"s" if len(fitting) > 1 else ""}'


def _measured(record: Record) -> bool:
  return _finite(record.value(BYTES)) and _finite(record.value(PERPLEXITY))


def _reader(metric):
  return metric if callable(metric) else lambda record: record.value(metric)


def _finite(value: float | None) -> bool:
  return value is not None and math.isfinite(value)
