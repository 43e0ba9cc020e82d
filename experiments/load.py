"""Clients that load a server of OpenAI's completions, and the times at which its answers come.

A client is a connection of its own with a few lines of HTTP, so that measuring takes little of a
machine that also serves. Loads are open, with arrivals of a Poisson process whatever the server
does, or closed, with so many clients that each wait for their answer before they ask again: until
all calls are answered, or for a set time.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import time
import urllib.parse
from collections.abc import AsyncIterator, Sequence

import numpy as np

PAUSE_S = 0.2  # of a client whose call has failed


@dataclasses.dataclass(frozen=True)
class Server:
  """A server by its name and address, with the name of the model and the key that it wants."""

  name: str
  url: str
  model: str
  key: str | None = dataclasses.field(default=None, repr=False)
  pid: int | None = None  # of its process, where that is a child of this one


@dataclasses.dataclass(kw_only=True)
class Answer:
  """When an answer was asked for, when its pieces came, and how many tokens it had, in seconds."""

  asked_s: float
  pieces_s: list[float] = dataclasses.field(default_factory=list)
  ended_s: float = 0.0
  tokens: int = 0
  prompt_tokens: int = 0
  error: str | None = None
  text: str = ''
  call: int = 0  # the index of what was asked for, in a load that asks again

  @property
  def first_s(self) -> float:
    """Time to the first token, with the time in the queue."""
    return self.pieces_s[0] - self.asked_s

  @property
  def whole_s(self) -> float:
    return self.ended_s - self.asked_s

  @property
  def each_s(self) -> float | None:
    """Mean time of the tokens after the first; None where there is none."""
    return (self.whole_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else None

  @property
  def gaps_s(self) -> np.ndarray:
    """Times between pieces."""
    return np.diff(self.pieces_s)


async def closed(server: Server, calls: Sequence[dict], clients: int) -> list[Answer]:
  """Asks everything by so many clients at once."""
  waiting, answers = list(reversed(calls)), []

  async def client():
    while waiting:
      answers.append(await ask(server, waiting.pop()))

  await asyncio.gather(*(client() for _ in range(clients)))
  return answers


async def lasting(
  server: Server, calls: Sequence[dict], clients: int, seconds: float
) -> list[Answer]:
  """Asks the calls again and again by so many clients for a set time; what has begun may end."""
  turns, answers, end = itertools.count(), [], time.perf_counter() + seconds

  async def client():
    while time.perf_counter() < end:
      index = next(turns) % len(calls)
      answer = await ask(server, calls[index])
      answer.call = index
      answers.append(answer)
      if answer.error is not None:
        await asyncio.sleep(PAUSE_S)

  await asyncio.gather(*(client() for _ in range(clients)))
  return answers


async def opened(server: Server, calls: Sequence[dict], rate: float, seed: int) -> list[Answer]:
  """Asks `rate` times a second on average, at random times that the seed decides."""
  gaps = np.random.default_rng(seed).exponential(1 / rate, len(calls))

  async def later(call, seconds):
    await asyncio.sleep(seconds)
    return await ask(server, call)

  times = np.cumsum(gaps) - gaps[0]
  return await asyncio.gather(*(later(*pair) for pair in zip(calls, times, strict=True)))


async def ask(server: Server, call: dict) -> Answer:
  """Asks for one streamed completion; what goes wrong is in the answer."""
  answer = Answer(asked_s=time.perf_counter())
  body = {'model': server.model, 'stream': True, 'stream_options': {'include_usage': True}}
  try:
    async with _connected(server) as (reader, writer):
      writer.write(_request(server, 'POST', '/completions', json.dumps(body | call).encode()))
      async for data in _events(reader):
        _take(answer, json.loads(data))
  except (OSError, EOFError, ValueError, LookupError) as error:
    answer.error = f'{type(error).__name__}: {error}'
  answer.ended_s = time.perf_counter()
  if answer.error is None and not answer.pieces_s:
    answer.error = 'no token came'
  return answer


def _take(answer: Answer, event: dict) -> None:
  if 'error' in event:
    raise ValueError(str(event['error']))
  choices = event.get('choices') or []
  answer.text += ''.join(choice['text'] for choice in choices)
  # The first token may have no text yet, as half a character has none.
  if any(choice['text'] for choice in choices) or (choices and not answer.pieces_s):
    answer.pieces_s.append(time.perf_counter())
  usage = event.get('usage')
  if usage:
    answer.tokens, answer.prompt_tokens = usage['completion_tokens'], usage['prompt_tokens']


async def model_of(server: Server) -> str:
  """The name of the first model of a server. Raises ValueError if it does not answer."""
  try:
    status, data = await _get(server, '/models')
  except (OSError, EOFError) as error:
    raise ValueError(f'{server.url} does not answer: {error}') from None
  if status != 200:
    raise ValueError(f'{server.url} answers with {status}: {data[:300].decode(errors="replace")}')
  return json.loads(data)['data'][0]['id']


async def metrics_of(server: Server) -> dict[str, float]:
  """The values of a server's /metrics, each summed over its labels; none where there is no such."""
  found = {}
  try:
    root = dataclasses.replace(server, url=server.url.rstrip('/').removesuffix('/v1'))
    status, data = await _get(root, '/metrics')
    for line in data.decode().splitlines() if status == 200 else ():
      if line and not line.startswith('#'):
        name, _, value = line.rpartition(' ')
        name = name.split('{')[0]
        found[name] = found.get(name, 0.0) + float(value)
  except (OSError, EOFError, ValueError):
    return {}
  return found


