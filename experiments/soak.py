"""A load that lasts: whether answers stay right, times steady and memory flat.

A fixed set of greedy calls is asked one by one first; these answers are the reference. Then so many
clients ask the same calls again and again for a set time. An answer whose text or number of tokens
differs from the reference is wrong. The warm-up ends when every client has had an answer; times
are those of answers that were asked for later. Memory is what the server's process has resident,
read once a second from /proc where the process is ours, else from the server's /metrics
(`process_resident_memory_bytes`). Its slope is that of a line through the readings after warm-up,
and through the later half of them.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Sequence

import numpy as np

from experiments import latency, load
from experiments.load import Answer, Server
from model.eval.records import Metric

EVERY_S = 1.0  # between readings of the memory
PATIENCE_S = 5.0  # for a server to notice that its last answer has ended
RESIDENT = 'process_resident_memory_bytes'
IN_USE = 'vllm:num_requests_running', 'vllm:num_requests_waiting'
MB = 2**20


@dataclasses.dataclass(frozen=True)
class Wrong:
  """An answer that differs from the reference of its call."""

  call: int
  expected: str
  text: str

  def __str__(self) -> str:
    pairs = itertools.zip_longest(self.expected, self.text)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.text))
    new, old = self.text[same : same + 40], self.expected[same : same + 40]
    return f'call {self.call}, from character {same} on: {new!r}, not {old!r}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soak:
  """What was seen: all answers in order of their ends, and (time, bytes) of the memory."""

  clients: int
  reference: Sequence[Answer]
  answers: Sequence[Answer]
  memory: Sequence[tuple[float, int]]
  in_use: float | None  # slots and places in the queue, when all answers had ended

  @property
  def warm_s(self) -> float:
    """The time at which the warm-up ended, by the clock of the answers."""
    ends = [answer.ended_s for answer in self.answers if answer.error is None]
    return sorted(ends)[min(self.clients, len(ends)) - 1]

  @property
  def wrong(self) -> list[Wrong]:
    found = []
    for answer in self.answers:
      right = self.reference[answer.call]
      same = (answer.text, answer.tokens) == (right.text, right.tokens)
      if answer.error is None and not same:
        found.append(Wrong(answer.call, right.text, answer.text))
    return found


async def run(server: Server, calls: Sequence[dict], clients: int, seconds: float) -> Soak:
  """Asks for the reference, and puts the load on. Raises ValueError if a reference fails."""
  memory = [reading] if (reading := await _memory(server)) is not None else []
  reference = []
  for call in calls:
    reference.append(await load.ask(server, call))
    if reference[-1].error is not None:
      raise ValueError(f'{server.name} does not answer one call alone: {reference[-1].error}')
  watching = asyncio.ensure_future(_watch(server, memory)) if memory else None
  answers = await load.lasting(server, calls, clients, seconds)
  if watching is not None:
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
  if all(answer.error is not None for answer in answers):
    raise ValueError(f'{server.name} answered nothing: {answers[0].error}')
  in_use = await _in_use(server)
  return Soak(clients=clients, reference=reference, answers=answers, memory=memory, in_use=in_use)


def metrics(soak: Soak) -> dict[str, Metric]:
  """The numbers of a record."""
  good = [answer for answer in soak.answers if answer.error is None]
  warm = [answer for answer in good if answer.asked_s >= soak.warm_s] or good
  seconds = max(a.ended_s for a in warm) - min(a.asked_s for a in warm)
  found = {
    'completed': Metric(len(good), 'requests'),
    'failed': Metric(len(soak.answers) - len(good), 'requests'),
    'wrong': Metric(len(soak.wrong), 'requests', len(good)),
    'requests_per_s': Metric(len(warm) / seconds, 'request/s'),
    'output_tokens_per_s': Metric(sum(a.tokens for a in warm) / seconds, 'token/s'),
    'warm_up_s': Metric(soak.warm_s - min(a.asked_s for a in soak.answers), 's'),
    **latency.of(warm),
  }
  for name in ('ttft', 'itl', 'e2e'):
    if f'{name}_p99_s' in found:
      ratio = found[f'{name}_p99_s'].value / found[f'{name}_median_s'].value
      found[f'{name}_p99_over_median'] = Metric(ratio, '1', found[f'{name}_p99_s'].n)
  if soak.in_use is not None:
    found['in_use_afterwards'] = Metric(soak.in_use, 'requests')
  return found | _of_memory(soak)


def _of_memory(soak: Soak) -> dict[str, Metric]:
  if not soak.memory:
    return {}
  times, resident = np.asarray(soak.memory, float).T
  warm = times >= soak.warm_s
  if warm.sum() < 2:
    warm[-2:] = True
  late = times >= times[warm].mean()
  return {
    'memory_start_bytes': Metric(resident[0], 'bytes'),
    'memory_warm_bytes': Metric(resident[warm][0], 'bytes'),
    'memory_end_bytes': Metric(resident[-1], 'bytes'),
    'memory_peak_bytes': Metric(resident.max(), 'bytes', len(resident)),
    'memory_slope_bytes_per_s': _slope(times[warm], resident[warm]),
    'memory_late_slope_bytes_per_s': _slope(times[late], resident[late]),
  }


def _slope(times: np.ndarray, resident: np.ndarray) -> Metric:
  """Of the line that fits best."""
  times = times - times.mean()
  slope = times @ (resident - resident.mean()) / max(times @ times, 1e-9)
  return Metric(slope, 'bytes/s', len(times))


def words(found: dict[str, Metric]) -> list[str]:
  """A few lines for a reader."""
  value = {name: metric.value for name, metric in found.items()}
  lines = [
    f'{value["completed"]:.0f} requests, {value["failed"]:.0f} failed, {value["wrong"]:.0f} wrong; '
    f'{value["output_tokens_per_s"]:.1f} tokens/s after {value["warm_up_s"]:.0f} s of warm-up'
  ]
  for name in ('ttft', 'itl', 'e2e'):
    if f'{name}_median_s' in value:
      times = ' / '.join(f'{1e3 * value[f"{name}_{w}_s"]:,.0f}' for w in latency.PERCENTILES)
      ratio = value[f'{name}_p99_over_median']
      lines.append(f'{name.upper()}, ms, median / p95 / p99: {times}; p99 / median {ratio:.2f}')
  if 'memory_end_bytes' in value:
    at = lambda when: f'{value[f"memory_{when}_bytes"] / MB:,.1f}'
    slope, late = (60 * value[f'memory_{w}_bytes_per_s'] / MB for w in ('slope', 'late_slope'))
    lines.append(
      f'memory, MiB: {at("start")} at the start, {at("warm")} after warm-up, {at("end")} at the '
      f'end, {slope:+.2f} a minute since, {late:+.2f} in the later half'
    )
  used = value.get('in_use_afterwards')
  lines.append(f'in use afterwards: {"not known" if used is None else f"{used:.0f}"}')
  return lines


async def _watch(server: Server, memory: list[tuple[float, int]]) -> None:
  while True:
    await asyncio.sleep(EVERY_S)
    reading = await _memory(server)
    if reading is not None:
      memory.append(reading)


async def _memory(server: Server) -> tuple[float, int] | None:
  """The time and the resident bytes, or None where nobody says them."""
  if server.pid is not None:
    with contextlib.suppress(OSError):  # no /proc, or the process has ended
      pages = pathlib.Path(f'/proc/{server.pid}/statm').read_text().split()[1]
      return time.perf_counter(), int(pages) * os.sysconf('SC_PAGE_SIZE')
  value = (await load.metrics_of(server)).get(RESIDENT)
  return None if value is None else (time.perf_counter(), int(value))


async def _in_use(server: Server) -> float | None:
  """Requests that the server still holds; it is given a little time to notice their end."""
  end = time.perf_counter() + PATIENCE_S
  while True:
    found = await load.metrics_of(server)
    if not set(IN_USE) <= set(found):
      return None
    used = sum(found[name] for name in IN_USE)
    if used == 0 or time.perf_counter() > end:
      return used
    await asyncio.sleep(0.1)
