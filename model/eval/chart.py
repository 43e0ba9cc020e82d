"""The geometry of the Pareto chart: its points, its axes and the places of its labels.

All drawings of the chart use these functions and so show the same. The places for a label lie on
rings around its point, and the first one that overlaps no point and no other label is taken.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from model.eval import select
from model.eval.records import BASE, Record

SIZE_RATIO = 'linear_bytes_vs_bf16'
LOG_FROM = 2.0  # largest / smallest value from which the vertical axis is logarithmic
POINT_RADIUS = 7.0
RINGS = (2.0, 6.0, 11.0, 18.0, 28.0, 40.0, 54.0, 70.0, 90.0, 115.0, 145.0)
ANGLES = tuple(math.radians(a) for a in (0, 180, 30, -30, 150, -150, 60, -60, 90, -90, 120, -120))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """One recipe in the chart; `kind` is 'base', 'front' or 'other'."""

  recipe: str
  size_ratio: float
  ppl_ratio: float
  kind: str


@dataclasses.dataclass(frozen=True)
class Box:
  """A rectangle by its corner of smallest coordinates."""

  x: float
  y: float
  width: float
  height: float

  def overlaps(self, other: 'Box') -> bool:
    return (
      self.x < other.x + other.width
      and other.x < self.x + self.width
      and self.y < other.y + other.height
      and other.y < self.y + self.height
    )

  def within(self, outer: 'Box') -> bool:
    return (
      self.x >= outer.x
      and self.y >= outer.y
      and self.x + self.width <= outer.x + outer.width
      and self.y + self.height <= outer.y + outer.height
    )

  def nearest(self, x: float, y: float) -> tuple[float, float]:
    """The point of the rectangle next to (x, y)."""
    return (
      min(max(x, self.x), self.x + self.width),
      min(max(y, self.y), self.y + self.height),
    )

  def distance(self, anchor: tuple[float, float]) -> float:
    return math.dist(self.nearest(*anchor), anchor)


def points(records: Sequence[Record]) -> list[Point]:
  """The records that have both ratios; the base and the front come last, to be drawn on top."""
  size = lambda r: r.value(SIZE_RATIO)
  loss = lambda r: select.ppl_ratio(r, records)
  front = {id(r) for r in select.pareto_front(records, size, loss)}
  known = [r for r in records if positive(size(r)) and positive(loss(r))]
  kind = lambda r: BASE if r.recipe == BASE else ('front' if id(r) in front else 'other')
  known.sort(key=lambda r: kind(r) != 'other')
  return [
    Point(recipe=r.recipe, size_ratio=size(r), ppl_ratio=loss(r), kind=kind(r)) for r in known
  ]


def front_steps(chart: Sequence[Point]) -> list[tuple[float, float]]:
  """The corners of the staircase below which no measured recipe lies, in order of size."""
  corners, best = [], math.inf
  for point in sorted(chart, key=lambda p: (p.size_ratio, p.ppl_ratio)):
    if point.ppl_ratio < best:
      if corners:
        corners.append((point.size_ratio, best))
      corners.append((point.size_ratio, point.ppl_ratio))
      best = point.ppl_ratio
  return corners


def place_labels(
  anchors: Sequence[tuple[float, float]],
  sizes: Sequence[tuple[float, float]],
  bounds: Box,
  lines: Sequence[tuple[float, float]] = (),
) -> list[Box | None]:
  """Returns a free place near each anchor for a label of the given size, in pixels, or None.

  Places that are nearer to the label's own point than to any other are preferred, because a reader
  assigns a label to the nearest point. Labels do not overlap `lines`, the corners of a staircase.
  The last points are drawn on top and matter most, so their labels are placed first.
  """
  taken = [Box(x - POINT_RADIUS, y - POINT_RADIUS, *[2 * POINT_RADIUS] * 2) for x, y in anchors]
  taken += [_around(start, end) for start, end in itertools.pairwise(lines)]
  placed = []
  for anchor, size in reversed(list(zip(anchors, sizes, strict=True))):
    candidates = [_beside(anchor, size, ring, angle) for ring in RINGS for angle in ANGLES]
    free = [c for c in candidates if c.within(bounds) and not any(c.overlaps(t) for t in taken)]
    own = (c for c in free if all(c.distance(anchor) <= c.distance(a) for a in anchors))
    placed.append(next(own, free[0] if free else None))
    taken += placed[-1:] if placed[-1] else []
  return placed[::-1]


def is_log(chart: Sequence[Point]) -> bool:
  """Whether the vertical axis is logarithmic. The horizontal axis always is."""
  ratios = [p.ppl_ratio for p in chart]
  return max(ratios) / min(ratios) >= LOG_FROM


def limits(chart: Sequence[Point]) -> tuple[tuple[float, float], tuple[float, float]]:
  """The ranges of both axes, with margins around the points: (x from, x to), (y from, y to)."""
  left, right = min(p.size_ratio for p in chart), max(p.size_ratio for p in chart)
  low, high = min(p.ppl_ratio for p in chart), max(p.ppl_ratio for p in chart)
  margin = 1.15 * (right / left) ** 0.05
  if is_log(chart):
    room = (high / low) ** 0.12
    return (left / margin, right * margin), (low / room, high * room)
  room = max(0.12 * (high - low), 0.005)
  return (left / margin, right * margin), (low - room, high + room)


def halvings(low: float, high: float) -> list[float]:
  """The powers of two within [low, high] for an axis of sizes, or `ticks` if they are too few."""
  powers = [2.0**e for e in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
  return powers if len(powers) > 1 else ticks(low, high)


def ticks(low: float, high: float, log: bool = False, count: int = 6) -> list[float]:
  """About `count` round numbers within [low, high], evenly spaced on the axis."""
  if log and high / low > 30:
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    step = max(1, (last - first + 1) // count)
    return [10.0**e for e in range(first, last + 1, step)]
  if log:
    steps = [m * 10.0**e for e in range(-3, 3) for m in (1, 1.2, 1.5, 2, 3, 5, 7)]
    return [t for t in (s * 10.0 ** math.floor(math.log10(low)) for s in steps) if low <= t <= high]
  raw = (high - low) / count
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
  first = math.ceil(low / step - 1e-9)
  return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _beside(anchor, size, ring, angle) -> Box:
  """The label's box whose nearest edge or corner is `ring` away from the point, at `angle`."""
  reach = POINT_RADIUS + ring
  sides = (math.cos(angle), math.sin(angle))
  # The share of the label that lies before the anchor on each axis: 0, 0.5 or 1.
  before = [0.5 if abs(side) < 0.1 else float(side < 0) for side in sides]
  x, y = (a + reach * s - b * w for a, s, b, w in zip(anchor, sides, before, size, strict=True))
  return Box(x, y, *size)


def _around(start: tuple[float, float], end: tuple[float, float], margin: float = 1.5) -> Box:
  """The box of a horizontal or vertical line."""
  (x0, x1), (y0, y1) = sorted((start[0], end[0])), sorted((start[1], end[1]))
  return Box(x0 - margin, y0 - margin, x1 - x0 + 2 * margin, y1 - y0 + 2 * margin)


def positive(value: float | None) -> bool:
  """Whether there is a finite number above zero."""
  return value is not None and math.isfinite(value) and value > 0
