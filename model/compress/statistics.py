"""What calibration measures at the input of a linear layer, and how it is recorded.

A `Recorder` is a weight that records its inputs. To observe a block, its weights are wrapped in
recorders during one traced call; the model itself has no hooks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ops.linear import Matrix, Weight, dense, matmul, matmuls
from ops.solvers import hessian


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistic:
  """of(x_TI) measures some tokens, merge(a, b) joins two measurements, finish(a) gives the result.

  Zeros are the neutral element of `merge`. Techniques read the result of `finish`.
  """

  of: Callable[[jax.Array], Any]
  merge: Callable[[Any, Any], Any]
  finish: Callable[[Any], Any]


def _add(a, b):
  return jax.tree.map(jnp.add, a, b)


def _float(x_TI):
  return x_TI.astype(jnp.float32)


def _moments(x_TI):
  return jnp.stack([x_TI.sum(0), jnp.square(x_TI).sum(0)])


STATISTICS: dict[str, Statistic] = {
  # The L2 norm of each input over all tokens, float32 [I].
  'input_norm': Statistic(
    of=lambda x_TI: jnp.square(_float(x_TI)).sum(0), merge=_add, finish=jnp.sqrt
  ),
  # The mean of x xᵀ over all tokens, float32 [I, I]: half the Hessian of the squared output error.
  'input_covariance': Statistic(
    of=lambda x_TI: (hessian.gram(x_TI), jnp.float32(x_TI.shape[0])),
    merge=_add,
    finish=lambda total: hessian.whole(total[0]) / total[1],
  ),
  # The largest magnitude of each input, float32 [I].
  'input_absmax': Statistic(
    of=lambda x_TI: jnp.abs(_float(x_TI)).max(0), merge=jnp.maximum, finish=lambda a: a
  ),
  # The mean magnitude of each input, float32 [I].
  'input_absmean': Statistic(
    of=lambda x_TI: (jnp.abs(_float(x_TI)).sum(0), jnp.float32(x_TI.shape[0])),
    merge=_add,
    finish=lambda total: total[0] / total[1],
  ),
  # The mean and the mean square of each input, float32 [2, I].
  'input_moments': Statistic(
    of=lambda x_TI: (_moments(_float(x_TI)), jnp.float32(x_TI.shape[0])),
    merge=_add,
    finish=lambda total: total[0] / total[1],
  ),
}


@dataclasses.dataclass(frozen=True)
class Recorder(Weight):
  """Multiplies like the weight it wraps, and appends each input to `seen`."""

  weight: Matrix
  seen: list[jax.Array]

  @property
  def shape(self):
    return self.weight.shape

  @property
  def dtype(self):
    return self.weight.dtype

  def dense(self):
    return dense(self.weight)

  def matmul(self, x):
    self.seen.append(x)
    return matmul(x, self.weight)

  @classmethod
  def matmuls(cls, x, weights):
    for w in weights:
      w.seen.append(x)
    return matmuls(x, [w.weight for w in weights])

  def map_values(self, fn):
    raise ValueError('a recorder lives for one traced call and is never compressed')


def measure(seen: list[jax.Array], names: tuple[str, ...]) -> dict[str, Any]:
  """The raw statistics of everything a recorder saw."""
  tokens_TI = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in seen])
  return {name: STATISTICS[name].of(tokens_TI) for name in names}


def merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
  """Adds two measurements of the same layer."""
  return {name: STATISTICS[name].merge(a[name], b[name]) for name in a}


def finish(raw: dict[str, Any]) -> dict[str, Any]:
  """Turns raw statistics into what techniques read."""
  return {name: STATISTICS[name].finish(value) for name, value in raw.items()}


def abstract(inputs: int, names: tuple[str, ...]) -> dict[str, Any]:
  """The shapes of finished statistics for a layer with this many inputs."""
  x = jax.ShapeDtypeStruct((1, inputs), jnp.float32)
  return jax.eval_shape(lambda x: finish(measure([x], names)), x)


def starved(finished: dict[str, Any]) -> dict[str, jax.Array]:
  """The event that some inputs were zero in all tokens, with their count; none if it is unknown."""
  if not {'input_norm', 'input_covariance'} & set(finished):
    return {}
  norm_I = finished.get('input_norm')
  norm_I = jnp.diagonal(finished['input_covariance']) if norm_I is None else norm_I
  return {'inputs that no calibration token used': (norm_I == 0).sum()}
