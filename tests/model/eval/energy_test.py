"""Counters of energy: fake trees of sysfs, a fake NVML, and a clock that the calls turn."""

import os
import re
import time
import types

import numpy as np
import pytest

from model.eval import energy
from model.eval.energy import Meters

RANGE_UJ = 1000_000


class NvmlError(Exception):
  """What the fake NVML raises."""


def fake_nvml(names=('H100', 'H100'), broken=None):
  """Stands in for pynvml: GPUs that have spent 1 J, 2 J, ...; one kind of call may be `broken`."""

  def guarded(what, answer):
    def call(*arguments):
      if broken == what:
        raise NvmlError(f'no {what}')
      return answer(*arguments)

    return call

  return types.SimpleNamespace(
    NVMLError=NvmlError,
    nvmlInit=guarded('init', lambda: None),
    nvmlDeviceGetCount=lambda: len(names),
    nvmlDeviceGetHandleByIndex=lambda i: i,
    nvmlDeviceGetHandleByUUID=guarded('uuid', {'GPU-a': 0, 'GPU-b': 1}.get),
    nvmlDeviceGetName=lambda handle: names[handle],
    nvmlDeviceGetTotalEnergyConsumption=guarded('energy', lambda handle: 1000 * (handle + 1)),
  )


@pytest.fixture
def zone(tmp_path):
  """A function (folder, name, microjoules) that writes a zone below `tmp_path`."""

  def write(folder, name, microjoules, range_uj=RANGE_UJ):
    path = tmp_path / folder
    path.mkdir(exist_ok=True)
    for file, text in (
      ('name', name),
      ('energy_uj', microjoules),
      ('max_energy_range_uj', range_uj),
    ):
      (path / file).write_text(f'{text}\n')
    return path

  return write


def _cpu(folder):
  return energy.meters('cpu', powercap=folder)


def test_packages_and_their_memory_are_added_and_nothing_is_counted_twice(zone, tmp_path):
  zone('intel-rapl:0', 'package-0', 10)
  zone('intel-rapl:0:0', 'core', 500)
  zone('intel-rapl:0:1', 'dram', 100)
  zone('intel-rapl:1', 'package-1', 20)
  zone('intel-rapl:2', 'psys', 900)
  zone('intel-rapl-mmio:0', 'package-0', 10)
  found = _cpu(tmp_path)
  assert found.source.startswith(
    'RAPL package-0 + RAPL package-1 + RAPL dram of package-0, with idle'
  )
  before = found.read()
  for folder, name, now in (
    ('intel-rapl:0', 'package-0', 2_010),
    ('intel-rapl:0:0', 'core', 9_500),
    ('intel-rapl:0:1', 'dram', 400),
    ('intel-rapl:1', 'package-1', 7_020),
    ('intel-rapl:2', 'psys', 99_900),
    ('intel-rapl-mmio:0', 'package-0', 2_010),
  ):
    zone(folder, name, now)
  assert found.read() - before == pytest.approx((2_000 + 300 + 7_000) / 1e6)


def test_a_counter_that_wraps_goes_on(zone, tmp_path):
  zone('intel-rapl:0', 'package-0', 900_000)
  zone('intel-rapl:1', 'package-1', 0)
  found = _cpu(tmp_path)
  readings = [found.read()]
  for now in (990_000, 50_000, 40_000):  # 90 mJ, then two wraps: 60 mJ and 990 mJ
    zone('intel-rapl:0', 'package-0', now)
    readings.append(found.read())
  np.testing.assert_allclose(np.diff(readings), [0.09, 0.06, 0.99])


