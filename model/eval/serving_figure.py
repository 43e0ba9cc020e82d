"""The picture of a server under load: latencies against the tokens that it gives out per second."""

import os
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model.eval.records import Record, replacing

COLOURS = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#555555'
MARKERS = 'osD^vPX'
# axis label, the metric of the line, that of its upper end
PANELS = (
  ('time per token after the first, ms', 'tpot_median_s', 'tpot_p95_s'),
  ('time to the first token, ms', 'ttft_median_s', 'ttft_p95_s'),
)


def lines(records: Sequence[Record]) -> Mapping[str, list[Record]]:
  """The records by server and kind of load, by growing load."""
  found = {}
  for record in records:
    found.setdefault(f'{record.recipe}, {record.config["load"]}', []).append(record)
  return {name: sorted(some, key=lambda r: r.config['amount']) for name, some in found.items()}


def write(records: Sequence[Record], path: str | os.PathLike) -> None:
  """Draws medians, and whiskers up to the 95th percentile, as a PNG."""
  figure = Figure(figsize=(10, 4.2), dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  for axis, (label, middle, upper) in zip(figure.subplots(1, 2), PANELS):
    for i, (name, some) in enumerate(lines(records).items()):
      some = [r for r in some if middle in r.metrics]
      xs = [r.value('output_tokens_per_s') for r in some]
      ys = [1e3 * r.value(middle) for r in some]
      above = [1e3 * r.value(upper) - y for r, y in zip(some, ys)]
      style = {'color': COLOURS[i % len(COLOURS)], 'marker': MARKERS[i % len(MARKERS)]}
      axis.errorbar(xs, ys, [[0] * len(ys), above], capsize=2, label=name, **style)
      for record, x, y in zip(some, xs, ys):
        text = f'{record.config["amount"]:g}'
        axis.annotate(text, (x, y), (3, -11), textcoords='offset points', fontsize=8)
    axis.set(xlabel='tokens/s given out', ylabel=label, yscale='log', xlim=(0, None))
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
  figure.axes[0].legend(frameon=False, fontsize=8.5)
  with replacing(path) as partial:
    figure.savefig(partial, format='png', metadata={'Software': None})
