"""Timing against a clock that the test turns by hand."""

import jax
import jax.numpy as jnp
import pytest

from model import rounds as rounds_module
from model.eval import timing


class Clock:
  """Stands in for the time module; `work` advances it by the next of its seconds."""

  def __init__(self):
    self.now = 0.0
    self.log = []

  def perf_counter(self):
    return self.now

  def work(self, name, seconds, warmup=3):
    left = [100.0] * warmup + list(seconds)

    def call():
      self.log.append(name)
      self.now += left.pop(0)

    return call


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(rounds_module, 'time', clock)
  return clock


def test_medians_spreads_and_ratios_by_hand(clock):
  calls = {
    'base': clock.work('base', [4, 8, 6, 2, 10]),
    'fast': clock.work('fast', [2, 2, 2, 2, 2]),
  }
  timings = timing.time_interleaved(calls)
  base, fast = timings['base'], timings['fast']
  assert base.samples_s == (4, 8, 6, 2, 10)
  assert (base.median_s, base.iqr_s) == (6, 4)
  assert fast.speedups == (2, 4, 3, 1, 5)
  assert (fast.speedup.value, fast.speedup.spread, fast.speedup.n) == (3, 2, 5)
  assert base.speedups == (1,) * 5
  rate = fast.rate(100, 'token/s')
  assert (rate.value, rate.unit, rate.spread) == (50, 'token/s', 0)


def test_the_ratio_is_taken_within_a_round(clock):
  """A machine ten times slower in two rounds changes no ratio: both programs slow down."""
  slow = [1, 10, 1, 10, 1]
  calls = {'a': clock.work('a', slow), 'b': clock.work('b', [2 * s for s in slow])}
  timings = timing.time_interleaved(calls, base='b')
  assert timings['a'].speedup.value == 2 and timings['a'].speedup.spread == 0


def test_rounds_interleave_after_the_warm_up_and_take_turns(clock):
  calls = {name: clock.work(name, [1] * 6, warmup=4) for name in 'abc'}
  timing.time_interleaved(calls, warmup=4, rounds=6)
  rounds = ['abc'] * 4 + ['abc', 'bca', 'cab'] * 2
  assert ''.join(clock.log) == ''.join(rounds)


def test_results_are_waited_for(monkeypatch):
  waited = []
  monkeypatch.setattr(rounds_module.jax, 'block_until_ready', lambda x: waited.append(x) or x)
  timing.time_interleaved({'a': lambda: {'tree': 1}})
  assert waited == [{'tree': 1}] * 8


@pytest.mark.parametrize(
  ('calls', 'options', 'message'),
  [
    ({}, {}, 'nothing to time'),
    ({'a': int}, {'base': 'b'}, "base 'b' is not one of a"),
    ({'a': int}, {'warmup': 2}, 'not 2 and 5'),
    ({'a': int}, {'rounds': 4}, 'not 3 and 4'),
  ],
)
def test_bad_requests(calls, options, message):
  with pytest.raises(ValueError, match=message):
    timing.time_interleaved(calls, **options)


def test_a_jitted_program_is_timed():
  x = jnp.ones((64, 64))
  work = jax.jit(lambda: x @ x)
  timings = timing.time_interleaved({'one': work, 'other': work})
  assert timings['one'].median_s > 0 and len(timings['other'].samples_s) == 5


def test_copy_bandwidth_is_plausible():
  metric = timing.copy_bandwidth(jax.devices()[1], buffer_bytes=2**24)
  assert metric.unit == 'byte/s' and metric.n == 7
  assert 1e8 < metric.value < 1e13  # a slow disk, and more than any memory of one device


def test_the_buffer_is_past_the_cache():
  assert timing._past_the_cache(jax.devices()[0]) >= 2 * timing._last_level_cache_bytes()
