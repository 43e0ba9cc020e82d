"""The body of a request: read up to a limit, parsed strictly, and its fields checked one by one."""

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from experiments.serving.errors import ApiError, invalid

DEEPEST = 64  # containers within each other
SHOWN = 80  # characters of a wrong value in a message


async def read(request: Request, most_bytes: int) -> dict[str, Any]:
  """Reads a JSON object. Raises ApiError: too long, not JSON, or nested too deeply."""
  kind = request.headers.get('content-type', '').split(';')[0].strip().lower()
  if kind != 'application/json':
    # A page of another origin may send other types without asking.
    raise ApiError(415, f'Content-Type must be application/json, not {kind[:SHOWN]!r}')
  length = request.headers.get('content-length', '')
  if length.isdecimal() and int(length) > most_bytes:
    raise _too_long(most_bytes)
  data = bytearray()
  async for piece in request.stream():
    data += piece
    if len(data) > most_bytes:
      raise _too_long(most_bytes)
  return parse(bytes(data))


def _too_long(most_bytes):
  message = f'the body is longer than {most_bytes} bytes, which is the limit of this server'
  return ApiError(413, message, code='request_too_large', headers={'Connection': 'close'})


def parse(data: bytes) -> dict[str, Any]:
  """Parses a JSON object. Raises ApiError if it is none, or nested too deeply."""
  try:
    value = json.loads(data.decode(), parse_constant=_no_constant)
  except (ValueError, RecursionError) as error:
    detail = 'nested too deeply' if isinstance(error, RecursionError) else str(error)
    raise invalid(None, f'the body is not JSON: {detail}') from None
  if not isinstance(value, dict):
    raise invalid(None, f'the body must be a JSON object, not {shown(value)}')
  layer = [value]
  for _ in range(DEEPEST):
    inner = [v for one in layer for v in (one.values() if isinstance(one, dict) else one)]
    layer = [v for v in inner if isinstance(v, dict | list)]
    if not layer:
      return value
  raise invalid(None, f'the body has more than {DEEPEST} values within each other')


def _no_constant(name):
  raise ValueError(f'{name} is no number of JSON')


def shown(value: Any) -> str:
  """A value as messages show it."""
  text = repr(value)
  return text if len(text) <= SHOWN else f'{text[:SHOWN]}...'


class Fields:
  """The fields of a JSON object; each method returns one, checked, or its default if it is null."""

  def __init__(self, values: Mapping[str, Any], where: str = ''):
    self.values, self._where = values, where

  def name(self, field: str) -> str:
    return self._where + field

  def wrong(self, field: str, must: str) -> ApiError:
    value = shown(self.values.get(field))
    return invalid(self.name(field), f'{self.name(field)} must be {must}, not {value}')

  def has(self, field: str) -> bool:
    return self.values.get(field) is not None

  def number(self, field: str, default: float | None, low: float, high: float) -> float | None:
    value = self.values.get(field)
    if value is None:
      return default
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not low <= value <= high or not math.isfinite(value):
      raise self.wrong(field, f'a number from {low:g} to {high:g}')
    return float(value)

  def integer(self, field: str, default: int | None, low: int, high: int) -> int | None:
    value = self.values.get(field)
    if value is None:
      return default
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
      value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
      raise self.wrong(field, f'an integer from {low} to {high}')
    return value

  def flag(self, field: str, default: bool = False) -> bool:
    value = self.values.get(field)
    if value is None:
      return default
    if not isinstance(value, bool):
      raise self.wrong(field, 'true or false')
    return value

  def text(self, field: str, default: str | None = None) -> str | None:
    value = self.values.get(field)
    if value is None:
      return default
    if not isinstance(value, str):
      raise self.wrong(field, 'a text')
    return self.checked(field, value)

  def checked(self, field: str, text: str) -> str:
    """The text itself, unless it has half a surrogate pair, which is no character."""
    try:
      text.encode()
    except UnicodeEncodeError:
      raise self.wrong(field, 'a text of whole Unicode characters') from None
    return text

  def inner(self, field: str) -> 'Fields | None':
    value = self.values.get(field)
    if value is None:
      return None
    if not isinstance(value, dict):
      raise self.wrong(field, 'an object')
    return Fields(value, f'{self.name(field)}.')

  def list(self, field: str) -> list | None:
    value = self.values.get(field)
    if value is not None and not isinstance(value, list):
      raise self.wrong(field, 'a list')
    return value

  def only(self, field: str, *neutral: Any, why: str = 'is not supported by this server') -> None:
    """Refuses a field with any but these values or null."""
    value = self.values.get(field)
    same = lambda other: type(other) is type(value) and other == value
    if value is not None and not any(map(same, neutral)):
      raise invalid(self.name(field), f'{self.name(field)} {why}; leave it out')
