"""A figure of cascades: quality against cost, one line for each small model."""

from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def write(curves: Mapping[str, Sequence[tuple[float, float]]], path) -> None:
  """Draws the (cost, quality) of each threshold, that of the large model alone last.

  The large model alone costs 1.
  """
  figure = Figure(figsize=(5.2, 3.6), layout='constrained')
  FigureCanvasAgg(figure)
  axis = figure.subplots()
  for name, points in curves.items():
    costs, qualities = zip(*sorted(points))
    axis.plot(costs, qualities, label=f'{name}, then large')
  _, alone = next(iter(curves.values()))[-1]
  axis.axhline(alone, linestyle=':', color='grey')
  axis.plot([1], [alone], marker='o', color='black', linestyle='none', label='large alone')
  axis.set(xlabel='cost of an answer, of the large model', ylabel='tokens right')
  axis.legend(fontsize=8)
  figure.savefig(path, dpi=120)
