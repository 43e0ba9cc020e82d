"""Energy by the counters of the hardware: NVML's of a GPU, RAPL's of CPU packages. No estimates.

A counter counts all that its chip does, the idle power and other processes included. NVML's
(`nvmlDeviceGetTotalEnergyConsumption`, from Volta on) moves only every 20 to 100 ms, RAPL's about
every millisecond, so a callable is repeated for many of these periods within each round, and
programs take turns as in `model.eval.timing`. Without a counter nothing is measured, and
`Meters.missing` says why. RAPL is read from Linux's powercap files
(https://www.kernel.org/doc/html/latest/power/powercap/powercap.html); most kernels let root alone
read them (CVE-2020-8694).
"""

import contextlib
import dataclasses
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from model import rounds as rounds_lib
from model.eval import timing
from model.eval.records import Metric

POWERCAP = pathlib.Path('/sys/class/powercap')
NVML_PERIOD_S, RAPL_PERIOD_S = 0.1, 0.001
PERIODS = 20  # of the slowest counter in a window: the first and the last are 5 % of it each
SHORTEST_S = 0.2
POLL_S = 30.0  # a package of 1 kW takes a minute to wrap the smallest counters around
NOT_MEASURED = 'not measured: '
INCLUDED = 'with idle power and all else that ran on it'


class CounterError(ValueError):
  """A counter cannot be read; the message says which and why."""


class Meter(Protocol):
  """A counter of energy. `source` names it, `period_s` is the time between its updates."""

  source: str
  period_s: float

  def read(self) -> float:
    """Joules since an arbitrary moment. Raises CounterError."""


class GpuMeter:
  """The energy of one GPU since its driver was loaded, by NVML."""

  period_s = NVML_PERIOD_S

  def __init__(self, nvml: Any, handle: Any):
    self._nvml, self._handle = nvml, handle
    self.source = f'NVML, {nvml.nvmlDeviceGetName(handle)}'

  def read(self) -> float:
    try:
      return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
    except self._nvml.NVMLError as error:
      raise CounterError(f'{self.source} has no counter of energy ({error})') from None


class ZoneMeter:
  """The energy of one RAPL zone since it was first read here.

  The counter begins again at `max_energy_range_uj`. One such wrap between two readings is counted
  right, so long windows need readings in between (`polling`).
  """

  period_s = RAPL_PERIOD_S

  def __init__(self, folder: pathlib.Path, source: str):
    self._file, self.source = folder / 'energy_uj', source
    self._range_uj = _microjoules(folder / 'max_energy_range_uj')
    self._last_uj, self._total_uj = _microjoules(self._file), 0

  def read(self) -> float:
    now_uj = _microjoules(self._file)
    moved_uj = now_uj - self._last_uj
    self._total_uj += moved_uj + (self._range_uj if moved_uj < 0 else 0)
    self._last_uj = now_uj
    return self._total_uj / 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meters:
  """The counters that together measure a computation, and in words what is not measured.

  There is none if the chip that computes has no counter, because a part of the energy would pass
  for all of it.
  """

  meters: tuple[Meter, ...] = ()
  missing: tuple[str, ...] = ()

  @property
  def source(self) -> str:
    """The counters and what they include, or why nothing is measured."""
    if not self.meters:
      return NOT_MEASURED + ('; '.join(self.missing) or 'not asked for')
    without = ''.join(f'; without {reason}' for reason in self.missing)
    return f'{" + ".join(m.source for m in self.meters)}, {INCLUDED}{without}'

  @property
  def window_s(self) -> float:
    """The shortest time that is worth measuring."""
    return max([SHORTEST_S, *(PERIODS * meter.period_s for meter in self.meters)])

  def read(self) -> float:
    """Joules since an arbitrary moment, of all counters together. Raises CounterError."""
    return sum(meter.read() for meter in self.meters)


def meters(
  platform: str,
  *,
  gpus: int | None = None,
  nvml: Any = None,
  powercap: pathlib.Path = POWERCAP,
  environment: Mapping[str, str] | None = None,
) -> Meters:
  """Finds the counters of what computes on `platform` ('cpu', 'gpu', ...), as JAX names it.

  On a GPU these are those of the first `gpus` visible GPUs (None: of all), and of the CPUs as well
  if they are readable. `nvml` is the module pynvml (None: the installed one), `powercap` the folder
  of RAPL's zones, `environment` has CUDA_VISIBLE_DEVICES.
  """
  found, missing = [], []
  if platform == 'gpu':
    try:
      found += _gpu_meters(nvml, gpus, os.environ if environment is None else environment)
    except CounterError as error:
      return Meters(missing=(str(error),))
  elif platform != 'cpu':
    return Meters(missing=(f'no counter is known for {platform}',))
  try:
    found += _package_meters(powercap)
  except CounterError as error:
    missing.append(str(error))
  return Meters(meters=tuple(found), missing=tuple(missing))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Energies:
  """Joules per call in each round, by the name of the callable, or why there are none."""

  joules: Mapping[str, np.ndarray]
  reason: str = ''

  def per(self, name: str, amount: float, unit: str) -> Metric:
    """Joules per unit of what a callable does `amount` of (tokens) per call."""
    return timing.summarize((self.joules[name] / amount).tolist(), unit)


