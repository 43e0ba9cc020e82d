"""Errors as clients of OpenAI's API know them."""

from collections.abc import Mapping

from starlette.responses import JSONResponse

CODES = {
  400: 'invalid_request_error',
  401: 'invalid_request_error',
  404: 'invalid_request_error',
  405: 'invalid_request_error',
  408: 'timeout_error',
  413: 'invalid_request_error',
  415: 'invalid_request_error',
  429: 'rate_limit_error',
}


class ApiError(Exception):
  """A request that is answered by an error: its HTTP status and what the client is told."""

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.param, self.code, self.headers = status, param, code, headers

  def body(self) -> dict:
    kind = CODES.get(self.status, 'server_error')
    error = {'message': str(self), 'type': kind, 'param': self.param, 'code': self.code}
    return {'error': error}

  def response(self) -> JSONResponse:
    return JSONResponse(self.body(), self.status, self.headers)


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
  """The error of a wrong value of the field `param`."""
  return ApiError(400, message, param=param, code=code)
