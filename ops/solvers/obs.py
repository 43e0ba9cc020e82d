"""Quantizes or prunes a matrix input by input, each time moving the rest to make up for it.

The solver under GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) and SparseGPT (Frantar
& Alistarh 2023, https://arxiv.org/abs/2301.00774), which are one: walk along the inputs; put each
weight on its grid, or to zero, or both; spread the error over the inputs not yet visited by the
Hessian of the output error. Outputs are independent, so matrices sharded over O stay so (but for
thresholds over all outputs). For the same reason a matrix of many outputs, such as a head, is taken
in chunks of them, one after the other; the walk holds about six copies of what it works on.

Cost: I³/6 multiplications for each of two factorizations, and I²O/2 for the walk, nearly all in
matrix products: a block of inputs first takes in the errors of all blocks before it, and within it
one input after the other takes in those of its block. Everything is float32; products are full
float32 on accelerators too, because the solver works on rounding errors.

Where it differs from the papers and their code:

- The walk reads the root of the Hessian, not that of its inverse (`ops.solvers.hessian`), and takes
  in earlier errors when an input is reached instead of pushing them out; the weights are the same.
- Scales of a group come from its weights as moved by everything before the group. With `act_order`
  (inputs in falling order of their diagonal) they come from the original weights, so that groups
  stay contiguous; so they do if scales are quantized themselves (nvfp4's are), which takes all of
  them at once.
- Where weights are pruned and quantized, the scales fit those that would be kept as things stand,
  and an N:M mask counts what dropping costs beyond rounding (SparseGPT's code ranks by the first).
- Inputs that are always zero are rounded like others, never zeroed. Weights that are zero stay so.
- Kept weights that are not quantized are rounded to the matrix's dtype within the walk.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ops import axes, quantized, selection
from ops.linear import Matrix, dense
from ops.solvers import hessian
from ops.solvers.walk import Grid, Pruning, Sizes, State, Walk

__all__ = ['Grid', 'Prepared', 'Pruning', 'Solution', 'prepare', 'solve', 'walk']

OUTPUTS = 32768  # of a chunk at most; above what a layer of a block has, below a vocabulary


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('w_IO', 'kept_IO', 'scales', 'zeros_JO', 'factor'),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Solution:
  """w_IO: the new weights in float32, on the grid. kept_IO: those that are not pruned.

  scales, zeros_JO: the grid as `quantized.encode` takes it, or None.  factor: see `hessian`.
  """

  w_IO: jax.Array
  kept_IO: jax.Array
  scales: Matrix | None
  zeros_JO: jax.Array | None
  factor: hessian.Factor


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('factor', 'order_I'), meta_fields=('static',)
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
  """What the walk needs of a layer's inputs, whatever the matrix: the order, and the factor in it.

  static: whether the order is that of the diagonal, so that all scales are fixed beforehand.
  """

  factor: hessian.Factor
  order_I: jax.Array
  static: bool


def prepare(
  covariance_II: jax.Array, *, act_order: bool = False, damping: float = 0.01
) -> Prepared:
  """Factors the Hessian of a layer's inputs; the options are those of `solve`.

  Raises ValueError without damping.
  """
  if not damping > 0:
    raise ValueError(f'damping is positive, such as 0.01, not {damping}')
  covariance_II = covariance_II.astype(jnp.float32)
  order_I = jnp.arange(covariance_II.shape[0])
  if act_order:
    order_I = jnp.argsort(-jnp.diagonal(covariance_II), stable=True)
  factor = hessian.factor(covariance_II, damping, order_I)
  return Prepared(factor=factor, order_I=order_I, static=act_order)


def solve(
  w_IO: jax.Array,
  covariance_II: jax.Array,
  *,
  grid: Grid | None = None,
  pruning: Pruning | None = None,
  act_order: bool = False,
  damping: float = 0.01,
) -> Solution:
  """Finds weights of the asked form whose outputs are close to those of `w_IO`.

  `covariance_II` is the mean of x xᵀ over calibration tokens, at any scale; `damping` times the
  mean of its diagonal is added to the diagonal.

  Raises:
    ValueError: a group or an M that does not divide I; `act_order` with pruning; no damping.
  """
  prepared = prepare(covariance_II, act_order=act_order, damping=damping)
  return walk(w_IO, prepared, grid=grid, pruning=pruning)


def walk(
  w_IO: jax.Array,
  prepared: Prepared,
  *,
  grid: Grid | None = None,
  pruning: Pruning | None = None,
) -> Solution:
  """Is `solve` with a Hessian that is factored already, which matrices of the same inputs share."""
  axes.check('IO', w_IO)
  inputs, order_I = w_IO.shape[0], prepared.order_I
  if order_I.shape != (inputs,):
    raise ValueError(f'{inputs} inputs have no covariance of shape {order_I.shape * 2}')
  if prepared.static and pruning is not None:
    raise ValueError('pruning walks along the inputs as they are stored; leave act_order out')
  sizes = Sizes.of(inputs, grid, pruning, static=prepared.static)
  scales, zeros_JO = _fixed_grid(w_IO.astype(jnp.float32), prepared, grid, pruning)

  def some(w_IO, scales_JO, zeros_JO):
    original_IO = w_IO.astype(jnp.float32)
    steps = Walk(
      original_IO=original_IO[order_I] if prepared.static else original_IO,
      factor=prepared.factor,
      group_I=order_I // (grid.group if grid else 1),
      grid=grid,
      pruning=pruning,
      sizes=sizes,
      dtype=w_IO.dtype,
    )
    end = steps.run(scales_JO, zeros_JO)
    back = (lambda a: a[jnp.argsort(order_I)]) if prepared.static else (lambda a: a)
    return end._replace(w_IO=back(end.w_IO), kept_IO=back(end.kept_IO))

  pooled = pruning is not None and pruning.sparsity is not None and not pruning.per_output
  arrays = w_IO, None if scales is None else dense(scales), zeros_JO
  end = some(*arrays) if pooled else _in_chunks(some, arrays)
  if sizes.dynamic:
    scales, zeros_JO = end.scales_JO, end.zeros_JO
  return Solution(
    w_IO=end.w_IO, kept_IO=end.kept_IO, scales=scales, zeros_JO=zeros_JO, factor=prepared.factor
  )


def _in_chunks(fn: Callable[..., State], arrays: tuple[jax.Array | None, ...]) -> State:
  """`fn` of all outputs, some at a time; the last chunk begins early, so that all are equal."""
  outputs = arrays[0].shape[1]
  count = -(-outputs // OUTPUTS)
  if count == 1:
    return fn(*arrays)
  size = -(-outputs // count)
  first = lambda k: jnp.minimum(k * size, outputs - size)
  chunk = lambda a, k: jax.lax.dynamic_slice_in_dim(a, first(k), size, axis=1)
  of_chunk = lambda k: fn(*jax.tree.map(lambda a: chunk(a, k), arrays))

  def put(k, whole):
    write = lambda a, part: jax.lax.dynamic_update_slice_in_dim(a, part, first(k), axis=1)
    return jax.tree.map(write, whole, of_chunk(k))

  # One, because e8m0 has no zero.
  fresh = lambda part: jnp.ones((part.shape[0], outputs), part.dtype)
  shapes = jax.eval_shape(of_chunk, jnp.int32(0))
  return jax.lax.fori_loop(0, count, put, jax.tree.map(fresh, shapes))


def _fixed_grid(w_IO, prepared: Prepared, grid: Grid | None, pruning: Pruning | None):
  """The scales and zeros that fit the original weights, or those of them that seem to stay."""
  if grid is None:
    return None, None
  if pruning is not None:
    score_IO, live_IO = jnp.abs(w_IO) * prepared.factor.stiffness_I[:, None], w_IO != 0
    if pruning.n is not None:
      kept_IO = selection.best_of_each(score_IO, live_IO, pruning.n, pruning.m)
    else:
      pool = w_IO.shape[0] if pruning.per_output else w_IO.size
      count = jnp.int32(round(pruning.sparsity * pool))
      kept_IO = selection.lowest_dropped(score_IO, live_IO, count, per_output=pruning.per_output)
    w_IO = jnp.where(kept_IO, w_IO, 0)
  w_JgO = w_IO.reshape(-1, grid.group, w_IO.shape[1])
  return quantized.fit_groups(w_JgO, grid.format, grid.symmetric, grid.double, grid.clip)
