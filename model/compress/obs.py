"""GPTQ and SparseGPT: quantize or prune input by input, while the rest makes up for the error.

`ops.solvers.obs` has the mathematics of both. This file has their options, the storage of the
result and the ledger's events. A layer with a singular Hessian, or without any calibration tokens,
is rounded to nearest or pruned by magnitude. The ledger says so, and no layer is set to zero.
"""

import dataclasses

import jax
import jax.numpy as jnp

from model.compress.registry import DEFAULT_SPARSITY, PREPARED, Outcome, PruneSpec, technique
from model.compress.techniques import QuantizeSpec, other_group
from ops import quantized, sparse
from ops.linear import Matrix, Weight, dense
from ops.solvers import obs


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptqSpec:
  """The options of `round_to_nearest`, and of the solver.

  `act_order` compresses the inputs in falling order of the Hessian's diagonal. Scales then come
  from the original weights; without it, from the weights as updated so far. `damping` is a share of
  the mean of the Hessian's diagonal.
  """

  format: quantized.FormatName = 'int4'
  group_size: int | None = None
  symmetric: bool = True
  double: bool = False
  clip: quantized.Clip = 'none'
  act_order: bool = True
  damping: float = 0.01

  def __post_init__(self):
    _check_damping(self.damping)
    QuantizeSpec(**_quantization(self), group_size=self.group_size, double=self.double)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGptSpec:
  """The options of a pruning technique; with a `format`, those of quantization in the same pass.

  `sparsity` holds for each block of 128 inputs: over all outputs, or with `per_output` for each
  output. With N:M, `group_size` counts stored values, not inputs.
  """

  sparsity: float | None = None
  n: int | None = None
  m: int | None = None
  per_output: bool = False
  format: quantized.FormatName | None = None
  group_size: int | None = None
  symmetric: bool = True
  clip: quantized.Clip = 'none'
  damping: float = 0.01

  def __post_init__(self):
    _check_damping(self.damping)
    PruneSpec(sparsity=self.sparsity, n=self.n, m=self.m)
    if self.format is not None:
      QuantizeSpec(**_quantization(self), group_size=self.group_size)
    elif self.group_size is not None or not self.symmetric or self.clip != 'none':
      raise ValueError('sparsegpt quantizes only with a format, such as int4; name one')


def _quantization(spec) -> dict:
  return {key: getattr(spec, key) for key in ('format', 'symmetric', 'clip')}


def _check_damping(damping):
  if not 0 < damping < float('inf'):
    raise ValueError(f'damping is positive, such as 0.01, not {damping}')


def prepare(statistics, spec: GptqSpec | SparseGptSpec) -> obs.Prepared:
  """Factors the covariance, once for all layers with the same inputs."""
  act_order = isinstance(spec, GptqSpec) and spec.act_order
  return obs.prepare(statistics['input_covariance'], act_order=act_order, damping=spec.damping)


@technique(
  'gptq',
  spec=GptqSpec,
  statistics=('input_covariance',),
  prepare=prepare,
  paper='Frantar et al. 2022, https://arxiv.org/abs/2210.17323',
)
def gptq(w, statistics, spec):
  """Quantize input by input, adjusting the remaining weights to compensate the error."""
  n, m = _layout(w)
  grid, events = _grid(w.shape[0], n, m, spec)
  solution = obs.walk(
    dense(w), statistics[PREPARED], grid=dataclasses.replace(grid, double=spec.double)
  )
  events |= _shortfalls(solution, 'rounded to nearest')
  return Outcome(_stored(solution, grid, n, m, w.dtype), events)


@technique(
  'sparsegpt',
  spec=SparseGptSpec,
  statistics=('input_covariance',),
  prepare=prepare,
  prunes=True,
  paper='Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774',
)
def sparsegpt(w, statistics, spec):
  """Prune input by input, adjusting the remaining weights to compensate the error."""
  share = DEFAULT_SPARSITY if spec.n is None and spec.sparsity is None else spec.sparsity
  return prune(w, statistics[PREPARED], spec, share)


def prune(
  w: Matrix, prepared: obs.Prepared, spec: SparseGptSpec, share: float | jax.Array | None
) -> Outcome:
  """Prunes by SparseGPT: `share` of the weights, which may be traced, or N:M where it is None.

  Raises ValueError if the weight is no plain matrix.
  """
  if isinstance(w, Weight):
    raise ValueError(f'sparsegpt prunes plain matrices, not a {type(w).__name__}; prune first')
  n, m, grid, events = spec.n or 1, spec.m or 1, None, {}
  if spec.format is not None:
    grid, events = _grid(w.shape[0], n, m, spec)
  pruning = obs.Pruning(sparsity=share, n=spec.n, m=spec.m, per_output=spec.per_output)
  solution = obs.walk(w, prepared, grid=grid, pruning=pruning)
  instead = 'pruned by magnitude' + (' and rounded to nearest' if grid else '')
  events |= _shortfalls(solution, instead)
  return Outcome(_stored(solution, grid, n, m, w.dtype), events)


def _layout(w: Matrix) -> tuple[int, int]:
  """How many values of how many inputs are stored: 1 of 1 in a plain matrix."""
  if not isinstance(w, Weight):
    return 1, 1
  if isinstance(w, sparse.SparseTensor) and not isinstance(w.values, Weight):
    return w.n, w.m
  inner = f' of {type(w.values).__name__}' if isinstance(w, sparse.SparseTensor) else ''
  raise ValueError(
    f'gptq quantizes plain and N:M matrices, not a {type(w).__name__}{inner}; '
    'put it before the step that made it'
  )


def _grid(inputs: int, n: int, m: int, spec) -> tuple[obs.Grid, dict]:
  """The grid of the stored values, with its group in inputs; and whether it is another group."""
  sparse_inputs = inputs * n // m
  if m > 1:
    sparse.check_n_of_m(inputs, n, m)
  usual = quantized.FORMATS[spec.format].default_group
  size = quantized.resolve_group(spec.format, sparse_inputs, spec.group_size)
  quantized.check_options(spec.format, sparse_inputs, size, spec.symmetric, spec.clip)
  if size % n and size != sparse_inputs:
    raise ValueError(f'a group of {size} values is no whole number of groups of {n} of {m}')
  events = other_group(usual, size, sparse_inputs) if spec.group_size is None else {}
  return obs.Grid(group=size * m // n, **_quantization(spec)), events


def _stored(solution: obs.Solution, grid: obs.Grid | None, n: int, m: int, dtype) -> Matrix:
  """The weight of the solution, with codes from float32, because a narrower type moves them."""

  def encode(values_IO):
    if grid is None:
      return values_IO.astype(dtype)
    codes = quantized.encode(values_IO, solution.scales, solution.zeros_JO, grid.format)
    return dataclasses.replace(codes, dtype=jnp.dtype(dtype))

  if m == 1:
    return encode(solution.w_IO)
  return sparse.compress(solution.w_IO, solution.kept_IO, n, m).map_values(encode)


def _shortfalls(solution: obs.Solution, instead: str) -> dict[str, jax.Array]:
  factor = solution.factor
  return {
    'damping raised tenfold': factor.raised,
    'Hessian of deficient rank, held up by its damping': factor.deficient,
    f'{instead}, for its Hessian is singular': factor.singular,
    f'{instead}, for no calibration token reached it': factor.starved,
  }
