"""Runs the application until a signal: the first one drains, the second one ends at once."""

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from experiments.serving.app import State

MOST_CONNECTIONS = 2048
KEEP_ALIVE_S = 30
BACKLOG = 1024
POLL_S = 0.05
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def listen(host: str, port: int) -> socket.socket:
  """A socket that listens at an address. Raises ValueError if that is not possible."""
  bound = None
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
    )[0]
    # asyncio sends small pieces at once only where a socket names its protocol; otherwise each
    # answer waits 40 ms for a confirmation.
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    bound.listen(BACKLOG)
    return bound
  except (OSError, OverflowError) as error:
    if bound is not None:
      bound.close()
    raise ValueError(f'cannot listen on {host}, port {port}: {error}') from None


def url(host: str, bound: socket.socket) -> str:
  """The address to type into a browser."""
  host = {'0.0.0.0': '127.0.0.1', '::': '::1', '': '127.0.0.1'}.get(host, host)
  return f'http://{f"[{host}]" if ":" in host else host}:{bound.getsockname()[1]}'


async def serve(
  app: ASGIApp, state: State, bound: socket.socket, on_start: Callable[[Callable[[], None]], None]
) -> None:
  """Serves until it is told to drain, and then until the last answer has ended.

  SIGTERM and SIGINT tell it so, where this is the main thread; a second one ends the process. The
  function that `on_start` is given tells it so from any thread. While it drains, the server still
  listens, so that new requests learn why they are refused.
  """
  server, draining = uvicorn.Server(_config(app)), asyncio.Event()
  serving = asyncio.ensure_future(server.serve(sockets=[bound]))
  while not server.started and not serving.done():
    await asyncio.sleep(POLL_S)
  if server.started:
    loop = asyncio.get_running_loop()

    def drain():
      state.draining = True
      loop.call_soon_threadsafe(draining.set)

    _handle_signals(state, drain)
    on_start(drain)
    waiting = asyncio.ensure_future(draining.wait())
    await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    while state.answering:
      await asyncio.sleep(POLL_S)
    server.should_exit = True
  await serving


def _handle_signals(state, drain):
  """Takes the signals over from uvicorn, which has put its own handlers there."""
  if threading.current_thread() is not threading.main_thread():
    return

  def on_signal(number):
    if state.draining:
      os._exit(128 + number)
    print(f'draining, {state.answering} answers to end', file=sys.stderr, flush=True)
    drain()

  for number in SIGNALS:
    asyncio.get_running_loop().add_signal_handler(number, on_signal, number)


def _config(app: ASGIApp) -> uvicorn.Config:
  return uvicorn.Config(
    app,
    http='h11',
    ws='none',
    lifespan='on',
    log_config=None,
    log_level='warning',
    access_log=False,
    server_header=False,
    limit_concurrency=MOST_CONNECTIONS,
    timeout_keep_alive=KEEP_ALIVE_S,
  )
