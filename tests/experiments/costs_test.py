"""Costs: the price of tokens, energy per token, and the totals of codecarbon apart from both."""

import contextlib
import json
import time
import types

import numpy as np
import pytest

from experiments import carbon, costs
from experiments.costs import Costs, Price, Spent
from model.eval.energy import CounterError, Meters
from model.eval.timing import Timing

PRICE = Price(per_hour=3.6, currency='EUR')


def _holders(**values):
  return {name: types.SimpleNamespace(value=value) for name, value in values.items()}


class Counter:
  """A counter that moves by a joule with each reading."""

  source, period_s = 'a counter', 0.0

  def __init__(self, broken=False):
    self.joules, self.broken = 0.0, broken

  def read(self):
    self.joules += 1
    if self.broken and self.joules > 1:
      raise CounterError('it broke')
    return self.joules


METERED = Costs(meters=Meters(meters=(Counter(),)), price=PRICE)


def test_the_price_is_that_of_the_time_of_a_million_tokens():
  # 3.6 an hour is a thousandth a second; ten tokens take 2, 4 and 9 seconds.
  timed = Timing(samples_s=(2.0, 4.0, 9.0), speedups=(1.0,) * 3)
  found, about = Costs(price=PRICE).measure({'this': None}, timed, 10, 5)
  metric = found.pop('money_per_million_tokens')
  assert (found, about) == ({}, {})
  assert (metric.value, metric.unit, metric.n) == (pytest.approx(400.0), 'EUR', 3)
  assert metric.spread == pytest.approx(350.0)
  assert Costs(price=PRICE).settings == {'price_per_hour': 3.6, 'currency': 'EUR'}
  assert Costs(price=PRICE).metrics == ('money_per_million_tokens',)


def test_energy_has_its_source_or_the_reason_why_it_is_not_measured():
  timed = Timing(samples_s=(1.0,), speedups=(1.0,))
  call = lambda: np.zeros(1)
  slept = lambda: time.sleep(0.25)
  found, about = METERED.measure({'this': slept, 'base': slept}, timed, 4, 1)
  assert found['energy_j_per_token'].value == pytest.approx(0.25)  # a joule per call of 4 tokens
  assert found['energy_ratio'].value == pytest.approx(1.0)
  assert about['energy'].startswith('a counter, with idle power')
  none = Costs(meters=Meters(missing=('no counter',)))
  assert none.measure({'this': call}, timed, 4, 1) == ({}, {'energy': 'not measured: no counter'})
  assert Costs().measure({'this': call}, timed, 4, 1) == ({}, {})
  assert none.metrics == () and METERED.metrics == (costs.ENERGY, costs.MONEY)


def test_rounds_of_a_load_are_counted():
  with costs.counted(METERED.meters) as spent:
    pass
  assert (spent.joules, spent.reason) == (1.0, '')
  rounds = [Spent(joules=6.0), Spent(joules=8.0)]
  found, about = METERED.of_rounds(rounds, [1.0, 2.0], [2, 2])
  assert (found['energy_j_per_token'].value, found['energy_j_per_token'].n) == (3.5, 2)
  assert found['money_per_million_tokens'].value == pytest.approx(750.0)
  assert 'a counter' in about['energy']
  with costs.counted(Meters(meters=(Counter(broken=True),))) as spent:
    pass
  assert spent.reason == 'not measured: it broke'
  found, about = METERED.of_rounds([rounds[0], spent], [1.0, 2.0], [2, 2])
  assert list(found) == ['money_per_million_tokens']
  assert about == {'energy': 'not measured: it broke'}
  assert METERED.of_rounds(rounds, [1.0, 2.0], [2, 0]) == ({}, {})
  with costs.counted(Meters(missing=('elsewhere',))) as spent:
    pass
  assert spent.reason == 'not measured: elsewhere'


def test_an_error_within_a_counted_block_comes_out():
  with pytest.raises(RuntimeError, match='mine'), costs.counted(METERED.meters):
    raise RuntimeError('mine')


