"""What generating costs: joules by the machine's counters, and money by a price that a user gives.

The flags of scripts that measure speed, and the metrics that they add to a record. Energy that no
counter measures is left out of the metrics, and the record says why. The totals of a run by
codecarbon are estimates where there is no counter, so they have a file of their own
(`experiments/carbon.py`).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from model.eval import energy, timing
from model.eval.energy import Meters
from model.eval.records import Metric

ENERGY, ENERGY_RATIO = 'energy_j_per_token', 'energy_ratio'
MONEY = 'money_per_million_tokens'
MILLION, HOUR_S = 1e6, 3600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
  """What an hour of the machine costs, in a currency that the user names."""

  per_hour: float
  currency: str

  def __post_init__(self):
    if not (self.per_hour > 0 and math.isfinite(self.per_hour)):
      raise ValueError(f'--price_per_hour must be a number above 0, not {self.per_hour}')
    if len(self.currency.split()) != 1:
      raise ValueError(f'--currency must be one word, such as USD, not {self.currency!r}')

  def per_million(self, seconds_per_token: Sequence[float]) -> Metric:
    """The median price of a million tokens, from the time of one in each round."""
    prices = [self.per_hour / HOUR_S * s * MILLION for s in seconds_per_token]
    return timing.summarize(prices, self.currency)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
  """What is measured, and at which price. None: not asked for."""

  meters: Meters | None = None
  price: Price | None = None

  @property
  def settings(self) -> dict:
    """The price, for the config of a record."""
    price = self.price
    return {} if price is None else {'price_per_hour': price.per_hour, 'currency': price.currency}

  @property
  def metrics(self) -> tuple[str, ...]:
    """The names of the metrics that are to be expected."""
    measured = self.meters is not None and self.meters.meters
    return (ENERGY,) * bool(measured) + (MONEY,) * (self.price is not None)

  def measure(
    self,
    calls: Mapping[str, Callable[[], Any]],
    timed: timing.Timing,
    tokens: int,
    rounds: int,
  ) -> tuple[dict[str, Metric], dict[str, str]]:
    """Metrics of the first of the calls, and for the config where its energy comes from.

    Each call makes `tokens` tokens; `timed` are the times of the first. With two calls, the ratio
    of the first to the second is measured in the same rounds.
    """
    found = {}
    if self.price is not None:
      found[MONEY] = self.price.per_million([s / tokens for s in timed.samples_s])
    if self.meters is None:
      return found, {}
    energies = energy.measure(calls, self.meters, rounds=rounds)
    if not energies.joules:
      return found, {'energy': energies.reason}
    first, *others = calls
    found[ENERGY] = energies.per(first, tokens, 'J/token')
    for other in others:
      found[ENERGY_RATIO] = timing.summarize(energies.joules[first] / energies.joules[other], '1')
    return found, {'energy': self.meters.source}

  def of_rounds(
    self, spent: Sequence['Spent'], seconds: Sequence[float], tokens: Sequence[int]
  ) -> tuple[dict[str, Metric], dict[str, str]]:
    """As `measure`, of rounds of a load that made so many tokens each."""
    found = {}
    if not all(tokens):
      return found, {}
    if self.price is not None:
      found[MONEY] = self.price.per_million([s / n for s, n in zip(seconds, tokens, strict=True)])
    if self.meters is None:
      return found, {}
    reason = next((one.reason for one in spent if one.reason), None)
    if reason:
      return found, {'energy': reason}
    each = [one.joules / n for one, n in zip(spent, tokens, strict=True)]
    return found | {ENERGY: timing.summarize(each, 'J/token')}, {'energy': self.meters.source}


@dataclasses.dataclass
class Spent:
  """The joules of a block, or why they are not known. Filled when the block ends."""

  joules: float = 0.0
  reason: str = ''


@contextlib.contextmanager
def counted(meters: Meters | None) -> Iterator[Spent]:
  """Counts the energy of a block that may take long."""
  spent = Spent()
  if meters is None or not meters.meters:
    spent.reason = '' if meters is None else meters.source
    yield spent
    return
  before = _read(meters, spent)
  with energy.polling(meters):
    yield spent
  spent.joules = _read(meters, spent) - before
  if not spent.reason and spent.joules <= 0:
    spent.reason = f'{energy.NOT_MEASURED}a counter stood still ({meters.source})'


def _read(meters: Meters, spent: Spent) -> float:
  try:
    return meters.read()
  except energy.CounterError as error:
    spent.reason = f'{energy.NOT_MEASURED}{error}'
    return 0.0


def define() -> dict[str, flags.FlagHolder]:
  """The flags of energy and money; `of` reads them."""
  return {
    'energy': flags.DEFINE_bool(
      'energy', True, 'Measure joules per token where the machine has counters (NVML, RAPL).'
    ),
    'price_per_hour': flags.DEFINE_float(
      'price_per_hour', None, 'What an hour of this machine costs, for the price of tokens.'
    ),
    'currency': flags.DEFINE_string('currency', 'USD', 'The currency of --price_per_hour.'),
  }


def of(holders: Mapping[str, flags.FlagHolder], *, gpus: int | None = 1) -> Costs:
  """Finds the counters, and reads the price. `gpus`: how many GPUs compute (None: all visible)."""
  per_hour = holders['price_per_hour'].value
  price = None
  if per_hour is not None:
    price = Price(per_hour=per_hour, currency=holders['currency'].value)
  wanted = holders['energy'].value
  found = energy.meters(jax.default_backend(), gpus=gpus) if wanted else None
  return Costs(meters=found, price=price)
