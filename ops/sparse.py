"""Pruning: scores to masks, and a matrix that stores only the N of every M weights that are kept.

A score says how much a weight matters; a mask keeps the highest. Masks are exact: ties go to the
earlier input, and the number kept never depends on the values.

Unstructured sparsity compares the inputs of one output (Sun et al. 2023, Wanda,
https://arxiv.org/abs/2306.11695, finds this better than a whole matrix) or the whole matrix. N:M
keeps N in every M consecutive inputs of an output (Mishra et al. 2021,
https://arxiv.org/abs/2104.08378).
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops import axes, packing
from ops.linear import Matrix, Weight, array, dense, map_values, weight_type


def magnitude_score(w_IO: jax.Array) -> jax.Array:
  """|w|, float32 [I, O]."""
  return jnp.abs(w_IO.astype(jnp.float32))


def wanda_score(w_IO: jax.Array, input_norm_I: jax.Array) -> jax.Array:
  """|w| times the L2 norm of its input over the calibration tokens, float32 [I, O]."""
  axes.check('IO,I', w_IO, input_norm_I)
  return magnitude_score(w_IO) * input_norm_I.astype(jnp.float32)[:, None]


def unstructured_mask(score_IO: jax.Array, sparsity: float, *, per_output: bool) -> jax.Array:
  """Keeps the highest scores: bool [I, O] with round(sparsity * size) of each pool False.

  `per_output` ranks the inputs of each output among themselves, else the whole matrix is one pool.
  """
  axes.check('IO', score_IO)
  if not 0 <= sparsity < 1:
    raise ValueError(f'a sparsity is at least 0 and below 1, not {sparsity}')
  pool = score_IO if per_output else score_IO.reshape(-1, 1)
  return keep_highest(pool, round(sparsity * pool.shape[0])).reshape(score_IO.shape)


def keep_highest(score_IO: jax.Array, dropped: int | jax.Array) -> jax.Array:
  """Drops so many inputs of each output, those with the lowest scores: bool [I, O]."""
  return _rank(score_IO) >= dropped


def n_of_m_mask(score_IO: jax.Array, n: int, m: int) -> jax.Array:
  """Keeps the N highest of every M consecutive inputs: bool [I, O]."""
  check_n_of_m(score_IO.shape[0], n, m)
  groups = jnp.swapaxes(score_IO.reshape(-1, m, score_IO.shape[1]), 0, 1)
  kept = _rank(groups) >= m - n
  return jnp.swapaxes(kept, 0, 1).reshape(score_IO.shape)


def check_n_of_m(inputs: int, n: int, m: int) -> None:
  """Raises ValueError if a matrix with this many inputs cannot be pruned N:M."""
  if not 0 < n < m <= 16:
    raise ValueError(f'N:M sparsity needs 0 < N < M <= 16, not {n}:{m}')
  if inputs % m:
    raise ValueError(f'{inputs} inputs do not divide into groups of {m} for {n}:{m} sparsity')


def _rank(score):
  # Position along axis 0 from the lowest score; of equal scores the earlier ranks higher.
  order = jnp.argsort(-score, axis=0, stable=True)
  descending = jnp.argsort(order, axis=0)
  return score.shape[0] - 1 - descending


@weight_type
@dataclasses.dataclass(frozen=True)
class SparseTensor(Weight):
  """A matrix (I, O) that stores N of every M consecutive inputs.

  values: [I * n / m, O], an array or a nested weight (N:M values can be int8, for one).
  indices: the position of each value in its group, uint8; 2 bits each up to M = 4, else 4 bits,
    packed along the input. At 2:4 that is 1 bit a weight.
  """

  values: Matrix = array('IO')
  indices: jax.Array = array('IO')
  n: int
  m: int

  @property
  def shape(self):
    *lead, stored, outputs = self.values.shape
    return (*lead, stored * self.m // self.n, outputs)

  @property
  def dtype(self):
    return self.values.dtype

  def dense(self):
    inputs, outputs = self.shape
    values = dense(self.values).reshape(-1, self.n, 1, outputs)
    codes = packing.unpack(self.indices, _index_bits(self.m), self.values.shape[0])
    slots = jnp.arange(self.m, dtype=jnp.uint8)[None, None, :, None]
    here = codes.reshape(-1, self.n, 1, outputs) == slots
    return jnp.where(here, values, 0).sum(1).astype(self.dtype).reshape(inputs, outputs)

  def map_values(self, fn):
    return dataclasses.replace(self, values=map_values(fn, self.values))


def compress(w_IO: jax.Array, mask_IO: jax.Array, n: int, m: int) -> SparseTensor:
  """Stores the kept weights of an N:M mask, in order.

  Keeping fewer than N in a group is fine; of more, the first N are stored.
  """
  axes.check('IO,IO', w_IO, mask_IO)
  check_n_of_m(w_IO.shape[0], n, m)
  grouped = lambda a: a.reshape(-1, m, w_IO.shape[1])
  kept = grouped(mask_IO)
  # The first n positions of a stable sort by "dropped" are the kept ones, in order.
  slots = jnp.sort(jnp.argsort(~kept, axis=1, stable=True)[:, :n], axis=1)
  values = jnp.take_along_axis(jnp.where(kept, grouped(w_IO), 0), slots, axis=1)
  flat = lambda a: a.reshape(-1, w_IO.shape[1])
  return SparseTensor(flat(values), packing.pack(flat(slots), _index_bits(m)), n, m)


def _index_bits(m: int) -> int:
  return 2 if m <= 4 else 4
