"""The routes of the server, and what is checked before any of them: the host, the key, draining."""

import contextlib
import dataclasses
import hmac
import pathlib
import re
import time

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from experiments.serving import chat, completions
from experiments.serving.endpoint import Endpoint, health
from experiments.serving.errors import ApiError
from experiments.serving.limits import Access
from experiments.serving.metrics import Metrics
from experiments.serving.served import Served, no_such_model
from model.infer.worker import Worker

PAGE = pathlib.Path(__file__).with_name('chat.html')
PORT = re.compile(r':\d*$')
METRICS_TYPE = 'text/plain; version=0.0.4; charset=utf-8'


@dataclasses.dataclass(kw_only=True)
class State:
  """What changes while the server runs: requests that are being answered, and whether it ends."""

  answering: int = 0
  draining: bool = False


class Guard:
  """Refuses requests from elsewhere, without the key, or while the server ends; counts the rest."""

  def __init__(self, app: ASGIApp, *, access: Access, state: State):
    self._app, self._access, self._state = app, access, state

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      return await self._app(scope, receive, send)
    try:
      self._check(scope, Headers(scope=scope))
    except ApiError as error:
      return await error.response()(scope, receive, send)
    self._state.answering += 1
    try:
      await self._app(scope, receive, send)
    finally:
      self._state.answering -= 1

  def _check(self, scope, headers):
    hosts, host = self._access.hosts, PORT.sub('', headers.get('host', '')).lower()
    if hosts is not None and host not in hosts:
      # A page elsewhere may have its own name lead to this machine (DNS rebinding).
      raise ApiError(403, f'this server answers to {", ".join(sorted(hosts))}, not {host[:80]!r}')
    if not scope['path'].startswith('/v1/'):
      return
    if self._access.key is not None and not self._has_key(headers):
      raise ApiError(
        401,
        'the key is missing or wrong; send it as "Authorization: Bearer KEY"',
        code='invalid_api_key',
        headers={'WWW-Authenticate': 'Bearer'},
      )
    if self._state.draining and scope['method'] == 'POST':
      again = {'Retry-After': '10', 'Connection': 'close'}
      raise ApiError(503, 'the server is shutting down', code='shutting_down', headers=again)

  def _has_key(self, headers) -> bool:
    kind, _, key = headers.get('authorization', '').partition(' ')
    known = self._access.key.encode()
    return kind.lower() == 'bearer' and hmac.compare_digest(key.strip().encode(), known)


def build(served: Served, worker: Worker, state: State, access: Access | None = None) -> Starlette:
  """The application; it starts the worker with itself, and ends it too."""
  metrics, started = Metrics(worker.engine, served.name), int(time.time())

  @contextlib.asynccontextmanager
  async def lifespan(app):
    worker.start()
    yield
    worker.close()

  def models(request: Request) -> Response:
    names = (served.name, *served.adapters)
    name = request.path_params.get('name')
    if name is not None and name not in names:
      raise no_such_model(name, names)
    cards = [_card(served, one, started) for one in names if name in (None, one)]
    return JSONResponse({'object': 'list', 'data': cards} if name is None else cards[0])

  page = PAGE.read_text(encoding='utf-8')
  routes = [
    Route('/', lambda request: HTMLResponse(page, headers=_page_headers())),
    Route('/health', lambda request: health(worker, state.draining)),
    Route('/metrics', lambda request: Response(metrics.text(), media_type=METRICS_TYPE)),
    Route('/v1/models', models),
    Route('/v1/models/{name:path}', models),
  ]
  for path, module in (('/v1/completions', completions), ('/v1/chat/completions', chat)):
    endpoint = Endpoint(module.prepare, served, worker, metrics)
    routes.append(Route(path, endpoint, methods=['POST']))
  return Starlette(
    routes=routes,
    lifespan=lifespan,
    middleware=[Middleware(Guard, access=access or Access(), state=state)],
    exception_handlers={HTTPException: _http_error, ApiError: _api_error, 500: _server_error},
  )


def _card(served: Served, name: str, started: int) -> dict:
  return {
    'id': name,
    'object': 'model',
    'created': started,
    'owned_by': 'lissom',
    'root': served.name,
    'parent': None if name == served.name else served.name,
    'max_model_len': served.capacity,
    'chats': served.chats,
  }


def _page_headers() -> dict[str, str]:
  inline = "style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
  policy = f"default-src 'none'; {inline}; img-src data:; base-uri 'none'; form-action 'none'"
  return {'Content-Security-Policy': policy, 'X-Content-Type-Options': 'nosniff'}


def _http_error(request: Request, error: HTTPException) -> Response:
  what = f'{request.method} {request.url.path[:200]}'
  texts = {404: f'there is no {what}', 405: f'{what} is not allowed; see the Allow header'}
  text = texts.get(error.status_code, str(error.detail))
  return ApiError(error.status_code, text, headers=error.headers).response()


def _api_error(request: Request, error: ApiError) -> Response:
  return error.response()


def _server_error(request: Request, error: Exception) -> Response:
  return ApiError(500, f'the server failed: {type(error).__name__}').response()
