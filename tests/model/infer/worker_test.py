"""The worker: progress comes to whom it belongs, in order; what ends, ends for both sides."""

import asyncio
import threading

import pytest

from model.infer.request import Progress, Request
from model.infer.worker import EngineFailed, Full, Worker


class Counting:
  """Answers each request with the numbers from 0; one number a step."""

  def __init__(self):
    self.running, self.steps, self.threads = {}, 0, set()
    self.cancelled, self.fail_at = [], None

  @property
  def busy(self):
    return bool(self.running)

  def add(self, request):
    if len(request.prompt) > 5:
      raise ValueError('too long')
    number = 100 + len(self.running) + len(self.cancelled) + self.steps
    self.running[number] = [0, request.max_new_tokens]
    return number

  def cancel(self, number):
    self.cancelled.append(number)
    del self.running[number]

  def step(self):
    self.threads.add(threading.get_ident())
    self.steps += 1
    if self.steps == self.fail_at:
      raise RuntimeError('no memory')
    found = []
    for number, state in list(self.running.items()):
      state[0] += 1
      finish = 'length' if state[0] == state[1] else None
      found.append(Progress(request=number, tokens=(state[0] - 1,), finish=finish))
      if finish:
        del self.running[number]
    return found


def _request(count=3, length=1):
  return Request(prompt=[0] * length, max_new_tokens=count)


def _with(engine, most, work):
  async def main():
    worker = Worker(engine, most=most)
    worker.start()
    try:
      await asyncio.wait_for(work(worker), 10)
    finally:
      worker.close()
    return worker

  return asyncio.run(main())


async def _all(run, count):
  tokens, ended = [[] for _ in range(count)], 0
  while ended < count:
    for index, progress in await run.next():
      tokens[index] += progress.tokens
      ended += progress.finish is not None
  return tokens


def test_runs_at_once_get_their_own_tokens():
  engine = Counting()

  async def work(worker):
    runs = [worker.submit([_request(n), _request(n + 1)]) for n in range(1, 6)]
    found = await asyncio.gather(*(_all(run, 2) for run in runs))
    assert found == [[list(range(n)), list(range(n + 1))] for n in range(1, 6)]
    assert worker.open == 0

  _with(engine, 10, work)
  assert engine.threads and threading.get_ident() not in engine.threads


def test_a_cancelled_request_ends_in_the_engine_and_brings_nothing_more():
  engine = Counting()

  async def work(worker):
    run = worker.submit([_request(10**9), _request(10**9)])
    await run.next()
    run.cancel(0)
    assert worker.open == 1
    while len(engine.running) > 1:
      await asyncio.sleep(0.001)
    await run.next()  # what came before
    assert {index for index, _ in await run.next()} == {1}
    run.cancel()
    run.cancel()
    assert worker.open == 0
    while engine.busy:
      await asyncio.sleep(0.001)

  _with(engine, 10, work)
  assert len(engine.cancelled) == 2


def test_a_request_that_the_engine_refuses():
  async def work(worker):
    run = worker.submit([_request(10**9), _request(3, length=6)])
    with pytest.raises(ValueError, match='too long'):
      while True:
        await run.next()
    assert worker.open == 0
    assert await _all(worker.submit([_request()]), 1) == [[0, 1, 2]]

  _with(Counting(), 10, work)


def test_a_full_worker_takes_nothing_more():
  async def work(worker):
    run = worker.submit([_request(10**9)] * 2)
    with pytest.raises(Full, match='2 requests are open, and 2 more exceed 3'):
      worker.submit([_request()] * 2)
    assert worker.open == 2
    run.cancel()
    await _all(worker.submit([_request()] * 3), 3)

  _with(Counting(), 3, work)


def test_a_failure_of_the_engine_fails_all():
  engine = Counting()
  engine.fail_at = 5

  async def work(worker):
    runs = [worker.submit([_request(10**9)]) for _ in range(2)]
    for run in runs:
      with pytest.raises(EngineFailed, match='RuntimeError: no memory'):
        while True:
          await run.next()
    assert str(worker.error) == 'no memory'
    assert worker.open == 0
    with pytest.raises(EngineFailed):
      worker.submit([_request()])

  _with(engine, 10, work)
