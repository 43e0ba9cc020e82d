"""The parts of a model that have a row for each token: the embedding, the head and its bias."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from model import units
from model.config import ModelConfig
from model.transformer import Transformer, parameters


def map_rows(
  model: Transformer, config: ModelConfig, fn: Callable[[jax.Array], jax.Array]
) -> Transformer:
  """Builds the model of `config` with `fn` applied to each array that has a row for each token.

  fn: [V, ...] -> [new V, ...]; the head comes as [V, D]. All other parameters are shared with the
  model. Raises ValueError if the embedding or the head is compressed already.
  """
  letters, values = units.letters(model), {}
  for path, param in parameters(model).items():
    value = param.get_value()
    if 'V' in letters[path]:
      units.check_plain(path, value)
      axis = letters[path].index('V')
      rows = fn(jnp.moveaxis(value, axis, 0))
      value = jnp.moveaxis(rows, 0, axis).astype(value.dtype)
    values[path] = value
  return units.build(config, values, model.dtype)


def count(model: Transformer) -> int:
  """The number of parameters, those of compressed weights as if they were dense."""
  return sum(math.prod(param.get_value().shape) for param in parameters(model).values())
