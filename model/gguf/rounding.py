"""Rounds the rows of a matrix to GGUF's types: least error of the weights, or weighted by inputs.

Without importance, rounding is llama.cpp's own: the types with one scale a block come from the
`gguf` package, and the K types search here as `quantize_row_q4_K_ref` and `quantize_row_q6_K_ref`
do (ggml/src/ggml-quants.c). Sums are added in another order there, so that some blocks have another
scale of the same error.

With importance, the mean squares of a matrix's inputs, the scales minimize the error weighted by
them, as with an importance matrix of llama.cpp: a weight w counts importance * sqrt(s + w**2), s
being the mean square of the weights around it (in Q6_K: importance alone). Each search tries some
scales around the one that spans the block, rounds, and takes the least-squares scale of the codes.
More scales are tried than in llama.cpp: on random weights of long tails, its Q4_K has 5 % more of
that error.
"""

import dataclasses
from collections.abc import Callable

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from model.gguf import blocks
from model.gguf.blocks import BLOCK, GRIDS

KINDS = (Kind.F32, Kind.F16, Kind.BF16, *GRIDS, Kind.Q4_K, Kind.Q6_K)  # what can be written
FLOAT16_MAX = 65504.0
CHUNK = 2**20  # weights that are rounded at once
REFINEMENTS = 5  # times that the integers of 8 scales are gone through
UNUSED = 1e-3  # what an input that no token used counts, of the mean
EPS = 1e-15  # of a part whose largest weight is smaller, all codes are zero
_F = np.float32


@dataclasses.dataclass(frozen=True)
class Search:
  """What is added to the number of levels that span a block, one after the other."""

  shifts: tuple[float, ...]

  @classmethod
  def of(cls, first: float, step: float, count: int) -> 'Search':
    return cls(tuple(first + step * i for i in range(count)))


# Those of llama.cpp, and a wider one: with importance it gains by clipping inputs that are rare.
PLAIN, PLAIN_MINIMUM = Search.of(-0.9, 0.1, 19), Search.of(-1.0, 0.1, 21)
WEIGHTED = Search.of(-1.8, 0.2, 37)


