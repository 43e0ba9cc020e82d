"""Draws the Pareto chart of bytes against perplexity as a PNG, and prepares it for an inline SVG.

Each kind of point has a colour of Okabe and Ito's palette and a shape of its own, so that readers
need not tell colours apart (https://jfly.uni-koeln.de/color/).
"""

import dataclasses
import hashlib
import math
import os
import unicodedata
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from model.eval import chart
from model.eval.chart import Box, Point
from model.eval.records import Record, replacing, to_line

X_LABEL = 'linear weights: bytes as a share of bfloat16'
Y_LABEL = 'perplexity ÷ perplexity of the base'
# kind -> colour, matplotlib marker, its size, meaning
STYLES = {
  'front': ('#0072B2', 'o', 7.5, 'Pareto front'),
  'other': ('#D55E00', 's', 5.5, 'another recipe is as small and better'),
  'base': ('#555555', 'D', 6.5, 'base'),
}
LEADER_FROM = 1.6 * chart.POINT_RADIUS  # labels further away than this get a line to their point
CSS_DPI = 96  # labels are placed in CSS pixels

SVG_WIDTH, SVG_HEIGHT = 960, 480
SVG_PLOT = Box(70, 14, 874, 412)
SVG_FONT_SIZE = 12.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SvgPoint:
  """One point in SVG coordinates, with its label and the end of the line to it, if any."""

  point: Point
  x: float
  y: float
  label: str
  label_at: tuple[float, float] | None  # left end of the baseline
  leader: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SvgChart:
  """What the template needs to write the SVG."""

  points: tuple[SvgPoint, ...]
  x_ticks: tuple[tuple[float, str], ...]
  y_ticks: tuple[tuple[float, str], ...]
  front: str  # the points of a polyline
  plot: Box = SVG_PLOT
  width: int = SVG_WIDTH
  height: int = SVG_HEIGHT


def svg(records: Sequence[Record]) -> SvgChart | None:
  """The chart in SVG coordinates, or None if no record has both a size and a quality."""
  points = chart.points(records)
  if not points:
    return None
  (x_low, x_high), (y_low, y_high) = chart.limits(points)
  log = chart.is_log(points)
  scale_y = math.log if log else float
  plot = SVG_PLOT
  x_of = lambda x: plot.x + plot.width * math.log(x / x_low) / math.log(x_high / x_low)
  span = scale_y(y_high) - scale_y(y_low)
  y_of = lambda y: plot.y + plot.height * (scale_y(y_high) - scale_y(y)) / span
  corners = [(x_of(x), y_of(y)) for x, y in chart.front_steps(points)]
  return SvgChart(
    points=_svg_points(points, x_of, y_of, corners),
    x_ticks=tuple((x_of(t), _percent(t)) for t in chart.halvings(x_low, x_high)),
    y_ticks=tuple((y_of(t), f'{t:,.6g}') for t in chart.ticks(y_low, y_high, log)),
    front=' '.join(f'{x:.1f},{y:.1f}' for x, y in corners),
  )


def write_png(records: Sequence[Record], path: str | os.PathLike) -> None:
  """Draws the chart with matplotlib, 1600 x 1000 pixels. The file names its `source`."""
  points = chart.points(records)
  figure = Figure(figsize=(8, 5), dpi=200, layout='constrained')
  canvas = FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  if points:
    draw_axes(axes, points)
    _draw_points(axes, points)
    canvas.draw()  # fixes the layout, on which the labels depend
    figure.set_layout_engine('none')
    draw_labels(axes, points, canvas.get_renderer())
  else:
    axes.set_axis_off()
    axes.text(0.5, 0.5, 'no record has both a size and a perplexity ratio', ha='center')
  with replacing(path) as partial:
    metadata = {'Software': None, 'Source': source(records)}
    figure.savefig(partial, format='png', metadata=metadata)


def source(records: Sequence[Record]) -> str:
  """The SHA-256 of records, by which a picture tells what it was drawn from."""
  return hashlib.sha256('\n'.join(map(to_line, records)).encode()).hexdigest()


