"""The picture of a training run: the loss of each update, its running mean, and held-out losses."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model.eval.records import replacing

SMOOTHED = 20  # the running mean is over a twentieth of the run
EVERY, MEAN, HELD_OUT = '#BBBBBB', '#0072B2', '#D55E00'


def write(
  losses: Sequence[float],
  path: str | os.PathLike,
  *,
  held_out: Mapping[int, float] | None = None,
  label: str = 'loss, nats per token',
) -> None:
  """Draws the loss by update as a PNG; `held_out` has losses by the number of updates before."""
  losses = np.asarray(losses, np.float64)
  figure = Figure(figsize=(7, 4), dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  axis = figure.subplots()
  updates = np.arange(1, len(losses) + 1)
  axis.plot(updates, losses, color=EVERY, linewidth=0.8, label='each update')
  axis.plot(updates, running_mean(losses), color=MEAN, linewidth=1.8, label='running mean')
  if held_out:
    axis.plot(*zip(*sorted(held_out.items())), 'o--', color=HELD_OUT, label='held-out text')
  axis.set_xlabel('update')
  axis.set_ylabel(label)
  axis.legend(frameon=False)
  axis.grid(alpha=0.3)
  with replacing(path) as partial:
    figure.savefig(partial, format='png')


def running_mean(losses: np.ndarray) -> np.ndarray:
  """The mean of the updates around each, as many on either side as there are at the ends."""
  reach = max(1, len(losses) // SMOOTHED) // 2
  sums = np.concatenate([[0.0], np.cumsum(losses)])
  at = np.arange(len(losses))
  around = np.minimum(reach, np.minimum(at, len(losses) - 1 - at))
  return (sums[at + around + 1] - sums[at - around]) / (2 * around + 1)
