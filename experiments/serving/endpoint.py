"""An endpoint that generates: from the body of a request to the answer, streamed or at once.

A client that leaves ends its requests: while an answer is made, another task waits for the end of
the connection.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from experiments.serving import body
from experiments.serving.body import Fields
from experiments.serving.call import Call
from experiments.serving.choice import Choice, Piece, joined
from experiments.serving.errors import ApiError
from experiments.serving.metrics import Metrics
from experiments.serving.served import Served
from model.infer.worker import EngineFailed, Full, Run, Worker

LOG = logging.getLogger(__name__)
FAREWELL_S = 5.0  # for the error that ends an answer
Prepare = Callable[[Fields, Served], Awaitable[Call]]
STREAM_HEADERS = [
  (b'content-type', b'text/event-stream; charset=utf-8'),
  (b'cache-control', b'no-cache'),
  (b'x-accel-buffering', b'no'),  # proxies are not to collect the pieces
]


class Endpoint:
  """An ASGI application that answers calls which `prepare` reads."""

  def __init__(self, prepare: Prepare, served: Served, worker: Worker, metrics: Metrics):
    self._prepare, self._served = prepare, served
    self._worker, self._metrics = worker, metrics

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    answer = _Answer(send)
    try:
      async with asyncio.timeout(self._served.limits.seconds):
        return await self._answer(Request(scope, receive), receive, answer)
    except ClientDisconnect:
      return  # it left before its request was complete
    except Exception as caught:
      error = self._error(caught)
    with contextlib.suppress(TimeoutError):  # it may read nothing any more
      async with asyncio.timeout(FAREWELL_S):
        await answer.fail(scope, receive, error)

  def _error(self, caught: Exception) -> ApiError:
    if isinstance(caught, ApiError):
      return caught
    if isinstance(caught, TimeoutError):
      return ApiError(504, f'the answer took longer than {self._served.limits.seconds:g} s')
    if isinstance(caught, EngineFailed):
      return ApiError(500, str(caught))
    LOG.error('a call failed', exc_info=caught)
    return ApiError(500, f'the server failed: {type(caught).__name__}')

  async def _answer(self, request, receive, answer):
    limits = self._served.limits
    try:
      async with asyncio.timeout(limits.body_seconds):
        fields = Fields(await body.read(request, limits.body_bytes))
    except TimeoutError:
      text = f'the body did not come within {limits.body_seconds:g} s'
      raise ApiError(408, text, headers={'Connection': 'close'}) from None
    call = await self._prepare(fields, self._served)
    run = self._submit(call)
    try:
      make = _stream if call.settings.stream else _whole
      await _while_connected(receive, make(call, self._pieces(call, run), answer))
    finally:
      run.cancel()

  def _submit(self, call: Call) -> Run:
    try:
      return self._worker.submit([choice.request for choice in call.choices])
    except Full:
      text = f'{self._worker.open} requests are being answered or wait; try again later'
      raise ApiError(429, text, code='rate_limit_exceeded', headers={'Retry-After': '1'}) from None

  async def _pieces(self, call: Call, run: Run) -> AsyncIterator[list[tuple[Choice, Piece]]]:
    """What is new of the choices, until all of them have ended."""
    watches = {choice: self._metrics.watch() for choice in call.choices}
    try:
      while watches:
        try:
          events = await run.next()
        except ValueError as error:
          raise ApiError(400, str(error)) from None
        pieces = []
        for index, progress in events:
          choice = call.choices[index]
          if choice.finish is not None:
            continue  # it ended at a stop string, before the engine knew
          piece = choice.take(progress)
          if piece.tokens:
            watches[choice].tokens(piece.tokens)
          if choice.finish is not None:
            run.cancel(index)
            watches.pop(choice).end(choice)
          pieces.append((choice, piece))
        yield pieces
    finally:
      for choice, watch in watches.items():
        watch.end(choice)


async def _while_connected(receive: Receive, work: Awaitable[None]) -> None:
  """Does the work, or leaves it when the client has gone."""

  async def leave():
    while (await receive())['type'] != 'http.disconnect':
      pass

  tasks = [asyncio.ensure_future(work), asyncio.ensure_future(leave())]
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
  finally:
    done = tasks[0].done()
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
  if done:
    tasks[0].result()


async def _whole(call: Call, pieces, answer: '_Answer') -> None:
  found = {choice: [] for choice in call.choices}
  async with contextlib.aclosing(pieces):
    async for group in pieces:
      for choice, piece in group:
        found[choice].append(piece)
  await answer.send(call.whole([joined(found[choice]) for choice in call.choices]))


async def _stream(call: Call, pieces, answer: '_Answer') -> None:
  opened = set()
  async with contextlib.aclosing(pieces):
    async for group in pieces:
      events = []
      for choice, piece in group:
        if call.form.opening is not None and choice not in opened:
          opened.add(choice)
          events.append(call.part([call.form.opening(choice)]))
        if piece.text or piece.calls or piece.scored or piece.finish is not None:
          events.append(call.part([call.form.part(choice, piece)]))
      await answer.events(events)
  last = [call.usage_part()] if call.settings.include_usage else []
  await answer.events([*last, None])


class _Answer:
  """Sends an answer at once or in events, and an error in the way that is still possible."""

  def __init__(self, send: Send):
    self._send, self._started, self._ended = send, False, False

  async def send(self, value: dict) -> None:
    data = _json(value)
    headers = [(b'content-type', b'application/json'), (b'content-length', b'%d' % len(data))]
    await self._start(200, headers)
    self._ended = True
    await self._send({'type': 'http.response.body', 'body': data})

  async def events(self, events: list[dict | None]) -> None:
    """Sends events together; None ends the stream."""
    if not events:
      return
    if not self._started:
      await self._start(200, STREAM_HEADERS)
    lines = [b'data: %s\n\n' % (b'[DONE]' if e is None else _json(e)) for e in events]
    self._ended = events[-1] is None
    more = not self._ended
    await self._send({'type': 'http.response.body', 'body': b''.join(lines), 'more_body': more})

  async def fail(self, scope: Scope, receive: Receive, error: ApiError) -> None:
    if not self._started:
      self._started = self._ended = True
      await error.response()(scope, receive, self._send)
    elif not self._ended:
      await self.events([error.body(), None])

  async def _start(self, status, headers):
    self._started = True
    await self._send({'type': 'http.response.start', 'status': status, 'headers': headers})


def _json(value: dict) -> bytes:
  return json.dumps(value, ensure_ascii=False, separators=(',', ':')).encode()


def health(worker: Worker, draining: bool) -> JSONResponse:
  """Whether the server takes requests: 200 if so, else 503 and why not."""
  if worker.error is not None:
    return JSONResponse({'status': 'failed', 'error': str(worker.error)}, 503)
  return JSONResponse({'status': 'draining'}, 503) if draining else JSONResponse({'status': 'ok'})
