"""A figure of cascades: quality against cost, one line for each small model."""

from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model.infer.cascade import Point


def write(curves: Mapping[str, Sequence[Point]], path) -> None:
  """Draws the points of each cascade; the large model alone costs 1."""
  figure = Figure(figsize=(5.2, 3.6), layout='constrained')
  FigureCanvasAgg(figure)
  axis = figure.subplots()
  for name, points in curves.items():
    ordered = sorted(points, key=lambda point: point.cost)
    axis.plot([p.cost for p in ordered], [p.quality for p in ordered], label=f'{name}, then large')
  alone = max(curves.values(), key=len)[-1].quality
  axis.axhline(alone, linestyle=':', color='grey')
  axis.plot([1], [alone], marker='o', color='black', linestyle='none', label='large alone')
  axis.set(xlabel='cost of an answer, of the large model', ylabel='tokens right')
  axis.legend(fontsize=8)
  figure.savefig(path, dpi=120)
