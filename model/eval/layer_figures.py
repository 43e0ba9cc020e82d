"""Pictures of single layers: error and bits of each recipe, and the costs of treatments."""

import math
import os
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from model.eval.records import BASE, Record, replacing

# A colour of Okabe and Ito's and a marker each, so that readers need not tell colours apart.
KINDS = {
  'query': ('#0072B2', 'o'),
  'key': ('#56B4E9', 's'),
  'value': ('#009E73', '^'),
  'output': ('#F0E442', 'D'),
  'gate': ('#E69F00', 'v'),
  'up': ('#D55E00', 'P'),
  'down': ('#CC79A7', 'X'),
}
OTHER = ('#555555', '.')
BITS_COLOUR = '#999999'
PANEL_INCHES = (3.4, 2.1)
COLUMNS = 3


def write_layers(records: Sequence[Record], path: str | os.PathLike) -> bool:
  """Draws a panel per recipe: the relative error and the bits per weight of each matrix.

  Returns False and draws nothing if no record describes its compressed layers.
  """
  shown = [r for r in records if r.recipe != BASE and r.config.get('layers')]
  if not shown:
    return False
  columns = min(COLUMNS, len(shown))
  rows = math.ceil(len(shown) / columns)
  width, height = PANEL_INCHES
  figure = Figure(figsize=(width * columns, height * rows + 0.5), dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
  for panel, record in zip(panels, shown):
    _draw_layers(panel, record)
  for panel in panels[len(shown) :]:
    panel.set_axis_off()
  kinds = dict.fromkeys(_kind(row['layer']) for r in shown for row in _rows(r))
  handles = [_handle(kind) for kind in kinds]
  handles.append(Line2D([], [], color=BITS_COLOUR, drawstyle='steps-mid', label='bits (right)'))
  figure.legend(handles=handles, loc='outside lower center', ncols=len(handles), fontsize=8)
  _save(figure, path)
  return True


def write_sensitivity(costs: Sequence[tuple[str, str, float]], path: str | os.PathLike) -> None:
  """Draws costs (layer, treatment, KL in nats per token) as a map of layers by treatments."""
  layers = list(dict.fromkeys(layer for layer, _, _ in costs))
  treatments = list(dict.fromkeys(t for _, t, kl in costs if kl > 0))
  known = {(layer, treatment): kl for layer, treatment, kl in costs}
  grid = [[_log(known.get((layer, t), 0.0)) for t in treatments] for layer in layers]
  size = (2.6 + 0.9 * len(treatments), 1.2 + 0.16 * len(layers))
  figure = Figure(figsize=size, dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  image = axes.imshow(grid, aspect='auto', cmap='cividis', interpolation='nearest')
  axes.set_xticks(range(len(treatments)), treatments, rotation=30, ha='right', fontsize=8)
  axes.set_yticks(range(len(layers)), layers, fontsize=6)
  bar = figure.colorbar(image, ax=axes)
  bar.set_label('KL from the base, nats per token (log10)', fontsize=8)
  axes.set_title('What each treatment of one matrix costs', loc='left', fontsize=9)
  _save(figure, path)


def _draw_layers(panel, record):
  rows = _rows(record)
  for kind in dict.fromkeys(_kind(row['layer']) for row in rows):
    some = [(i, row) for i, row in enumerate(rows) if _kind(row['layer']) == kind]
    colour, marker = KINDS.get(kind, OTHER)
    places, errors = [i for i, _ in some], [row['relative_error'] for _, row in some]
    panel.plot(places, errors, marker, color=colour, markersize=3.5, markeredgewidth=0)
  panel.set_title(record.recipe, loc='left', fontsize=9)
  panel.set_ylim(0, 1.1 * max(row['relative_error'] for row in rows) or 1)
  panel.tick_params(labelsize=7)
  panel.set_ylabel('|w − ŵ| / |w|', fontsize=7)
  panel.set_xlabel('matrix, in running order', fontsize=7)
  bits = panel.twinx()
  values = [8 * row['stored_bytes'] / math.prod(row['shape']) for row in rows]
  bits.plot(range(len(rows)), values, color=BITS_COLOUR, drawstyle='steps-mid', linewidth=1)
  bits.set_ylim(0, max(16, *values) * 1.05)
  bits.tick_params(labelsize=7, colors=BITS_COLOUR)


def _rows(record) -> list[dict]:
  """The matrices of the blocks in running order."""
  rows = [row for row in record.config['layers'] if row['layer'].startswith('layers.')]
  return sorted(rows, key=lambda row: _order(row['layer']))


def _order(layer: str) -> tuple[int, int]:
  known, kind = list(KINDS), _kind(layer)
  return int(layer.split('.')[1]), known.index(kind) if kind in known else len(known)


def _kind(layer: str) -> str:
  return layer.rpartition('.')[2]


def _handle(kind):
  colour, marker = KINDS.get(kind, OTHER)
  return Line2D([], [], color=colour, marker=marker, linestyle='', label=kind)


def _log(kl: float) -> float:
  return math.log10(max(kl, 1e-9))


def _save(figure, path):
  with replacing(path) as partial:
    figure.savefig(partial, format='png', metadata={'Software': None})
