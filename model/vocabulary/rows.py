"""The parts of a model that have a row for each token: the embedding, the head and its bias."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from model import units
from model.config import ModelConfig
from model.transformer import Transformer, parameters
from ops import linear
from ops.linear import Matrix, Weight
from ops.transposed import TransposedTensor


def map_rows(
  model: Transformer, config: ModelConfig, fn: Callable[[jax.Array], jax.Array]
) -> Transformer:
  """Builds the model of `config` with `fn` applied to each array that has a row for each token.

  fn: [V, ...] -> [new V, ...]; the head comes as [V, D]. All other parameters are shared with the
  model. Raises ValueError if the embedding or the head is compressed already.
  """

  def change(path, value, axis):
    units.check_plain(path, value)
    new = fn(jnp.moveaxis(value, axis, 0))
    return jnp.moveaxis(new, 0, axis).astype(value.dtype)

  return _changed(model, config, change)


def take(model: Transformer, config: ModelConfig, ids: np.ndarray) -> Transformer:
  """Builds the model of `config` with the rows `ids` alone.

  Compressed tables and heads keep the codes of their tokens, if each token has scales of its own.
  Raises ValueError for an embedding that is stored in another way.
  """

  def change(path, value, axis):
    if not isinstance(value, Weight):
      return jnp.take(value, ids, axis=axis)
    return linear.columns(value, ids) if axis else _rows_of(path, value, ids)

  return _changed(model, config, change)


def _rows_of(path: str, table: Weight, ids: np.ndarray) -> Matrix:
  if not isinstance(table, TransposedTensor):
    raise ValueError(
      f'{path} is a {type(table).__name__}, which does not store tokens one by one; trim first'
    )
  return dataclasses.replace(table, weight=linear.columns(table.weight, ids))


def _changed(model: Transformer, config: ModelConfig, change: Callable) -> Transformer:
  letters, values = units.letters(model), {}
  for path, param in parameters(model).items():
    value = param.get_value()
    own = letters[path]
    values[path] = change(path, value, own.index('V')) if 'V' in own else value
  return units.build(config, values, model.dtype)


def count(model: Transformer) -> int:
  """The number of parameters, those of compressed weights as if they were dense."""
  return sum(math.prod(param.get_value().shape) for param in parameters(model).values())


def stored_count(model: Transformer) -> int:
  """The numbers that are stored, codes and scales included."""
  leaves = (leaf for p in parameters(model).values() for leaf in jax.tree.leaves(p.get_value()))
  return sum(leaf.size for leaf in leaves)
