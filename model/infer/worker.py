"""A thread that owns an engine, and the progress of its requests as asyncio streams.

The engine computes in one thread, and the event loop parses, decodes and writes in another; XLA
computes without Python's lock, so the two overlap. Requests and cancellations go to the thread
through a queue; the progress of a step goes back in one call for all requests.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Sequence
from typing import Protocol

from model.infer.request import Progress, Request

LOG = logging.getLogger(__name__)


class Engine(Protocol):
  """The methods of an engine that the thread calls."""

  busy: bool

  def add(self, request: Request) -> int: ...

  def cancel(self, request: int) -> None: ...

  def step(self) -> list[Progress]: ...


class EngineFailed(RuntimeError):
  """The engine raised an error and has stopped."""


class Full(RuntimeError):
  """The worker has the largest number of requests that it accepts."""


class Run:
  """Requests that belong together, and their progress; owned by the event loop's thread."""

  def __init__(self, worker: 'Worker', requests: Sequence[Request]):
    self._worker, self.requests = worker, tuple(requests)
    self._events, self._arrived = [], asyncio.Event()
    self._left = set(range(len(requests)))

  async def next(self) -> list[tuple[int, Progress]]:
    """Waits for progress, and returns all there is: pairs of the index of a request and its news.

    Raises:
      ValueError: the engine refuses a request.
      EngineFailed: the engine has failed.
    """
    await self._arrived.wait()
    self._arrived.clear()
    events, self._events = self._events, []
    for _, event in events:
      if isinstance(event, Exception):
        self.cancel()
        raise event
    return events

  def cancel(self, index: int | None = None) -> None:
    """Ends the request of this index, or all of them; those that have ended stay so."""
    for i in list(self._left) if index is None else [index] if index in self._left else []:
      self._end(i)
      self._worker._commands.put(('cancel', self, i))

  def _end(self, index):
    self._left.discard(index)
    self._worker.open -= 1
    if not self._left:
      self._worker._runs_open.discard(self)

  def _take(self, index, event):
    if index not in self._left:
      return  # it was cancelled meanwhile
    self._events.append((index, event))
    self._arrived.set()
    if isinstance(event, Exception) or event.finish is not None:
      self._end(index)


class Worker:
  """Runs an engine in a thread of its own; all methods are for the event loop that starts it.

  `open` counts the requests that have not ended, of which there are at most `most`. `error` is the
  exception of the engine, or None.
  """

  def __init__(self, engine: Engine, *, most: int):
    self.engine, self.most = engine, most
    self.open, self.error = 0, None
    self._runs_open = set()
    self._commands = queue.SimpleQueue()
    self._ids, self._runs = {}, {}  # (run, index) -> the engine's number, and back; of the thread
    self._thread = threading.Thread(target=self._work, name='engine', daemon=True)

  def start(self) -> None:
    """Starts the thread; the running event loop receives the progress."""
    self._loop = asyncio.get_running_loop()
    self._thread.start()

  def close(self) -> None:
    """Ends the thread after its current step."""
    self._commands.put(None)
    self._thread.join()

  def submit(self, requests: Sequence[Request]) -> Run:
    """Hands requests to the engine.

    Raises:
      Full: there would be more than `most` of them; nothing is handed over.
      EngineFailed: the engine has failed before.
    """
    if self.error is not None:
      raise _failed(self.error)
    if self.open + len(requests) > self.most:
      raise Full(f'{self.open} requests are open, and {len(requests)} more exceed {self.most}')
    run = Run(self, requests)
    self.open += len(requests)
    self._runs_open.add(run)
    for index, request in enumerate(requests):
      self._commands.put(('add', run, index, request))
    return run

  def _work(self):
    try:
      while self._obey():
        self._give([(*self._known(p), p) for p in self.engine.step()])
    except Exception as error:
      LOG.exception('the engine has failed')
      self._call(self._fail, error)

  def _obey(self) -> bool:
    """Handles new requests and cancellations; waits for one if there is nothing else to do."""
    while not (self._commands.empty() and self.engine.busy):
      command = self._commands.get()
      if command is None:
        return False
      what, run, index, *rest = command
      if what == 'add':
        self._add(run, index, *rest)
      elif (run, index) in self._ids:
        number = self._ids.pop((run, index))
        del self._runs[number]
        self.engine.cancel(number)
    return True

  def _add(self, run, index, request):
    try:
      number = self.engine.add(request)
    except ValueError as error:
      self._give([(run, index, error)])
    else:
      self._ids[run, index] = number
      self._runs[number] = run, index

  def _known(self, progress):
    run, index = self._runs[progress.request]
    if progress.finish is not None:
      del self._runs[progress.request], self._ids[run, index]
    return run, index

  def _give(self, events):
    if events:
      self._call(self._hand_out, events)

  def _call(self, function, argument):
    with contextlib.suppress(RuntimeError):  # the loop is closed, and wants nothing any more
      self._loop.call_soon_threadsafe(function, argument)

  def _hand_out(self, events):
    for run, index, event in events:
      run._take(index, event)

  def _fail(self, error):
    self.error = error
    for run in list(self._runs_open):
      for index in list(run._left):
        run._take(index, _failed(error))


def _failed(error) -> EngineFailed:
  return EngineFailed(f'the engine has failed: {type(error).__name__}: {error}')
