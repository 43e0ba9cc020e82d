"""Gives neutral statistics to experts that too few rows of the calibration text reach.

A statistic of few rows says more about these rows than about the expert. An expert that saw fewer
rows than the statistic needs gets one that prefers no input, so that every technique works as
without data: GPTQ and AWQ round to nearest, Wanda prunes by magnitude. A fixed scale of
activations, which only data can give, is the largest of all experts. The ledger has a row
for each such expert, with its name and the number of its rows.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from model.compress.ledger import Event
from model.compress.registry import Statistics
from model.compress.statistics import STATISTICS

ROWS = 'rows'


def least_rows(names: tuple[str, ...], inputs: int) -> int:
  """How many rows an expert has to see for these statistics of its inputs to be used."""
  return max((STATISTICS[name].least(inputs) for name in names), default=0)


def feed(
  found: Mapping[str, Statistics], inputs: Mapping[str, int], technique: str
) -> tuple[dict[str, Statistics], list[Event]]:
  """Replaces the statistics of starved experts: statistics by layer, and the ledger's rows.

  `found` has 'rows' beside the statistics, and `inputs` the number of inputs, both by the path of
  the layer. Layers whose statistics are one object, because they share their inputs, share the
  result as well.
  """
  fed, events, done = {}, [], {}
  for layer, measured in found.items():
    least, rows = least_rows(tuple(measured), inputs[layer]), np.asarray(measured[ROWS])
    starved = np.flatnonzero(rows < least) if rows.ndim else []
    if id(measured) not in done:
      done[id(measured)] = _replaced(measured, rows >= least) if len(starved) else measured
    fed[layer] = done[id(measured)]
    what = f'compressed without statistics, with fewer calibration rows than {least}'
    events += [
      Event(layer=f'{layer}.{e}', technique=technique, event=what, detail=str(int(rows[e])))
      for e in starved
    ]
  return fed, events


@jax.jit
def _replaced(measured: Statistics, seen_E: jax.Array) -> Statistics:
  found = {}
  for name, values in measured.items():
    neutral = STATISTICS[name].neutral(values, seen_E)[None]
    mine = seen_E.reshape(-1, *[1] * (values.ndim - 1))
    found[name] = jnp.where(mine, values, neutral)
  return found
