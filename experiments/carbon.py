"""Energy and emissions of a whole run by codecarbon, if asked for: an estimate, and named so.

codecarbon (https://github.com/mlco2/codecarbon) reads counters where it can and estimates by tables
where it cannot, for the memory always. So its totals have a file of their own and never enter the
joules per token. Its offline tracker loads nothing from the network and is told the country, whose
mix of electricity gives the emissions. It counts from here to the end of the run; what an earlier,
killed run did is not in it. It looks at the machine every 15 seconds in a thread of its own.
"""

import contextlib
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

from absl import flags

FILE = 'codecarbon.json'


class Totals:
  """The totals of a run, which `write` ends. Without a tracker there are none."""

  def __init__(self, tracker: Any = None):
    self._tracker = tracker
    self.found: dict[str, Any] = {}

  def write(self, folder: pathlib.Path) -> None:
    """Ends the tracking and writes the totals into a file of the folder."""
    self.end()
    if self.found:
      (folder / FILE).write_text(json.dumps(self.found, indent=2) + '\n')

  def end(self) -> None:
    """Ends the tracking."""
    if self._tracker is None:
      return
    tracker, self._tracker = self._tracker, None
    tracker.stop()
    data = getattr(tracker, 'final_emissions_data', None)  # it hides its own failures
    if data is None:
      return
    self.found = {
      'source': f'estimate by codecarbon {data.codecarbon_version}',
      'country': data.country_iso_code,
      'seconds': data.duration,
      'energy_kwh': data.energy_consumed,
      'cpu_energy_kwh': data.cpu_energy,
      'gpu_energy_kwh': data.gpu_energy,
      'memory_energy_kwh': data.ram_energy,
      'emissions_kg_co2eq': data.emissions,
    }

  def __str__(self) -> str:
    """One sentence, or nothing."""
    if not self.found:
      return ''
    energy_wh, grams = 1e3 * self.found['energy_kwh'], 1e3 * self.found['emissions_kg_co2eq']
    return (
      f'{self.found["source"]}, no measurement: {energy_wh:.4g} Wh and {grams:.4g} g of CO2 '
      f'equivalents in {self.found["country"]} for the whole run'
    )


def define() -> dict[str, flags.FlagHolder]:
  """The flags of codecarbon; `tracked` reads them."""
  return {
    'codecarbon': flags.DEFINE_bool(
      'codecarbon', False, "Estimate the whole run's energy and emissions by codecarbon."
    ),
    'country': flags.DEFINE_string(
      'country', None, 'The country of the machine for --codecarbon, by ISO 3166: DEU, USA, ...'
    ),
  }


@contextlib.contextmanager
def tracked(holders: dict[str, flags.FlagHolder], codecarbon: Any = None) -> Iterator[Totals]:
  """Tracks what is done within the block, or until `Totals.write`, if it is asked for.

  `codecarbon` is the module (None: the installed one). Raises ValueError if the country is missing
  or unknown, or codecarbon is not installed.
  """
  if not holders['codecarbon'].value:
    if holders['country'].value is not None:
      raise ValueError('--country is the country of --codecarbon; give both or neither')
    yield Totals()
    return
  totals = Totals(_start(holders['country'].value, codecarbon))
  try:
    yield totals
  finally:
    totals.end()


def _start(country: str | None, codecarbon: Any) -> Any:
  if country is None:
    raise ValueError('--codecarbon needs the country whose electricity is used: --country=DEU')
  if codecarbon is None:
    try:
      import codecarbon
    except ImportError:
      raise ValueError('--codecarbon needs codecarbon: pip install codecarbon') from None
  logging.getLogger('codecarbon').setLevel(logging.ERROR)
  known = codecarbon.input.DataSource().get_global_energy_mix_data()
  if country not in known:
    raise ValueError(f'codecarbon knows no country {country!r}; a code has 3 letters, such as DEU')
  tracker = codecarbon.OfflineEmissionsTracker(
    country_iso_code=country, save_to_file=False, log_level='error'
  )
  tracker.start()
  return tracker
