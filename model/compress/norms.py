"""Rescales the norms of a residual stream whose width changes.

A norm divides by the root mean square of its input (or by the standard deviation), which changes
with the width. If D' of D dimensions stay and hold the share r of the squares of the norm's
normalized input, the scale of the norm is multiplied by sqrt(r D / D'): the kept dimensions then
come out as large as before, on average. This is exact where the removed dimensions are zero, r = 1.
The papers on pruning the width leave it to the training that follows.

The epsilon stays as it is; to be exact, it would be multiplied by r D / D', too. A layer norm also
subtracts the mean of its input; the kept dimensions have another one, which stays uncorrected.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from model.compress.measurements import Measurements
from model.transformer import Transformer, parameters

MOMENTS = 'input_moments'


def factors(model: Transformer, measurements: Measurements, kept: np.ndarray) -> dict[str, float]:
  """Returns what the scale of each norm of the stream is multiplied by, if these dimensions stay.

  The keys are the norms' paths.
  """
  energies = {
    path: _before_scale(model, path, statistics[MOMENTS])
    for path, statistics in measurements.normed((MOMENTS,)).items()
  }
  if any(layer.post_norms for layer in model.config.layers):
    energies |= _of_post_norms(model, measurements)
  return {path: factor(energy_D, kept) for path, energy_D in energies.items()}


def factor(energy_D: np.ndarray, kept: np.ndarray) -> float:
  """Returns sqrt(r D / D') from the mean square of each dimension; 1 if all are zero."""
  if not energy_D.any():
    return 1.0
  growth = len(energy_D) / len(kept)
  return float(np.sqrt(energy_D[kept].sum() / energy_D.sum() * growth))


def rescale(values: dict[str, jax.Array], factors: Mapping[str, float], offset: float) -> None:
  """Multiplies the scales of norms, each with the offset that is added to it, by a factor.

  `values` has the parameters of a model by path, and is changed.
  """
  for path, by in factors.items():
    scale_D = values[f'{path}.scale']
    scaled_D = (scale_D.astype(jnp.float32) + offset) * by - offset
    values[f'{path}.scale'] = scaled_D.astype(scale_D.dtype)


def _before_scale(model, norm: str, moments: jax.Array) -> np.ndarray:
  """The mean square of a norm's normalized input, from the moments of its output: float64 [D]."""
  params = parameters(model)
  vector = lambda name: np.asarray(params[f'{norm}.{name}'].get_value(), np.float64)
  scale_D = vector('scale') + model.config.norm_offset
  bias_D = vector('bias') if f'{norm}.bias' in params else 0.0
  mean_D, square_D = np.asarray(moments, np.float64)
  centred_D = square_D - 2 * bias_D * mean_D + np.square(bias_D)
  # What a scale of zero hides is not known, and matters to no reader of this norm.
  return np.where(scale_D == 0, 0, centred_D / np.where(scale_D == 0, 1, np.square(scale_D)))


def _of_post_norms(model, measurements) -> dict[str, np.ndarray]:
  """The mean square of the input of each norm after attention and feed-forward: float64 [D].

  It follows from the covariance of the inputs of the matrix before the norm.
  """
  params, found = parameters(model), {}
  written = lambda block: {w.layer: w.norm for w in block.layer.wiring.writes if w.norm is not None}
  names = ('input_covariance', MOMENTS)
  for l, measured in enumerate(measurements.inputs(lambda block: tuple(written(block)), names)):
    for layer, norm in written(model.layers[l]).items():
      value = lambda name, layer=layer, l=l: params.get(f'layers.{l}.{layer}.{name}')
      if value('weight').get_value().ndim > 2:
        raise ValueError(f'{norm} follows experts, whose outputs it sees mixed; keep the width')
      w_ID, bias = np.asarray(value('weight').get_value(), np.float64), value('bias')
      bias_D = 0.0 if bias is None else np.asarray(bias.get_value(), np.float64)
      covariance_II = np.asarray(measured[layer]['input_covariance'], np.float64)
      mean_I = np.asarray(measured[layer][MOMENTS][0], np.float64)
      square_D = np.einsum('ID,ID->D', w_ID, covariance_II @ w_ID)
      found[f'layers.{l}.{norm}'] = square_D + bias_D * (2 * mean_I @ w_ID + bias_D)
  return found