def draw_axes(axes, points):
  """Scales, ticks, names and limits of the axes for these points."""
  x_limits, y_limits = chart.limits(points)
  log = chart.is_log(points)
  axes.set_xscale('log')
  if log:
    axes.set_yscale('log')
  axes.set(xlim=x_limits, ylim=y_limits, xlabel=X_LABEL, ylabel=Y_LABEL)
  axes.xaxis.set_major_locator(FixedLocator(chart.halvings(*x_limits)))
  axes.yaxis.set_major_locator(FixedLocator(chart.ticks(*y_limits, log)))
  axes.xaxis.set_minor_locator(NullLocator())
  axes.yaxis.set_minor_locator(NullLocator())
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _percent(x)))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:,.6g}'))
  axes.set_title('Smaller and better is lower left', loc='left', fontsize=11, color='#333333')
  axes.grid(color='#e4e4e4', linewidth=0.7)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)


def _draw_points(axes, points):
  xs, ys = zip(*chart.front_steps(points))
  axes.plot(xs, ys, color=STYLES['front'][0], linewidth=1.4, alpha=0.6, zorder=2)
  for kind, (colour, marker, size, meaning) in STYLES.items():
    some = [p for p in points if p.kind == kind]
    if some:
      xs, ys = [p.size_ratio for p in some], [p.ppl_ratio for p in some]
      face = 'white' if kind == 'other' else colour
      style = {'color': colour, 'markerfacecolor': face, 'markersize': size}
      style['zorder'] = 3 if kind == 'other' else 4
      axes.plot(xs, ys, marker, label=meaning, **style)
  below = {'loc': 'lower right', 'bbox_to_anchor': (1, 1), 'borderaxespad': 0.2}
  axes.legend(frameon=False, fontsize=8.5, ncols=len(STYLES), handletextpad=0.2, **below)


def draw_labels(axes, points, renderer):
  """Writes the recipes of the points where there is room. The layout must be fixed."""
  pixel = axes.figure.dpi / CSS_DPI
  box = lambda e: Box(e.x0 / pixel, e.y0 / pixel, e.width / pixel, e.height / pixel)
  at = axes.transData.inverted().transform
  style = {'fontsize': 8.5, 'va': 'bottom', 'ha': 'left', 'zorder': 5, 'parse_math': False}
  texts = [axes.text(0, 0, short(p.recipe), **style) for p in points]
  sizes = [box(t.get_window_extent(renderer)) for t in texts]
  pixels = lambda pairs: (axes.transData.transform(pairs) / pixel).tolist()
  anchors = pixels([(p.size_ratio, p.ppl_ratio) for p in points])
  corners = pixels(chart.front_steps(points))
  bounds = box(axes.get_window_extent(renderer))
  places = chart.place_labels(anchors, [(s.width, s.height) for s in sizes], bounds, corners)
  for text, anchor, place in zip(texts, anchors, places, strict=True):
    if place is None:
      text.remove()
      continue
    text.set_position(at((place.x * pixel, place.y * pixel)))
    text.set_path_effects([withStroke(linewidth=2.5, foreground='white')])
    end = _leader(anchor, place)
    if end:
      line = at([(x * pixel, y * pixel) for x, y in (anchor, end)])
      axes.plot(line[:, 0], line[:, 1], color='#999999', linewidth=0.6, zorder=1)


def _svg_points(points, x_of, y_of, corners) -> tuple[SvgPoint, ...]:
  anchors = [(x_of(p.size_ratio), y_of(p.ppl_ratio)) for p in points]
  labels = [short(p.recipe) for p in points]
  sizes = [(_text_width(label), SVG_FONT_SIZE * 1.25) for label in labels]
  places = chart.place_labels(anchors, sizes, SVG_PLOT, corners)
  return tuple(
    SvgPoint(
      point=point,
      x=x,
      y=y,
      label=label,
      label_at=(place.x, place.y + SVG_FONT_SIZE) if place else None,
      leader=_leader((x, y), place) if place else None,
    )
    for point, (x, y), label, place in zip(points, anchors, labels, places, strict=True)
  )


def _leader(anchor: tuple[float, float], place: Box) -> tuple[float, float] | None:
  """The end of a line from the anchor to its label, or None if the label is close enough."""
  end = place.nearest(*anchor)
  return end if math.dist(end, anchor) > LEADER_FROM else None


def _text_width(text: str) -> float:
  """An upper estimate, because the browser's font is unknown."""
  wide = sum(unicodedata.east_asian_width(c) in 'WF' for c in text)
  return SVG_FONT_SIZE * (0.58 * len(text) + 0.5 * wide)


def _percent(share: float) -> str:
  return f'{100 * share:.3g}%'


def short(recipe: str, width: int = 32) -> str:
  """A name that is cut if it is long."""
  return recipe if len(recipe) <= width else recipe[: width - 1] + '…'
