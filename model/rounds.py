"""Runs several programs in interleaved rounds and takes the time of each call.

Programs are compared within a round, moments apart, so that a machine that becomes slower (heat,
other processes) slows all of them. The order rotates by one each round, so that no program always
finds the caches as the same other one left them.
"""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np

MIN_WARMUP = 3


def sample(
  calls: Mapping[Hashable, Callable[[], Any]], *, warmup: int, rounds: int
) -> dict[Hashable, np.ndarray]:
  """Returns the seconds of each call, [rounds] by name, after `warmup` untimed calls of each.

  The result of a call is any pytree of arrays; its time ends when they are ready.
  """
  for _ in range(warmup):
    for call in calls.values():
      jax.block_until_ready(call())
  names = list(calls)
  samples = {name: [] for name in names}
  for r in range(rounds):
    turn = r % len(names)
    for name in names[turn:] + names[:turn]:
      samples[name].append(seconds(calls[name]))
  return {name: np.array(taken) for name, taken in samples.items()}


def seconds(call: Callable[[], Any]) -> float:
  """The seconds of one call, up to when its result is ready."""
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start