def encode(rows: np.ndarray, kind: Kind, importance: np.ndarray | None = None) -> np.ndarray:
  """Rounds float32 [rows, inputs] to a type; the bytes of each row, uint8 [rows, bytes].

  `importance` is float [inputs], not negative. Raises ValueError where weights are beyond what the
  type can hold, or its blocks do not divide the inputs.
  """
  rows = np.ascontiguousarray(rows, np.float32)
  count, inputs = rows.shape
  size = blocks.row_bytes(kind, inputs)
  step = max(1, CHUNK // inputs)
  function = _rounding(kind, None if importance is None else np.asarray(importance, np.float32))
  _check_range(rows, kind)
  result = np.empty((count, size), np.uint8)
  with np.errstate(over='ignore', divide='ignore'):  # of scales that are too small to divide by
    for at in range(0, count, step):
      result[at : at + step] = function(rows[at : at + step])
  return result


def _check_range(rows, kind):
  """Raises ValueError where float16 numbers of a type could be infinite."""
  largest = float(np.abs(rows).max(initial=0))
  if kind not in (Kind.F32, Kind.BF16) and largest > FLOAT16_MAX:
    raise ValueError(
      f'the largest weight is {largest:.3g}, and the float16 numbers of {kind.name} end at '
      f'{FLOAT16_MAX:.0f}; write bf16 or f32'
    )


def _rounding(kind: Kind, importance) -> Callable[[np.ndarray], np.ndarray]:
  """The function from rows of weights to rows of bytes."""
  if importance is not None:
    mean = importance.mean()
    importance = importance / mean + UNUSED if mean > 0 else None
  if kind in K_KINDS:
    return lambda rows: K_KINDS[kind](rows, importance).reshape(len(rows), -1)
  if kind in GRIDS and importance is not None:
    return lambda rows: _one_scale(rows, kind, importance)
  return lambda rows: gguf.quants.quantize(rows, kind).view(np.uint8).reshape(len(rows), -1)


def _one_scale(rows, kind, importance):
  """A type with one scale (and minimum) a block, by importance."""
  grid, inputs = GRIDS[kind], rows.shape[1]
  x = rows.reshape(-1, BLOCK)
  spread = np.square(rows).mean(1, keepdims=True)  # over the row, as in llama.cpp
  w = (importance * np.sqrt(spread + np.square(rows))).reshape(-1, BLOCK)
  if grid.minimum:
    scale, low = with_minimum(x, w, grid.high, WEIGHTED)
    scale, low = scale.astype(np.float16), (-low).astype(np.float16)
    wide, base = scale.astype(_F)[:, None], low.astype(_F)[:, None]
  else:
    scale, low = symmetric(x, w, -grid.low, WEIGHTED).astype(np.float16), None
    wide, base = scale.astype(_F)[:, None], _F(0)
  codes = np.rint(_quotient(x - base, wide)).clip(grid.low, grid.high)
  shape = (len(rows), inputs // BLOCK)
  return blocks.pack(
    kind,
    codes.reshape(len(rows), inputs),
    scale.reshape(shape),
    None if low is None else low.reshape(shape),
  )


def _quotient(x, scale):
  return np.where(scale == 0, 0, x / np.where(scale == 0, 1, scale))


def _q4_k(rows, importance):
  x = rows.reshape(-1, 8, 32)
  if importance is None:
    spread = np.sqrt(np.square(x).mean(-1, keepdims=True))
    w, search = spread + np.abs(x), PLAIN_MINIMUM
  else:
    spread = 2 * np.square(x).mean((1, 2), keepdims=True)
    own = np.tile(importance.reshape(-1, 8, 32), (len(rows), 1, 1))
    w, search = own * np.sqrt(spread + np.square(x)), WEIGHTED
  scale, low = with_minimum(x.reshape(-1, 32), w.reshape(-1, 32), 15, search)
  shares = None if importance is None else w.sum(-1)
  d, s = _to_integers(scale.reshape(-1, 8), 63, shares)
  dmin, t = _to_integers(low.reshape(-1, 8), 63, shares)
  d, dmin = d.astype(np.float16), dmin.astype(np.float16)
  step = (d.astype(_F)[:, None] * s)[..., None]
  base = (dmin.astype(_F)[:, None] * t)[..., None]
  codes = np.rint(_quotient(x + base, step)).clip(0, 15)
  return blocks.pack_q4_k(codes, d, dmin, s, t)


def _q6_k(rows, importance):
  x = rows.reshape(-1, 16, 16)
  own, search = np.square(x), PLAIN
  if importance is not None:
    own, search = np.tile(importance.reshape(-1, 16, 16), (len(rows), 1, 1)), WEIGHTED
  scale = symmetric(x.reshape(-1, 16), own.reshape(-1, 16), 32, search).reshape(-1, 16)
  at = np.abs(scale).argmax(1)[:, None]
  largest = np.take_along_axis(scale, at, 1)
  dead = np.abs(largest) < EPS
  inverse = _F(-128) / np.where(dead, 1, largest)
  d = np.where(dead, 0, 1 / inverse).astype(np.float16)
  s = np.where(dead, 0, np.minimum(np.rint(inverse * scale), 127))
  step = (d.astype(_F) * s.astype(_F))[..., None]
  codes = np.rint(_quotient(x, step)).clip(-32, 31)
  return blocks.pack_q6_k(np.where(dead[..., None], -32, codes), d, s)


def symmetric(x: np.ndarray, w: np.ndarray, top: int, search: Search) -> np.ndarray:
  """Finds the scale of each part [parts, n] for codes -top ... top - 1: float32 [parts].

  Of some scales around the one that sends the largest weight to -top, the one whose least-squares
  fit leaves the least weighted error.
  """
  at = np.abs(x).argmax(1)[:, None]
  largest = np.take_along_axis(x, at, 1)
  dead = np.abs(largest[:, 0]) < EPS
  largest = np.where(dead[:, None], 1, largest)
  wx = w * x
  scale, best = np.zeros(len(x), _F), np.zeros(len(x), _F)
  for shift in (0.0, *search.shifts):
    codes = np.rint(-(_F(top) + _F(shift)) / largest * x).clip(-top, top - 1)
    products, squares = (wx * codes).sum(1), (w * codes * codes).sum(1)
    better = (squares > 0) & (products * products > best * squares)
    scale = np.where(better, products / np.where(squares > 0, squares, 1), scale)
    best = np.where(better, scale * products, best)
  return np.where(dead, 0, scale)


def with_minimum(
  x: np.ndarray, w: np.ndarray, top: int, search: Search
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the scale of each part [parts, n] for codes 0 ... top, and what is subtracted."""
  low, high = np.minimum(x.min(1, keepdims=True), 0), x.max(1, keepdims=True)
  flat = (high == low)[:, 0]
  span = np.where(flat[:, None], 1, high - low)
  sum_w, sum_x = w.sum(1), (w * x).sum(1)
  inverse = _F(top) / span
  scale, least = (1 / inverse)[:, 0], low[:, 0]
  codes = np.rint(inverse * (x - low)).clip(0, top)
  best = (w * np.square(scale[:, None] * codes + low - x)).sum(1)
  for shift in search.shifts:
    inverse = (_F(shift) + _F(top)) / span
    codes = np.rint(inverse * (x - low)).clip(0, top)
    wl = w * codes
    sum_l, sum_l2, sum_xl = wl.sum(1), (wl * codes).sum(1), (wl * x).sum(1)
    size = sum_w * sum_l2 - sum_l * sum_l
    fits = size > 0
    size = np.where(fits, size, 1)
    own_scale = (sum_w * sum_xl - sum_x * sum_l) / size
    own_least = (sum_l2 * sum_x - sum_l * sum_xl) / size
    above = own_least > 0
    own_scale = np.where(above, sum_xl / np.where(sum_l2 > 0, sum_l2, 1), own_scale)
    own_least = np.where(above, 0, own_least)
    error = (w * np.square(own_scale[:, None] * codes + own_least[:, None] - x)).sum(1)
    better = fits & (error < best)
    scale, least = np.where(better, own_scale, scale), np.where(better, own_least, least)
    best = np.where(better, error, best)
  return np.where(flat, 0, scale).astype(_F), -least.astype(_F)


def _to_integers(values, top: int, shares) -> tuple[np.ndarray, np.ndarray]:
  """Rounds values >= 0 [blocks, n] to d * (0 ... top): float32 d [blocks], and the integers.

  With `shares` [blocks, n], d minimizes the error weighted by them; else it spans the largest.
  """
  largest = values.max(1, keepdims=True)
  dead = largest <= 0
  safe = np.where(dead, 1, largest)
  if shares is None:
    codes = np.minimum(np.rint(_F(top) / safe * values), top)
    return np.where(dead, 0, largest / _F(top))[:, 0], np.where(dead, 0, codes)
  best = np.full((len(values), 1), np.inf, _F)
  codes = np.zeros_like(values)
  for step in (0, *range(-4, 0), *range(1, 5)):
    inverse = (_F(0.1) * step + _F(top)) / safe
    own = np.minimum(np.rint(inverse * values), top)
    error = (shares * np.square(values - own / inverse)).sum(1, keepdims=True)
    codes, best = np.where(error < best, own, codes), np.minimum(error, best)
  codes, d = _refined(values, codes, top, shares)
  return np.where(dead[:, 0], 0, d).astype(_F), np.where(dead, 0, codes)


def _refined(values, codes, top, shares) -> tuple[np.ndarray, np.ndarray]:
  """Moves one code at a time to where the others want it, as long as that helps, and fits d."""
  codes = codes.copy()
  products, squares = (shares * values * codes).sum(1), (shares * codes * codes).sum(1)
  for _ in range(REFINEMENTS):
    before = codes.copy()
    for i in range(codes.shape[1]):
      x, w = values[:, i], shares[:, i]
      rest, rest2 = products - w * x * codes[:, i], squares - w * codes[:, i] ** 2
      usable = (rest > 0) & (rest2 > 0)
      new = np.minimum(np.rint(_quotient(x * rest2, np.where(usable, rest, 0))), top)
      own, own2 = rest + w * x * new, rest2 + w * new * new
      better = usable & (own * own * squares > products * products * own2)
      codes[:, i] = np.where(better, new, codes[:, i])
      products, squares = np.where(better, own, products), np.where(better, own2, squares)
    if (codes == before).all():
      break
  return codes, _quotient(products, squares)


K_KINDS = {Kind.Q4_K: _q4_k, Kind.Q6_K: _q6_k}