def test_polling_sees_the_wraps_of_a_long_block(zone, tmp_path):
  zone('intel-rapl:0', 'package-0', 0)
  (inner,) = _cpu(tmp_path).meters
  seen = []

  def read():
    seen.append(inner.read())
    return seen[-1]

  found = Meters(meters=(types.SimpleNamespace(source='noted', period_s=0.0, read=read),))
  before = found.read()
  with energy.polling(found, seconds=0.001):
    for now in (700_000, 400_000):
      zone('intel-rapl:0', 'package-0', now)
      done = len(seen)
      while len(seen) < done + 2:
        time.sleep(0.001)
  zone('intel-rapl:0', 'package-0', 100_000)
  assert found.read() - before == pytest.approx(2.1)


@pytest.mark.parametrize(
  'damage, message',
  [
    (lambda folder: None, 'shows no RAPL counter'),
    (lambda folder: (folder / 'energy_uj').unlink(), 'energy_uj is unreadable .No such file'),
    (lambda folder: (folder / 'energy_uj').write_text('much'), "has no number but 'much'"),
    (lambda folder: (folder / 'max_energy_range_uj').unlink(), 'max_energy_range_uj is unreadable'),
  ],
)
def test_a_package_that_cannot_be_read_makes_the_machine_not_measured(
  zone, tmp_path, damage, message
):
  if 'no RAPL' not in message:
    zone('intel-rapl:0', 'package-0', 1)
    damage(zone('intel-rapl:1', 'package-1', 1))
  found = _cpu(tmp_path)
  assert found.meters == ()
  assert re.search(message, found.source)
  assert found.source.startswith('not measured: ')


def test_a_counter_that_only_root_may_read(zone, tmp_path):
  class Guarded(type(tmp_path)):
    def read_text(self, *args, **kwargs):
      if self.name == 'energy_uj':
        raise PermissionError(13, 'Permission denied')
      return super().read_text(*args, **kwargs)

  zone('intel-rapl:0', 'package-0', 1)
  source = _cpu(Guarded(tmp_path)).source
  assert source == (
    f'not measured: the CPU, whose counter {tmp_path}/intel-rapl:0/energy_uj only root may read'
  )


@pytest.mark.parametrize(
  'environment, gpus, joules',
  [
    ({}, None, 3.0),
    ({}, 1, 1.0),
    ({'CUDA_VISIBLE_DEVICES': '1,0'}, 1, 2.0),
    ({'CUDA_VISIBLE_DEVICES': '1'}, None, 2.0),
    ({'CUDA_VISIBLE_DEVICES': 'GPU-b'}, None, 2.0),
    ({'CUDA_VISIBLE_DEVICES': '0,-1,1'}, None, 1.0),
  ],
)
def test_gpus_are_those_that_cuda_sees(tmp_path, environment, gpus, joules):
  found = energy.meters(
    'gpu', gpus=gpus, nvml=fake_nvml(), powercap=tmp_path, environment=environment
  )
  assert found.read() == joules
  assert 'NVML, H100' in found.source and '; without the CPU, which shows no RAPL' in found.source
  assert found.window_s == pytest.approx(2.0)


def test_a_gpu_is_measured_with_its_host(zone, tmp_path):
  zone('intel-rapl:0', 'package-0', 0)
  found = energy.meters('gpu', gpus=1, nvml=fake_nvml(), powercap=tmp_path, environment={})
  zone('intel-rapl:0', 'package-0', 500_000)
  assert found.read() == pytest.approx(1.5)
  assert found.missing == ()


@pytest.mark.parametrize(
  'nvml, environment, message',
  [
    (fake_nvml(broken='init'), {}, 'NVML does not work .no init'),
    (fake_nvml(broken='energy'), {}, 'NVML, H100 has no counter of energy'),
    (fake_nvml(names=()), {}, 'sees no GPU'),
    (fake_nvml(), {'CUDA_VISIBLE_DEVICES': ''}, 'sees no GPU'),
    (fake_nvml(broken='uuid'), {'CUDA_VISIBLE_DEVICES': 'GPU-z'}, 'NVML does not work .no uuid'),
    (fake_nvml(names=('A100', 'H100')), {}, 'CUDA_DEVICE_ORDER=PCI_BUS_ID'),
  ],
)
def test_a_gpu_without_a_counter_is_not_measured_by_its_host(
  zone, tmp_path, nvml, environment, message
):
  zone('intel-rapl:0', 'package-0', 0)
  found = energy.meters('gpu', nvml=nvml, powercap=tmp_path, environment=environment)
  assert found.meters == ()
  assert re.search(message, found.source)