@pytest.mark.parametrize(
  'per_hour, currency, message',
  [
    (0.0, 'USD', '--price_per_hour must be a number above 0, not 0.0'),
    (float('nan'), 'USD', '--price_per_hour must be a number above 0, not nan'),
    (1.0, '', "--currency must be one word, such as USD, not ''"),
    (1.0, 'US dollars', '--currency must be one word'),
  ],
)
def test_bad_prices_are_refused(per_hour, currency, message):
  holders = _holders(energy=False, price_per_hour=per_hour, currency=currency)
  with pytest.raises(ValueError, match=message):
    costs.of(holders)


def test_without_flags_energy_is_looked_for_and_nothing_has_a_price():
  found = costs.of(_holders(energy=True, price_per_hour=None, currency='USD'))
  assert found.price is None and found.meters is not None
  assert costs.of(_holders(energy=False, price_per_hour=None, currency='USD')) == Costs()


class Tracker:
  """Stands in for codecarbon's offline tracker."""

  made = []

  def __init__(self, **options):
    self.options, self.log = options, []
    self.made.append(self)

  def start(self):
    self.log.append('start')

  def stop(self):
    self.log.append('stop')
    self.final_emissions_data = types.SimpleNamespace(
      codecarbon_version='3.0', country_iso_code='DEU', duration=7.0, energy_consumed=0.002,
      cpu_energy=0.0015, gpu_energy=0.0, ram_energy=0.0005, emissions=0.0008,
    )  # fmt: skip


class Broken(Tracker):
  """One that hides its failure, as codecarbon does."""

  def stop(self):
    self.log.append('stop')


def _codecarbon(tracker=Tracker):
  source = types.SimpleNamespace(get_global_energy_mix_data=lambda: {'DEU': {}})
  return types.SimpleNamespace(
    OfflineEmissionsTracker=tracker, input=types.SimpleNamespace(DataSource=lambda: source)
  )


ASKED = _holders(codecarbon=True, country='DEU')


def test_the_totals_are_an_estimate_in_a_file_of_their_own(tmp_path):
  with carbon.tracked(ASKED, _codecarbon()) as totals:
    assert str(totals) == ''
    totals.write(tmp_path)
  assert Tracker.made[-1].log == ['start', 'stop']
  assert Tracker.made[-1].options['country_iso_code'] == 'DEU'
  written = json.loads((tmp_path / 'codecarbon.json').read_text())
  assert written['source'] == 'estimate by codecarbon 3.0'
  assert (written['energy_kwh'], written['memory_energy_kwh']) == (0.002, 0.0005)
  assert str(totals) == (
    'estimate by codecarbon 3.0, no measurement: 2 Wh and 0.8 g of CO2 equivalents in DEU for '
    'the whole run'
  )


def test_a_tracker_ends_with_the_run_however_that_ends(tmp_path):
  with contextlib.suppress(RuntimeError), carbon.tracked(ASKED, _codecarbon()):
    raise RuntimeError
  assert Tracker.made[-1].log == ['start', 'stop']
  with carbon.tracked(ASKED, _codecarbon(Broken)) as totals:
    totals.write(tmp_path)
  assert (str(totals), list(tmp_path.iterdir())) == ('', [])
  with carbon.tracked(_holders(codecarbon=False, country=None)) as totals:
    totals.write(tmp_path)
  assert (str(totals), list(tmp_path.iterdir())) == ('', [])


@pytest.mark.parametrize(
  'asked, country, message',
  [
    (True, None, '--codecarbon needs the country'),
    (True, 'Germany', "codecarbon knows no country 'Germany'; a code has 3 letters"),
    (False, 'DEU', '--country is the country of --codecarbon'),
  ],
)
def test_bad_countries_are_refused(asked, country, message):
  with pytest.raises(ValueError, match=message):
    with carbon.tracked(_holders(codecarbon=asked, country=country), _codecarbon()):
      pass
