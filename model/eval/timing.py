"""Measures time by one protocol: interleaved rounds, medians, interquartile ranges.

Programs are compared within a round of `model.rounds`. The reported ratio is the median of the
rounds' ratios, not the ratio of medians.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.eval.records import Metric
from model.rounds import MIN_WARMUP, sample

MIN_ROUNDS = 5
CPU_BUFFER_BYTES = 2**28
ACCELERATOR_BUFFER_BYTES = 2**32  # copying takes 2 ms, a launch only some 50 us


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """The samples of one callable, one per round, and its speed-up over the base in each round."""

  samples_s: tuple[float, ...]
  speedups: tuple[float, ...]  # seconds of the base / seconds of this: above 1 is faster

  @property
  def median_s(self) -> float:
    return float(np.median(self.samples_s))

  @property
  def iqr_s(self) -> float:
    return interquartile_range(self.samples_s)

  @property
  def speedup(self) -> Metric:
    """The median of the rounds' speed-ups, with its interquartile range."""
    return summarize(self.speedups, '1')

  def rate(self, amount: float, unit: str) -> Metric:
    """The amount per second of a callable that does `amount` (tokens, bytes) per call."""
    return summarize([amount / sample for sample in self.samples_s], unit)


def time_interleaved(
  calls: Mapping[str, Callable[[], Any]],
  *,
  base: str | None = None,
  warmup: int = MIN_WARMUP,
  rounds: int = MIN_ROUNDS,
) -> dict[str, Timing]:
  """Times every callable once per round, up to when its result is ready.

  Args:
    calls: name -> callable without arguments; its result is any pytree of arrays.
    base: the name whose time the speed-ups refer to; None: the first.
    warmup: untimed calls of each before the first round, at least 3.
    rounds: timed calls of each, at least 5.

  Raises:
    ValueError: nothing to time, an unknown base, or too few calls.
  """
  names = list(calls)
  base = names[0] if base is None and names else base
  _check(names, base, warmup, rounds)
  samples = sample(calls, warmup=warmup, rounds=rounds)
  return {
    name: Timing(
      samples_s=tuple(samples[name].tolist()),
      speedups=tuple((samples[base] / samples[name]).tolist()),
    )
    for name in names
  }


def summarize(samples: Sequence[float], unit: str) -> Metric:
  """The median of the samples with their interquartile range."""
  return Metric(float(np.median(samples)), unit, len(samples), interquartile_range(samples))


def interquartile_range(samples: Sequence[float]) -> float:
  low, high = np.percentile(samples, [25, 75])
  return float(high - low)


class Copy:
  """Adds 1 to a long array at each call, which reads and writes `nbytes` bytes in total.

  The array is larger than the last-level cache, and is updated in place, because a new output would
  add the cost of fresh pages. Its rate is what the bytes per second of decoding are compared with.
  """

  def __init__(self, device: jax.Device | None = None, *, buffer_bytes: int | None = None):
    device = device or jax.devices()[0]
    size = max(1, (buffer_bytes or _past_the_cache(device)) // 4)
    self._increment = jax.jit(lambda x: x + 1, donate_argnums=0)
    with jax.default_device(device):
      self._x = jax.block_until_ready(jnp.zeros(size, jnp.int32))
    self.nbytes = 2 * 4 * size

  def __call__(self) -> jax.Array:
    self._x = self._increment(self._x)
    return self._x


def copy_bandwidth(device: jax.Device | None = None, *, buffer_bytes: int | None = None) -> Metric:
  """Bytes per second that `device` reads and writes in total, by `Copy`."""
  copy = Copy(device, buffer_bytes=buffer_bytes)
  return time_interleaved({'copy': copy}, rounds=7)['copy'].rate(copy.nbytes, 'byte/s')


def _check(names, base, warmup, rounds):
  if not names:
    raise ValueError('there is nothing to time: pass at least one callable')
  if base not in names:
    raise ValueError(f'the base {base!r} is not one of {", ".join(names)}')
  if warmup < MIN_WARMUP or rounds < MIN_ROUNDS:
    raise ValueError(
      f'the protocol asks for at least {MIN_WARMUP} warm-up calls and {MIN_ROUNDS} rounds, '
      f'not {warmup} and {rounds}'
    )


def _past_the_cache(device: jax.Device) -> int:
  if device.platform == 'cpu':
    return min(max(CPU_BUFFER_BYTES, 4 * _last_level_cache_bytes()), 4 * CPU_BUFFER_BYTES)
  limit = (device.memory_stats() or {}).get('bytes_limit', 2**33)
  return min(ACCELERATOR_BUFFER_BYTES, limit // 8)


def _last_level_cache_bytes() -> int:
  """The largest cache of the first core according to Linux; 0 if it does not say."""
  sizes = [0]
  for path in pathlib.Path('/sys/devices/system/cpu/cpu0/cache').glob('index*/size'):
    text = path.read_text().strip()
    unit = {'K': 2**10, 'M': 2**20}.get(text[-1:], 1)
    sizes.append(int(text.rstrip('KM')) * unit)
  return max(sizes)