def test_other_chips_are_not_measured(zone, tmp_path):
  zone('intel-rapl:0', 'package-0', 0)
  assert energy.meters('tpu', powercap=tmp_path).source == (
    'not measured: no counter is known for tpu'
  )


class Machine:
  """A clock and a counter of energy; `program` makes a call that moves both."""

  def __init__(self, period_s=0.0, stuck=False):
    self.now, self.joules, self.seen = 0.0, 0.0, []
    self.source, self.period_s, self.stuck = 'a counter', period_s, stuck

  def read(self):
    """As of the last update, which is at most `period_s` ago."""
    if self.stuck:
      return 0.0
    return self.joules if not self.period_s else self.updated

  def program(self, name, seconds, watts):
    def call():
      self.seen.append(name)
      for _ in range(10):  # a tenth at a time, with updates in between
        before = self.now
        self.now += seconds / 10
        self.joules += watts * seconds / 10
        if self.period_s and before // self.period_s != self.now // self.period_s:
          self.updated = self.joules
      return np.zeros(1)

    self.updated = self.joules
    return call


def test_programs_take_turns_and_joules_are_per_call():
  machine = Machine()
  calls = {
    'this': machine.program('this', 0.15, 100.0),
    'base': machine.program('base', 0.25, 40.0),
  }
  found = energy.measure(calls, Meters(meters=(machine,)), rounds=5, clock=lambda: machine.now)
  np.testing.assert_allclose(found.joules['this'], [15.0] * 5)
  np.testing.assert_allclose(found.joules['base'], [10.0] * 5)
  assert machine.seen[:6] == ['this', 'this', 'base', 'base', 'this', 'this']
  metric = found.per('this', 16, 'J/token')
  assert (metric.n, metric.unit, metric.spread) == (5, 'J/token', pytest.approx(0, abs=1e-9))
  assert metric.value == pytest.approx(15 / 16)


def test_a_slow_counter_is_read_over_many_of_its_periods():
  machine = Machine(period_s=0.1)
  call = machine.program('this', 0.003, 200.0)
  found = energy.measure(
    {'this': call}, Meters(meters=(machine,)), rounds=7, clock=lambda: machine.now
  )
  assert len(machine.seen) >= 7 * 2.0 / 0.003
  np.testing.assert_allclose(found.joules['this'], 0.6, rtol=0.06)


def test_what_is_not_measured_says_why():
  assert energy.measure({}, Meters(missing=('a reason',))).reason == 'not measured: a reason'
  machine = Machine(stuck=True)
  call = machine.program('this', 0.5, 1.0)
  found = energy.measure({'this': call}, Meters(meters=(machine,)), clock=lambda: machine.now)
  assert (dict(found.joules), found.reason) == (
    {},
    f'not measured: a counter stood still ({Meters(meters=(machine,)).source})',
  )


def test_a_counter_that_fails_in_between_leaves_no_number(zone, tmp_path):
  zone('intel-rapl:0', 'package-0', 1)
  found = _cpu(tmp_path)

  def call():
    (tmp_path / 'intel-rapl:0' / 'energy_uj').unlink(missing_ok=True)
    return np.zeros(1)

  result = energy.measure({'this': call}, found)
  assert not result.joules and 'unreadable' in result.reason


@pytest.mark.skipif(not os.path.isdir(energy.POWERCAP), reason='no powercap')
def test_this_machine_is_measured_or_says_why():
  found = energy.meters('cpu')
  assert found.meters or found.source.startswith('not measured: the CPU')