async def _get(server: Server, path: str) -> tuple[int, bytes]:
  async with _connected(server) as (reader, writer):
    writer.write(_request(server, 'GET', path))
    status = await _status(reader)
    return status, b''.join([piece async for piece in _pieces(reader, await _headers(reader))])


@contextlib.asynccontextmanager
async def _connected(server: Server):
  parts = urllib.parse.urlsplit(server.url)
  reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
  try:
    yield reader, writer
  finally:
    writer.close()
    with contextlib.suppress(OSError):
      await writer.wait_closed()


def _request(server: Server, method: str, path: str, body: bytes = b'') -> bytes:
  parts = urllib.parse.urlsplit(server.url)
  lines = [f'{method} {parts.path.rstrip("/")}{path} HTTP/1.1', f'Host: {parts.netloc}']
  lines += ['Content-Type: application/json', f'Content-Length: {len(body)}', 'Connection: close']
  if server.key is not None:
    lines.append(f'Authorization: Bearer {server.key}')
  return '\r\n'.join(lines).encode() + b'\r\n\r\n' + body


async def _status(reader: asyncio.StreamReader) -> int:
  line = await reader.readline()
  try:
    return int(line.split()[1])
  except (IndexError, ValueError):
    raise EOFError('no answer came') from None


async def _headers(reader: asyncio.StreamReader) -> dict[str, str]:
  headers = {}
  while (line := await reader.readline()).strip():
    name, _, value = line.decode('latin-1').partition(':')
    headers[name.strip().lower()] = value.strip()
  return headers


async def _pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
  """The body, as it comes."""
  if headers.get('transfer-encoding', '').lower() != 'chunked':
    while data := await reader.read(2**16):
      yield data
    return
  while length := int((await reader.readline()).split(b';')[0], 16):
    yield await reader.readexactly(length)
    await reader.readline()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[str]:
  """The data of the events of a stream. Raises ValueError if the server refuses the call."""
  status = await _status(reader)
  headers, rest = await _headers(reader), b''
  async for piece in _pieces(reader, headers):
    *lines, rest = (rest + piece).split(b'\n')
    for line in lines if status == 200 else ():
      data = line.removeprefix(b'data:').strip()
      if line.startswith(b'data:') and data != b'[DONE]':
        yield data.decode()
  if status != 200:
    raise ValueError(f'status {status}: {rest[:300].decode(errors="replace")}')
