"""The distributions of the times of answers, as metrics of a record."""

from collections.abc import Sequence

import numpy as np

from experiments.load import Answer
from model.eval import timing
from model.eval.records import Metric

PERCENTILES = {'median': 50, 'p95': 95, 'p99': 99}


def of(answers: Sequence[Answer]) -> dict[str, Metric]:
  """TTFT, TPOT, ITL and the time of a whole answer, of answers without an error."""
  samples = {
    'ttft': [a.first_s for a in answers],
    'tpot': [a.each_s for a in answers if a.each_s is not None],
    'itl': np.concatenate([a.gaps_s for a in answers]),
    'e2e': [a.whole_s for a in answers],
  }
  metrics = {}
  for name, values in samples.items():
    metrics |= _distribution(name, np.asarray(values))
  return metrics


def _distribution(name: str, values: np.ndarray) -> dict[str, Metric]:
  if not len(values):
    return {}
  found = {f'{name}_mean_s': Metric(values.mean(), 's', len(values))}
  for which, percentile in PERCENTILES.items():
    spread = timing.interquartile_range(values) if which == 'median' else None
    value = np.percentile(values, percentile)
    found[f'{name}_{which}_s'] = Metric(value, 's', len(values), spread)
  return found
