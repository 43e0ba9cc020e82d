"""Pruning: scores to masks, and a matrix that stores only the N of every M weights that are kept.

A score says how much a weight matters; a mask keeps the weights with the highest scores. Of equal
scores the earlier input is kept, so the number of kept weights never depends on the values.

Unstructured sparsity compares the inputs of one output (Sun et al. 2023, Wanda,
https://arxiv.org/abs/2306.11695, finds this better than a whole matrix) or the whole matrix. N:M
keeps N in every M consecutive inputs of an output (Mishra et al. 2021,
https://arxiv.org/abs/2104.08378).
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops import axes, packing, selection
from ops.linear import (
  Matrix,
  Weight,
  array,
  dense,
  is_count,
  map_values,
  refit,
  require,
  weight_type,
)


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
  dropped = round(sparsity * (score_IO.shape[0] if per_output else score_IO.size))
  return selection.lowest_dropped(score_IO, _all(score_IO), dropped, per_output=per_output)


def keep_highest(score_IO: jax.Array, dropped: int | jax.Array) -> jax.Array:
  """Drops the `dropped` lowest scores of each output: bool [I, O], False where dropped."""
  return selection.lowest_dropped(score_IO, _all(score_IO), dropped, per_output=True)


def n_of_m_mask(score_IO: jax.Array, n: int, m: int) -> jax.Array:
  """Keeps the N highest of every M consecutive inputs: bool [I, O]."""
  check_n_of_m(score_IO.shape[0], n, m)
  return selection.best_of_each(score_IO, _all(score_IO), n, m)


def check_n_of_m(inputs: int, n: int, m: int) -> None:
  """Raises ValueError if a matrix with this many inputs cannot be pruned N:M."""
  if not 0 < n < m <= 16:
    raise ValueError(f'N:M sparsity needs 0 < N < M <= 16, not {n}:{m}')
  if inputs % m:
    raise ValueError(f'{inputs} inputs do not divide into groups of {m} for {n}:{m} sparsity')


PRUNED = 0.2  # share of exact zeros above which a matrix counts as pruned


@jax.jit
def looks_pruned(w_IO: jax.Array) -> jax.Array:
  """Whether a matrix has so many exact zeros that it must have been pruned: bool [].

  That is more than a share of `PRUNED`, but not all: a matrix of zeros is an initial value.
  """
  share = (w_IO == 0).mean(dtype=jnp.float32)
  return (share > PRUNED) & (share < 1)


def _all(score_IO):
  return jnp.ones(score_IO.shape, bool)


@weight_type
@dataclasses.dataclass(frozen=True)
class SparseTensor(Weight):
  """A matrix (I, O) that stores N of every M consecutive inputs.

  values: [I * n / m, O], an array or a nested weight (N:M values can be int8, for one).
  indices: the position of each value in its group, uint8; 2 bits each up to M = 4, else 4 bits,
    packed along the input. At 2:4 that is 1 bit a weight.
  """

  values: Matrix = array('IO')
  indices: jax.Array = array('IO', 'mask')
  n: int
  m: int

  def check_fields(self):
    counts = is_count(self.n) and is_count(self.m)
    require(counts, f'n and m are whole numbers above 0, not {self.n!r} and {self.m!r}')
    check_n_of_m(self.m, self.n, self.m)
    stored, outputs = self.values.shape[-2:]
    require(stored % self.n == 0, f'{stored} stored inputs are no whole number of {self.n}')
    expected = -(-stored * _index_bits(self.m) // 8), outputs
    found, dtype = self.indices.shape[-2:], self.indices.dtype
    fits = dtype == jnp.uint8 and found == expected
    require(fits, f'indices are uint8 of the shape {expected}, not {dtype} of {found}')

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
    slots = jnp.arange(self.m, dtype=jnp.uint8)[None, None, :, None]
    here = self.positions().reshape(-1, self.n, 1, outputs) == slots
    return jnp.where(here, values, 0).sum(1).astype(self.dtype).reshape(inputs, outputs)

  def positions(self) -> jax.Array:
    """Which of the M inputs of its group each stored value belongs to: uint8 [I * n / m, O]."""
    return packing.unpack(self.indices, _index_bits(self.m), self.values.shape[0])

  def map_values(self, fn):
    return dataclasses.replace(self, values=map_values(fn, self.values))

  def refit(self, w_IO):
    outputs = self.shape[-1]
    w_JmO = w_IO.reshape(-1, self.m, outputs)
    places_JnO = self.positions().reshape(-1, self.n, outputs).astype(jnp.int32)
    values = jnp.take_along_axis(w_JmO, places_JnO, axis=1).reshape(-1, outputs)
    return dataclasses.replace(self, values=refit(self.values, values))

  def kept(self) -> jax.Array:
    """Which of the weights are stored: bool [I, O]."""
    inputs, outputs = self.shape
    slots = jnp.arange(self.m, dtype=jnp.uint8)[None, None, :, None]
    here = self.positions().reshape(-1, self.n, 1, outputs) == slots
    return here.any(1).reshape(inputs, outputs)


def compress(w_IO: jax.Array, mask_IO: jax.Array, n: int, m: int) -> SparseTensor:
  """Stores the kept weights of an N:M mask, in order.

  A group with fewer than N kept weights is filled up with zeros; of more than N, the first N are
  stored.
  """
  axes.check('IO,IO', w_IO, mask_IO)
  check_n_of_m(w_IO.shape[0], n, m)
  grouped = lambda a: a.reshape(-1, m, w_IO.shape[1])
  kept = grouped(mask_IO)
  before = lambda mask: jnp.cumsum(mask, axis=1) - mask
  # Where fewer than n are kept, the first of the others fill up.
  stored = jnp.where(kept, before(kept), kept.sum(1, keepdims=True) + before(~kept)) < n
  goes_to = jnp.where(stored, before(stored), n)
  slots = jnp.arange(m, dtype=jnp.uint8)[:, None]
  here = [goes_to == i for i in range(n)]
  values = jnp.stack([jnp.where(h & kept, grouped(w_IO), 0).sum(1) for h in here], axis=1)
  indices = jnp.stack([jnp.where(h, slots, 0).sum(1, dtype=jnp.uint8) for h in here], axis=1)
  flat = lambda a: a.reshape(-1, w_IO.shape[1])
  return SparseTensor(flat(values), packing.pack(flat(indices), _index_bits(m)), n, m)


def _index_bits(m: int) -> int:
  return 2 if m <= 4 else 4
