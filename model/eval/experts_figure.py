"""The picture of how experts are used over a training run: their load, one panel for each layer."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model.eval.records import replacing

COLUMNS, POINTS = 4, 300  # panels in a row; columns of a panel, each the mean of some updates
FARTHEST = 2.0  # log2 of the load, relative to an even one, at the ends of the colours
PANEL = 2.6, 1.9  # inches


def loads(records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """The load of each expert as a multiple of an even share, [E, updates], by layer.

  Reads what `train.routing.Balanced` reports. Layers that are stacked are told apart by a number.
  """
  found = {}
  for path in records[0]['experts']:
    load = np.asarray([record['experts'][path]['load'] for record in records])
    load = load * load.shape[-1]
    if load.ndim == 2:
      found[path] = load.T
    else:
      found |= {f'{path} {r}': load[:, r].T for r in range(load.shape[1])}
  return found


def write(records: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
  """Draws the loads of a run as a PNG."""
  layers = loads(records)
  columns = min(COLUMNS, len(layers))
  rows = -(-len(layers) // columns)
  size = PANEL[0] * columns + 1, PANEL[1] * rows + 0.4
  figure = Figure(figsize=size, dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis, (name, load_E_) in zip(axes, layers.items()):
    count, updates = load_E_.shape
    image = axis.imshow(
      np.log2(np.maximum(shortened(load_E_), 2.0**-FARTHEST)),
      cmap='RdBu_r',
      vmin=-FARTHEST,
      vmax=FARTHEST,
      aspect='auto',
      interpolation='nearest',
      extent=(0.5, updates + 0.5, count - 0.5, -0.5),
    )
    axis.set_title(name, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.set(xlabel='update', ylabel='expert')
  for axis in axes[len(layers) :]:
    axis.remove()
  figure.colorbar(image, ax=list(axes[: len(layers)]), label='log2(load / even share)')
  with replacing(path) as partial:
    figure.savefig(partial, format='png')


def shortened(load_E_: np.ndarray) -> np.ndarray:
  """The means over at most `POINTS` stretches of updates, of about equal length."""
  parts = np.array_split(load_E_, min(POINTS, load_E_.shape[1]), axis=1)
  return np.stack([part.mean(axis=1) for part in parts], axis=1)
