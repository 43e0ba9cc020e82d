"""Scores the units of a model by the loss from removing them.

  weights      the L2 norm of all weights of the unit (Li et al. 2016,
               https://arxiv.org/abs/1608.08710)
  activations  the L2 norm over all tokens of the output of the unit: the inputs of the down
               projection, of the output projection, or the outputs of the norms (Muralidharan et
               al. 2024, Minitron, https://arxiv.org/abs/2407.14679, who take the mean magnitude
               within a sequence and the L2 norm over sequences)
  output       how far the outputs of the matrices that read the unit move if it alone is removed:
               the L2 norm of the change over all tokens, up to a factor that all units share
  taylor       |d loss / d gate|, the first-order change of the loss (Molchanov et al. 2019,
               https://arxiv.org/abs/1906.10771); see `gates`

For feed-forward channels and heads, 'output' is the exact error of attention or feed-forward for
each single removal; norms after them (Gemma 2) are left out. Scores compare units of one layer. Of
different layers, only those of 'taylor' share a unit of measure.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from model import units
from model.compress.measurements import Measurements
from model.compress.programs import compiled
from model.transformer import Transformer, linears, parameters
from model.units import Unit
from ops import experts, structure

Importance = Literal['weights', 'activations', 'output', 'taylor']


def score(
  model: Transformer, measurements: Measurements | None, unit: Unit, importance: Importance
) -> list[np.ndarray]:
  """Scores units 'F' or 'K' of each layer, or 'D' of the model (one array): float32 [units] each.

  `measurements` may be None for the importance 'weights'.
  """
  if importance == 'weights':
    found = _weights(model, unit)
  elif importance == 'taylor':
    found = measurements.slopes()[unit]
  elif unit == 'D':
    found = [_of_stream(model, measurements, importance)]
  else:
    found = _of_layers(model, measurements, unit, importance)
  return [np.asarray(scores) for scores in found]


def _weights(model, unit) -> list:
  params = parameters(model)
  layers = range(len(model.config.layers)) if unit != 'D' else [None]
  found = []
  for l in layers:
    parts = [
      structure.energy(params[cut.path].get_value(), cut.axis, cut.run)
      for cut in units.cuts(model, unit, l)
    ]
    found.append(jnp.sqrt(sum(parts)))
  return found


def _of_layers(model, measurements, unit, importance) -> list:
  found, readers = [], functools.partial(units.readers, unit=unit)
  # Heads need the covariance of their inputs; of single channels it is the diagonal.
  wanted = 'input_covariance' if (unit, importance) == ('K', 'output') else 'input_norm'
  for block, measured in zip(model.layers, measurements.inputs(readers, (wanted,)), strict=True):
    ((layer, statistics),) = measured.items()
    linear = linears(block)[layer]
    w = linear.weight.get_value()
    run = units.run(block.layer, linear.axes[-2], w.shape[-2])
    found.append(_of_inputs(statistics, w, run, importance))
  return found


def _of_inputs(statistics, w, run, importance):
  if 'input_covariance' in statistics:
    error = _removal_error(statistics['input_covariance'], w, run)
    return jnp.sqrt(jnp.maximum(error, 0))  # rounding may leave it below
  if experts.count(w) is None:
    energy = _energy(statistics['input_norm'], w, run, importance)
  else:  # a channel goes from all of them
    of_expert = jax.vmap(lambda norm_I, w_IO: _energy(norm_I, w_IO, run, importance))
    energy = of_expert(statistics['input_norm'], w).sum(0)
  return jnp.sqrt(energy)


def _energy(norm_I, w_IO, run, importance):
  energy = structure.energy(norm_I, 0, run)
  return energy * structure.energy(w_IO, 0) if importance == 'output' else energy


def _of_stream(model, measurements, importance):
  """The norms' outputs, all norms together; for 'output' weighed by the matrices that read them."""
  total = 0
  for path, statistics in measurements.normed(('input_norm',)).items():
    energy_D = jnp.square(statistics['input_norm'])
    if importance == 'output':
      energy_D = energy_D * sum(structure.energy(w, w.ndim - 2) for w in _readers(model, path))
    total = total + energy_D
  return jnp.sqrt(total)


def _readers(model, norm: str) -> list:
  """The matrices [D, O] or [E, D, O] that read what a norm puts out."""
  l = units.layer_of(norm)
  if l is None:
    return [model.embedding.table.get_value().T if model.head is None else _weight(model.head)]
  block = model.layers[l]
  consumers = block.layer.wiring.norms[norm.split('.', 2)[2]]
  return [_weight(linears(block)[layer]) for layer in consumers]


def _weight(linear):
  return linear.weight.get_value()


_removal_error = compiled(structure.removal_error, static_argnums=2)
