"""The Pareto chart of several runs: a marker and a colour for each run, one front through all.

A thin line joins the points of one recipe in different runs. Colours are those of Okabe and Ito
(https://jfly.uni-koeln.de/color/), each with a shape of its own.
"""

import dataclasses
import os
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model.eval import chart, figures, select
from model.eval.chart import Point
from model.eval.records import BASE, replacing
from model.eval.runs import Row
from model.eval.serving_figure import COLOURS, MARKERS

STYLES = tuple(zip(COLOURS, MARKERS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPoint:
  """A point of the chart, and the run that it is of."""

  run: str
  point: Point


def points(rows: Sequence[Row]) -> list[RunPoint]:
  """The rows that have a size and a perplexity against the base of their own run."""
  runs = list(dict.fromkeys(row.run for row in rows))
  records = {run: [row.record for row in rows if row.run == run] for run in runs}
  size = lambda row: row.record.value(chart.SIZE_RATIO)
  loss = lambda row: select.ppl_ratio(row.record, records[row.run])
  known = [row for row in rows if chart.positive(size(row)) and chart.positive(loss(row))]
  return [
    RunPoint(
      run=row.run,
      point=Point(
        recipe=row.label,
        size_ratio=size(row),
        ppl_ratio=loss(row),
        kind=BASE if row.record.recipe == BASE else 'other',
      ),
    )
    for row in known
  ]


def write_png(rows: Sequence[Row], path: str | os.PathLike) -> bool:
  """Draws the chart, 1600 x 1000 pixels; False, and no file, if there is nothing to draw."""
  found = points(rows)
  if not found:
    return False
  figure = Figure(figsize=(8, 5), dpi=200, layout='constrained')
  canvas = FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  plain = [one.point for one in found]
  figures.draw_axes(axes, plain)
  _draw_runs(axes, found)
  canvas.draw()  # fixes the layout, on which the labels depend
  figure.set_layout_engine('none')
  figures.draw_labels(axes, _labelled(found), canvas.get_renderer())
  with replacing(path) as partial:
    figure.savefig(partial, format='png', metadata={'Software': None})
  return True


def _draw_runs(axes, found: Sequence[RunPoint]) -> None:
  steps = chart.front_steps([one.point for one in found])
  axes.plot(*zip(*steps), color='#888888', linewidth=1.2, alpha=0.7, zorder=2)
  recipes: dict[str, list[Point]] = {}
  for one in found:
    recipes.setdefault(one.point.recipe, []).append(one.point)
  for same in recipes.values():
    xs, ys = [p.size_ratio for p in same], [p.ppl_ratio for p in same]
    axes.plot(xs, ys, color='#bbbbbb', linewidth=0.8, zorder=1)
  for i, run in enumerate(dict.fromkeys(one.run for one in found)):
    colour, marker = STYLES[i % len(STYLES)]
    own = [one.point for one in found if one.run == run]
    xs, ys = [p.size_ratio for p in own], [p.ppl_ratio for p in own]
    style = {
      'color': colour,
      'markersize': 7 - min(i, 3),
      'markerfacecolor': colour if not i else 'none',
    }
    axes.plot(xs, ys, marker, label=figures.short(run), markeredgewidth=1.4, zorder=3 + i, **style)
  below = {'loc': 'lower right', 'bbox_to_anchor': (1, 1), 'borderaxespad': 0.2}
  axes.legend(frameon=False, fontsize=8.5, ncols=4, handletextpad=0.2, **below)


def _labelled(found: Sequence[RunPoint]) -> list[Point]:
  """The points, of which only the first one of each recipe keeps its name as a label."""
  named, points = set(), []
  for one in found:
    recipe = '' if one.point.recipe in named else one.point.recipe
    named.add(recipe)
    points.append(dataclasses.replace(one.point, recipe=recipe))
  return points
