"""What calibration measures at the input of a linear layer, and how it is recorded.

A `Recorder` is a weight that records its inputs. To observe a block, its weights are wrapped in
recorders during one traced call; the model itself has no hooks. What experts see is measured for
each by itself: the arrays then have a leading axis E.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ops import experts
from ops.linear import Matrix, Weight, dense, grouped_matmul, matmul, matmuls
from ops.solvers import hessian


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistic:
  """of(x_TI, tokens) measures some tokens, merge(a, b) joins two measurements, finish(a) ends it.

  Rows of zeros change nothing; `tokens` counts the others. Zeros are the neutral element of
  `merge`. Techniques read the result of `finish`, which takes leading axes.

  least: (inputs) -> how many rows an expert has to see for its statistic to be used.
  neutral: (values, seen_E) -> what takes its place in an expert that saw fewer, from the values
    [E, ...] of all experts and which of them saw enough: it prefers no input, in the size of what
    the others see.
  """

  of: Callable[[jax.Array, jax.Array], Any]
  merge: Callable[[Any, Any], Any]
  finish: Callable[[Any], Any]
  least: Callable[[int], int]
  neutral: Callable[[jax.Array, jax.Array], jax.Array]


def _add(a, b):
  return jax.tree.map(jnp.add, a, b)


def _float(x_TI):
  return x_TI.astype(jnp.float32)


def _moments(x_TI):
  return jnp.stack([x_TI.sum(0), jnp.square(x_TI).sum(0)])


def _mean(total):
  """The mean from a sum and a count, zeros for an expert that no token reached."""
  sums, count = total
  return sums / jnp.maximum(count, 1).reshape(count.shape + (1,) * (sums.ndim - count.ndim))


def _whole(panels):
  return (jax.vmap(hessian.whole) if panels[0].ndim > 2 else hessian.whole)(panels)


def _level(values_E, seen_E):
  """The mean over the experts that saw enough rows; 1 without any."""
  return jnp.where(seen_E.any(), (values_E * seen_E).sum() / jnp.maximum(seen_E.sum(), 1), 1.0)


def _flat(values, seen_E):
  """All inputs alike, as large as those of the others on average."""
  return jnp.full(values.shape[1:], _level(values.reshape(len(values), -1).mean(1), seen_E))


def _white(values_EII, seen_E):
  """Inputs that are independent and equally large."""
  level = _level(jnp.trace(values_EII, axis1=1, axis2=2) / values_EII.shape[-1], seen_E)
  return level * jnp.eye(values_EII.shape[-1], dtype=values_EII.dtype)


FEW = 32  # of 32 squares of normal numbers, the mean is within 25 % as a rule: sqrt(2 / 32)
_few = lambda inputs: FEW
# A covariance of fewer rows than inputs is singular. Where the k-th principal component of the
# inputs has the size k**-0.5, GPTQ at 4 bits moved the outputs on other rows as far as rounding did
# with as many rows as inputs, 1.17 times as far with half as many, 0.82 times with twice as many.

STATISTICS: dict[str, Statistic] = {
  # How many rows were measured, float32.
  'rows': Statistic(
    of=lambda x_TI, tokens: tokens,
    merge=_add,
    finish=lambda a: a,
    least=lambda inputs: 0,
    neutral=lambda values_E, seen_E: jnp.float32(0),
  ),
  # The L2 norm of each input over all tokens, float32 [I].
  'input_norm': Statistic(
    of=lambda x_TI, tokens: jnp.square(_float(x_TI)).sum(0),
    merge=_add,
    finish=jnp.sqrt,
    least=_few,
    neutral=_flat,
  ),
  # The mean of x xᵀ over all tokens, float32 [I, I]: half the Hessian of the squared output error.
  'input_covariance': Statistic(
    of=lambda x_TI, tokens: (hessian.gram(x_TI), tokens),
    merge=_add,
    finish=lambda total: _mean((_whole(total[0]), total[1])),
    least=lambda inputs: max(FEW, inputs),
    neutral=_white,
  ),
  # The largest magnitude of each input, float32 [I].
  'input_absmax': Statistic(
    of=lambda x_TI, tokens: jnp.abs(_float(x_TI)).max(0),
    merge=jnp.maximum,
    finish=lambda a: a,
    least=_few,
    neutral=lambda values_EI, seen_E: jnp.full(values_EI.shape[1:], values_EI.max()),
  ),
  # The mean magnitude of each input, float32 [I].
  'input_absmean': Statistic(
    of=lambda x_TI, tokens: (jnp.abs(_float(x_TI)).sum(0), tokens),
    merge=_add,
    finish=_mean,
    least=_few,
    neutral=_flat,
  ),
  # The mean and the mean square of each input, float32 [2, I].
  'input_moments': Statistic(
    of=lambda x_TI, tokens: (_moments(_float(x_TI)), tokens),
    merge=_add,
    finish=_mean,
    least=_few,
    neutral=_flat,
  ),
}


@dataclasses.dataclass(frozen=True)
class Recorder(Weight):
  """Multiplies like the weight it wraps, and appends each input to `seen`.

  An entry is (x,), or (x_TI, group_sizes_E) where each group of rows meets an expert of its own.
  """

  weight: Matrix
  seen: list[tuple[jax.Array, ...]]

  @property
  def shape(self):
    return self.weight.shape

  @property
  def dtype(self):
    return self.weight.dtype

  def dense(self):
    return dense(self.weight)

  def matmul(self, x):
    self.seen.append((x,))
    return matmul(x, self.weight)

  def grouped_matmul(self, x_TI, group_sizes_E):
    self.seen.append((x_TI, group_sizes_E))
    return grouped_matmul(x_TI, self.weight, group_sizes_E)

  @classmethod
  def matmuls(cls, x, weights):
    for w in weights:
      w.seen.append((x,))
    return matmuls(x, [w.weight for w in weights])

  def map_values(self, fn):
    raise ValueError('a recorder lives for one traced call and is never compressed')


def measure(seen: list[tuple[jax.Array, ...]], names: tuple[str, ...]) -> dict[str, Any]:
  """The raw statistics of everything a recorder saw."""
  if len(seen[0]) == 2:
    return functools.reduce(merge, [_of_experts(*entry, names) for entry in seen])
  x_TI = jnp.concatenate([x.reshape(-1, x.shape[-1]) for (x,) in seen])
  return _of(x_TI, jnp.float32(x_TI.shape[0]), names)


def _of(x_TI, tokens, names):
  return {name: STATISTICS[name].of(x_TI, tokens) for name in names}


def _of_experts(x_TI, group_sizes_E, names):
  """The raw statistics of each expert's rows; all experts go over all rows."""
  sizes_E = group_sizes_E.astype(jnp.int32)
  ends_E, row_T = jnp.cumsum(sizes_E), jnp.arange(x_TI.shape[0], dtype=jnp.int32)

  def one(own):
    size, end = own
    mine_T = (row_T >= end - size) & (row_T < end)
    return _of(jnp.where(mine_T[:, None], x_TI, 0), size.astype(jnp.float32), names)

  return experts.each(one, (sizes_E, ends_E))


def merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
  """Adds two measurements of the same layer."""
  return {name: STATISTICS[name].merge(a[name], b[name]) for name in a}


def finish(raw: dict[str, Any]) -> dict[str, Any]:
  """Turns raw statistics into what techniques read."""
  return {name: STATISTICS[name].finish(value) for name, value in raw.items()}


def abstract(w: Matrix, names: tuple[str, ...]) -> dict[str, Any]:
  """The shapes of finished statistics of what a weight is multiplied by."""
  entry = [jax.ShapeDtypeStruct((1, w.shape[-2]), jnp.float32)]
  if experts.count(w) is not None:
    entry.append(jax.ShapeDtypeStruct(w.shape[:1], jnp.int32))
  return jax.eval_shape(lambda *entry: finish(measure([entry], names)), *entry)


def starved(finished: dict[str, Any]) -> dict[str, jax.Array]:
  """The event that some inputs were zero in all tokens, with their count; none if it is unknown."""
  if not {'input_norm', 'input_covariance'} & set(finished):
    return {}
  norm_I = finished.get('input_norm')
  if norm_I is None:
    norm_I = jnp.diagonal(finished['input_covariance'], axis1=-2, axis2=-1)
  return {'inputs that no calibration token used': (norm_I == 0).sum()}