def measure(
  calls: Mapping[str, Callable[[], Any]],
  found: Meters,
  *,
  rounds: int = timing.MIN_ROUNDS,
  clock: Callable[[], float] = time.perf_counter,
) -> Energies:
  """Reads the counters around repeated calls of each callable, in interleaved rounds.

  In each round a callable is repeated until `found.window_s` have passed. Callables are warm
  already. Results are waited for, as in `timing`.
  """
  if not found.meters:
    return Energies(joules={}, reason=found.source)
  names, samples = list(calls), {name: [] for name in calls}
  try:
    for r in range(rounds):
      turn = r % len(names)
      for name in names[turn:] + names[:turn]:
        samples[name].append(_window(calls[name], found, clock))
  except CounterError as error:
    return Energies(joules={}, reason=f'{NOT_MEASURED}{error}')
  if not all(joules > 0 for taken in samples.values() for joules in taken):
    reason = f'{NOT_MEASURED}a counter stood still ({found.source})'
    return Energies(joules={}, reason=reason)
  return Energies(joules={name: np.array(taken) for name, taken in samples.items()})


@contextlib.contextmanager
def polling(found: Meters, seconds: float = POLL_S) -> Iterator[None]:
  """Reads the counters at intervals, so that none wraps around twice unnoticed.

  Nothing else may read them within the block.
  """
  ended = threading.Event()

  def poll():
    while not ended.wait(seconds):
      with contextlib.suppress(CounterError):  # the reading after the block meets it again
        found.read()

  thread = threading.Thread(target=poll, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()


def _window(call, found: Meters, clock) -> float:
  """Joules per call."""
  count, start_s, before = 0, clock(), found.read()
  while count == 0 or clock() - start_s < found.window_s:
    rounds_lib.seconds(call)
    count += 1
  return (found.read() - before) / count


def _gpu_meters(nvml, gpus: int | None, environment: Mapping[str, str]) -> list[GpuMeter]:
  if nvml is None:
    try:
      import pynvml as nvml
    except ImportError:
      raise CounterError('NVML needs nvidia-ml-py: pip install nvidia-ml-py') from None
  try:
    nvml.nvmlInit()
    found = [GpuMeter(nvml, handle) for handle in _handles(nvml, environment)[:gpus]]
  except nvml.NVMLError as error:
    raise CounterError(f'NVML does not work ({error})') from None
  if not found:
    raise CounterError('NVML sees no GPU')
  for meter in found:
    meter.read()
  return found


def _handles(nvml, environment: Mapping[str, str]) -> list:
  """NVML's handles of the GPUs that CUDA sees, in CUDA's order."""
  everyone = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
  visible = environment.get('CUDA_VISIBLE_DEVICES')
  words = map(str, range(len(everyone))) if visible is None else visible.split(',')
  words = [word.strip() for word in words if word.strip()]
  by_number = any(word.isdecimal() for word in words)
  kinds = {nvml.nvmlDeviceGetName(handle) for handle in everyone}
  if by_number and len(kinds) > 1 and environment.get('CUDA_DEVICE_ORDER') != 'PCI_BUS_ID':
    raise CounterError(
      f'CUDA and NVML number {" and ".join(sorted(kinds))} differently; set '
      'CUDA_DEVICE_ORDER=PCI_BUS_ID'
    )
  found = []
  for word in words:
    if word.isdecimal() and int(word) < len(everyone):
      found.append(everyone[int(word)])
    elif word[0].isalpha():
      found.append(nvml.nvmlDeviceGetHandleByUUID(word))
    else:  # CUDA ignores an unknown number and all after it
      break
  return found


def _package_meters(powercap: pathlib.Path) -> list[ZoneMeter]:
  """Those of all CPU packages, and of their memory where it has a counter of its own."""
  packages, memories = [], []
  # Zones of intel-rapl-mmio count the same packages again; AMD's are under intel-rapl, too.
  for folder in sorted(powercap.glob('intel-rapl:*')):
    name = _text(folder / 'name')
    if name.startswith('package'):
      packages.append((folder, name))
    elif name == 'dram':
      memories.append(
        (folder, f'dram of {_text(powercap / folder.name.rpartition(":")[0] / "name")}')
      )
  if not packages:
    raise CounterError('the CPU, which shows no RAPL counter')
  return [ZoneMeter(folder, f'RAPL {name}') for folder, name in packages + memories]


def _microjoules(file: pathlib.Path) -> int:
  text = _text(file)
  if not text.isdecimal():
    raise CounterError(f'the CPU, whose counter {file} has no number but {text!r}')
  return int(text)


def _text(file: pathlib.Path) -> str:
  try:
    return file.read_text().strip()
  except PermissionError:
    raise CounterError(f'the CPU, whose counter {file} only root may read') from None
  except OSError as error:
    raise CounterError(f'the CPU, whose counter {file} is unreadable ({error.strerror})') from None
