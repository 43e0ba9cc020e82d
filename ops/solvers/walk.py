"""The walk of `ops.solvers.obs`: along the inputs of a matrix, block by block, weight by weight.

A weight is brought up to date when it is reached: its original value, plus what the changes of all
inputs before it ask for. Those of earlier blocks come in one matrix product for a block, those of
the block itself as its inputs are reached. What is decided for several inputs at once (the scales
of a group, a mask of N in M) is decided on their weights as they stand at the first of them:

  blocks    of 128 inputs, or a whole group: a share of the weights is pruned
  segments  the inputs of a group, if it gets its scales on the way
  chunks    the M inputs of N:M pruning
  columns   one input: rounded, or zero

All are loops of XLA: what is compiled does not grow with the matrix.

Two forms of the same triangle serve. With H = R Rᵀ and T_il = R_li / R_ii below the diagonal, a
weight that is reached is  w_i + sum T_il (w_l - q_l)  over all l before it. That holds for the next
input only: those behind it have moved together, to  w_j - sum V_jk e_k,  where V = (1 + T)⁻¹ is
GPTQ's Uᵀ without its scale, and e_k is the change of input k when it was rounded. Blocks apply T to
the blocks before them, because T is given and the changes are exact; within a block V serves, the
inverse of a triangle of 128 inputs.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ops import formats, quantized, selection, sparse
from ops.solvers import hessian

BLOCK = 128  # inputs between two matrix products; also pooled for a threshold, as in SparseGPT
REACH = 512  # earlier inputs whose errors one matrix product takes in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
  """A format of ops/quantized.py, and how many inputs share a scale; for the rest see there."""

  format: quantized.FormatName
  group: int
  symmetric: bool = True
  double: bool = False
  clip: quantized.Clip = 'none'

  @property
  def joint(self) -> bool:
    """Whether all groups get their scales together, as those have scales of their own."""
    return self.double or formats.FORMATS[self.format].scales == 'e4m3'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
  """All but n of every m inputs go, or a share of each block; `per_output`, of each output there.

  Exactly one of `sparsity`, which may be traced, and n with m is given.
  """

  sparsity: float | jax.Array | None = None
  n: int | None = None
  m: int | None = None
  per_output: bool = False

  def __post_init__(self):
    if (self.sparsity is None) == (self.n is None) or (self.n is None) != (self.m is None):
      raise ValueError(f'pruning takes either a sparsity or n and m, not {self}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """How many inputs each loop takes at a time; `padded` is a whole number of reaches."""

  inputs: int
  dynamic: bool  # groups get their scales on the way
  chunk: int
  segment: int
  block: int
  reach: int

  @classmethod
  def of(cls, inputs: int, grid: Grid | None, pruning: Pruning | None, static: bool) -> 'Sizes':
    """`static` has all scales fixed beforehand. Raises ValueError where sizes do not divide."""
    if grid is not None:
      check = functools.partial(formats.check_form, symmetric=grid.symmetric, clip=grid.clip)
      check(grid.format, double=grid.double)
      quantized.check_divides(inputs, grid.group)
    if pruning is not None and pruning.n is not None:
      sparse.check_n_of_m(inputs, pruning.n, pruning.m)
    dynamic = grid is not None and grid.group < inputs and not (static or grid.joint)
    chunk = pruning.m if pruning is not None and pruning.m else None
    if dynamic and chunk and grid.group % chunk:
      raise ValueError(f'a group of {grid.group} inputs is no whole number of groups of {chunk}')
    step = grid.group if dynamic else chunk or 1
    block = step * max(1, min(BLOCK // step, -(-inputs // step)))
    segment = grid.group if dynamic else block
    reach = block * max(1, min(REACH // block, -(-inputs // block)))
    return cls(
      inputs=inputs,
      dynamic=dynamic,
      chunk=chunk or segment,
      segment=segment,
      block=block,
      reach=reach,
    )

  @property
  def blocks(self) -> int:
    return -(-self.inputs // self.block)

  @property
  def padded(self) -> int:
    return -(-self.inputs // self.reach) * self.reach


class State(NamedTuple):
  """The state of the walk. w_IO: final values of visited inputs, original ones of the others."""

  w_IO: jax.Array
  kept_IO: jax.Array
  scales_JO: jax.Array | None
  zeros_JO: jax.Array | None


class Within(NamedTuple):
  """The state of the walk within a block: the rows of `State` to write, and the errors."""

  w_IO: jax.Array
  kept_IO: jax.Array
  error_IO: jax.Array  # each weight as it was when it was reached, minus final; zero from here on
  scales_JO: jax.Array | None
  zeros_JO: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """What is constant within a block. `moved_IO`: its weights after the errors of earlier blocks."""

  start: jax.Array
  moved_IO: jax.Array
  inverse_II: jax.Array  # V
  stiffness_I: jax.Array

  def current(self, error_IO: jax.Array, start, size: int) -> jax.Array:
    """Some inputs' weights as they are when the walk reaches the first of them."""
    pull_IO = _product(_rows(self.inverse_II, start, size), error_IO)
    return _rows(self.moved_IO, start, size) - pull_IO

  def score(self, w_IO: jax.Array, start, size: int, rounded_IO=None) -> jax.Array:
    """The square root of the cost of dropping weights: high scores are kept.

    If the grid of kept weights is known, their rounding error is subtracted, so that dropping a
    weight that would be rounded to zero costs nothing.
    """
    size_IO = jnp.abs(w_IO)
    if rounded_IO is not None:
      saved_IO = jnp.maximum(rounded_IO * (2 * w_IO - rounded_IO), 0)  # w² - (w - rounded)²
      size_IO = jnp.sqrt(saved_IO)
    return size_IO * _rows(self.stiffness_I, start, size)[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
  """One matrix with its Hessian's factor, in the order of the walk, and the options.

  group_I: each input's group, where the scales are fixed beforehand.  dtype: what kept weights are
  rounded to if they are not quantized.
  """

  original_IO: jax.Array
  factor: hessian.Factor
  group_I: jax.Array
  grid: Grid | None
  pruning: Pruning | None
  sizes: Sizes
  dtype: jnp.dtype

  def run(self, scales_JO: jax.Array | None, zeros_JO: jax.Array | None) -> State:
    """Walks through. Scales and zeros that are found on the way are taken as examples only."""
    inputs, groups = self.sizes.inputs, None
    if self.sizes.dynamic:
      groups = inputs // self.sizes.segment
      rows = self.sizes.padded // self.sizes.segment
      # One, because e8m0 has no zero.
      fresh = lambda a: None if a is None else jnp.ones((rows, a.shape[1]), a.dtype)
      scales_JO, zeros_JO = fresh(scales_JO), fresh(zeros_JO)
    walk = self._padded()
    start = State(walk.original_IO, walk.original_IO != 0, scales_JO, zeros_JO)
    end = jax.lax.fori_loop(0, self.sizes.blocks, walk._block, start)
    lengths = (inputs, inputs, groups, groups)
    return State(*(None if a is None else a[:length] for a, length in zip(end, lengths)))

  def _padded(self) -> 'Walk':
    rows = (0, self.sizes.padded - self.sizes.inputs)
    factor = dataclasses.replace(
      self.factor,
      feedback_II=jnp.pad(self.factor.feedback_II, (rows, rows)),
      stiffness_I=jnp.pad(self.factor.stiffness_I, rows, constant_values=1),
    )
    return dataclasses.replace(
      self,
      original_IO=jnp.pad(self.original_IO, (rows, (0, 0))),
      group_I=jnp.pad(self.group_I, rows),
      factor=factor,
    )

  def _block(self, k, state: State) -> State:
    size = self.sizes.block
    block = self._enter(k * size, state.w_IO)
    kept_IO = _rows(state.kept_IO, block.start, size)
    if self.pruning is not None and self.pruning.sparsity is not None:
      kept_IO = self._keep_share(k, block, kept_IO)
    within = Within(
      w_IO=block.moved_IO,
      kept_IO=kept_IO,
      error_IO=jnp.zeros_like(block.moved_IO),
      scales_JO=state.scales_JO,
      zeros_JO=state.zeros_JO,
    )
    segment = lambda i, within: self._segment(block, i * self.sizes.segment, within)
    within = jax.lax.fori_loop(0, size // self.sizes.segment, segment, within)
    return State(
      _write(state.w_IO, within.w_IO, block.start),
      _write(state.kept_IO, within.kept_IO, block.start),
      within.scales_JO,
      within.zeros_JO,
    )

  def _enter(self, start, w_IO) -> Block:
    """Takes in the changes of all earlier blocks; those of later ones are zero."""
    size, reach = self.sizes.block, self.sizes.reach
    feedback_II = self.factor.feedback_II

    def add(i, pull_IO):
      change_IO = _rows(self.original_IO, i * reach, reach) - _rows(w_IO, i * reach, reach)
      pulls_II = jax.lax.dynamic_slice(feedback_II, (start, i * reach), (size, reach))
      return pull_IO + _product(pulls_II, change_IO)

    original_IO = _rows(self.original_IO, start, size)
    reaches = (start + reach - 1) // reach
    pull_IO = jax.lax.fori_loop(0, reaches, add, jnp.zeros_like(original_IO))
    inverse_II = _inverse(jax.lax.dynamic_slice(feedback_II, (start, start), (size, size)))
    return Block(
      start=start,
      moved_IO=original_IO + _product(inverse_II, pull_IO),
      inverse_II=inverse_II,
      stiffness_I=_rows(self.factor.stiffness_I, start, size),
    )

  def _keep_share(self, k, block, live_IO):
    """Drops the block's part of the whole count, so that all parts add up to it exactly."""
    size, inputs = self.sizes.block, self.sizes.inputs
    pool = 1 if self.pruning.per_output else live_IO.shape[1]
    ends = [min(i * size, inputs) for i in range(self.sizes.blocks + 1)]
    xp = jnp if isinstance(self.pruning.sparsity, jax.Array) else np  # traced, or exact
    dropped = xp.diff(xp.round(self.pruning.sparsity * pool * xp.asarray(ends)))
    padding = np.diff(ends) * -pool + size * pool
    count = jnp.asarray(dropped + padding, jnp.int32)[k]
    score_IO = block.score(block.moved_IO, 0, size)
    return selection.lowest_dropped(score_IO, live_IO, count, per_output=self.pruning.per_output)

  def _segment(self, block, start, within: Within) -> Within:
    if self.sizes.dynamic:
      within = self._fit(block, start, within)
    chunk = lambda i, within: self._chunk(block, start + i * self.sizes.chunk, within)
    return jax.lax.fori_loop(0, self.sizes.segment // self.sizes.chunk, chunk, within)

  def _fit(self, block, start, within: Within) -> Within:
    size = self.sizes.segment
    w_IO = block.current(within.error_IO, start, size)
    kept_IO = _rows(within.kept_IO, start, size)
    if self._n_of_m:
      score_IO = block.score(w_IO, start, size)
      kept_IO = selection.best_of_each(score_IO, kept_IO, self.pruning.n, self.pruning.m)
    grid, dtype = self.grid, within.scales_JO.dtype
    one_JgO = jnp.where(kept_IO, w_IO, 0)[None]
    scales_JO, zeros_JO = formats.fit(one_JgO, grid.format, grid.symmetric, grid.clip, dtype)
    row = (block.start + start) // size
    within = within._replace(scales_JO=_write(within.scales_JO, scales_JO, row))
    if zeros_JO is not None:
      within = within._replace(zeros_JO=_write(within.zeros_JO, zeros_JO, row))
    return within

  def _chunk(self, block, start, within: Within) -> Within:
    size = self.sizes.chunk
    if self._n_of_m:
      w_IO = block.current(within.error_IO, start, size)
      rounded_IO = None if self.grid is None else self._rounded(w_IO, block.start + start, within)
      score_IO = block.score(w_IO, start, size, rounded_IO)
      live_IO = _rows(within.kept_IO, start, size)
      kept_IO = selection.best_of_each(score_IO, live_IO, self.pruning.n, self.pruning.m)
      within = within._replace(kept_IO=_write(within.kept_IO, kept_IO, start))
    column = lambda i, within: self._column(block, start + i, within)
    return jax.lax.fori_loop(0, size, column, within)

  def _column(self, block, i, within: Within) -> Within:
    current_IO = block.current(within.error_IO, i, 1)
    w_IO = jnp.where(_rows(within.kept_IO, i, 1), current_IO, 0)
    w_IO = self._rounded(w_IO, block.start + i, within)
    return within._replace(
      w_IO=_write(within.w_IO, w_IO, i),
      error_IO=_write(within.error_IO, current_IO - w_IO, i),
    )

  def _rounded(self, w_IO, i, within: Within):
    """Some inputs' weights on the grid, from input i on; all of them in the same group."""
    if self.grid is None:
      return w_IO.astype(self.dtype).astype(jnp.float32)
    group = i // self.sizes.segment if self.sizes.dynamic else self.group_I[i]
    scales_JO, zeros_JO = (
      None if a is None else _rows(a, group, 1) for a in (within.scales_JO, within.zeros_JO)
    )
    return quantized.project(w_IO, scales_JO, zeros_JO, self.grid.format)

  @property
  def _n_of_m(self) -> bool:
    return self.pruning is not None and self.pruning.n is not None


def _rows(a, start, size):
  return jax.lax.dynamic_slice_in_dim(a, start, size)


def _write(a, rows, start):
  return jax.lax.dynamic_update_slice_in_dim(a, rows, start, axis=0)


def _inverse(feedback_II):
  """The inverse of one plus a strictly lower triangle, via the transpose that LAPACK reads."""
  unit_II = jnp.eye(feedback_II.shape[0], dtype=feedback_II.dtype)
  solve = functools.partial(jax.lax.linalg.triangular_solve, lower=False, unit_diagonal=True)
  return solve(feedback_II.T, unit_II, left_side=True).T


def _product(pulls_II, error_IO):
  """Earlier inputs' errors, summed for each later input by its row: full float32 anywhere."""
  return jnp.matmul(pulls_II, error_IO, precision=jax.lax.Precision.HIGHEST)
