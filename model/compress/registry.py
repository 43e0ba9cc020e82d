"""Registers the compression techniques, each by one function and one row.

A technique is a function from (weight, statistics, spec) to a weight. Its row has its name, the
frozen dataclass of its options, the calibration statistics that it reads and its paper. The row is
all that is needed to use it in recipes and to list it in the contract tests, the report and README.

Pruning techniques differ only in their scores, so a score function is enough to add one:

  @pruning_score('wanda', statistics=('input_norm',), paper='Sun et al. 2023, https://...')
  def wanda(w_IO, statistics):
    return sparse.wanda_score(w_IO, statistics['input_norm'])
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.transformer import Transformer
from ops import experts, quantized, sparse
from ops.linear import Matrix, Weight, map_values

Statistics = Mapping[str, Any]


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('weight', 'events'), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Outcome:
  """A weight, and counts of events; the ledger records those that are not zero."""

  weight: Matrix
  events: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
  """The view of a block that a technique of scope 'block' receives.

  layer: the config of the block.
  parameters: all parameters by their paths in the block.
  targets: the linear layers that the step may compress.
  statistics: the measured statistics by layer.
  errors: (candidate, arrays, count, rows) -> the error of the block's output under each of `count`
    candidate changes, [count]; see `calibrate.Stream.errors`.
  descend: (descent, learned, fixed) -> learned arrays with a lower error; see
    `calibrate.Stream.descend`.
  """

  config: ModelConfig
  layer: LayerConfig
  parameters: Mapping[str, Matrix]
  targets: tuple[str, ...]
  statistics: Mapping[str, Statistics]
  errors: Callable[..., np.ndarray]
  descend: Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
  """The result of a technique of scope 'block': new parameters by path, and events by layer."""

  parameters: Mapping[str, Matrix]
  events: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reshaped:
  """The result of a technique of scope 'shape'.

  config and parameters: of the new model, the parameters by their paths in it.
  events: counts by layer of the original model.
  """

  config: ModelConfig
  parameters: Mapping[str, Matrix]
  events: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
  """The result of a technique of scope 'learn': the trained model, and counts such as tokens."""

  model: Transformer
  events: Mapping[str, Any] = dataclasses.field(default_factory=dict)


PLAN, PREPARED = 'plan', 'prepared'
Scope = Literal['linears', 'parameters', 'block', 'model', 'shape', 'learn']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Technique:
  """A row of the registry.

  The scope determines the function's signature and when it is called:

    linears     (w, statistics, spec) -> Matrix | Outcome, for each matrix of the blocks
    parameters  the same signature, for each floating-point parameter
    block       (site, spec) -> Changes, for each block, for techniques that treat several matrices
                together
    model       (model, spec) -> events; changes the model in place, before any calibration
    shape       (model, measurements, spec) -> Reshaped; returns a model of other sizes, before all
                other steps but those that learn; `measurements` is a `measurements.Measurements`,
                None without calibration
    learn       (model, school, spec, folder) -> Learned; trains the model, after any other steps
                (see model/compress/phases.py); matrices pruned without a pattern come as
                `MaskedTensor`; `school` is the argument of `pipeline.compress` that holds text and
                teacher; `folder` keeps checkpoints, so that a killed run can resume, or is None

  Functions of linears and parameters are traced: `spec` is static, and Python branches may depend
  on shapes only.

  check: for block, model and shape, (config, spec) raises ValueError if the technique does not
    apply.
  becomes: for block, (w, spec) -> Matrix is traced on shapes to find the type of the result; for
    learn, (model, spec) -> the model after the step, from one that has shapes in the place of
    arrays and may be changed; raises ValueError if the technique does not apply.
  reshapes: for shape, (model, spec) -> config of the result, from a model that may be abstract. A
    size that depends on calibration or on timing is given by the number that it is a multiple of.
  calibrates: for shape, (spec) -> whether it measures on calibration text.
  prunes: whether it sets weights to zero that later steps have to leave at zero.
  plan: for linears, (survey, spec) -> {layer: number} divides a total among the layers, such as the
    sparsity. It is called once before the blocks, with an iterator of (layer, w, statistics) over
    the uncompressed model. The function receives its number as statistics['plan'], float32.
  prepare: for linears, (statistics, spec) -> arrays derives what depends on a layer's inputs alone,
    such as the factor of their covariance. It is traced, and runs once for layers that share their
    inputs. The function receives the arrays as statistics['prepared'].
  """

  name: str
  function: Callable
  spec: type
  statistics: tuple[str, ...]
  paper: str
  scope: Scope = 'linears'
  check: Callable | None = None
  becomes: Callable | None = None
  plan: Callable | None = None
  reshapes: Callable | None = None
  calibrates: Callable[[Any], bool] | None = None
  prepare: Callable | None = None
  prunes: bool = False

  def __call__(self, w: Matrix, statistics: Statistics, spec: Any) -> Outcome:
    """Compresses one weight; only for the scopes linears and parameters.

    Each expert of a weight is compressed by itself, with the statistics of its own inputs; the
    events are sums over all experts.
    """
    if experts.count(w) is not None:
      return self._each(w, statistics, spec)
    names = (*self.statistics, *([PLAN] if self.plan else []))
    known = {name: statistics[name] for name in names}
    if self.prepare is not None:
      found = statistics.get(PREPARED)
      known[PREPARED] = self.prepare(known, spec) if found is None else found
    result = self.function(w, known, spec)
    return result if isinstance(result, Outcome) else Outcome(result, {})

  def _each(self, w: Matrix, statistics: Statistics, spec: Any) -> Outcome:
    shared = {name: value for name, value in statistics.items() if name == PLAN}
    own = {name: value for name, value in statistics.items() if name != PLAN}
    fixed = {}  # counts that depend on no value, such as a group size, are the same for all experts

    def one(arrays):
      w, statistics = arrays
      outcome = self(w, {**statistics, **shared}, spec)
      fixed.update({event: n for event, n in outcome.events.items() if isinstance(n, int)})
      counts = {event: n for event, n in outcome.events.items() if event not in fixed}
      return outcome.weight, counts

    weight, counts_E = experts.each(one, (w, own))
    return Outcome(weight, {**fixed, **{event: n.sum() for event, n in counts_E.items()}})

  @property
  def summary(self) -> str:
    """The first line of the function's docstring."""
    return (self.function.__doc__ or '').strip().split('\n')[0]


TECHNIQUES: dict[str, Technique] = {}


def technique(
  name: str, *, spec: type, paper: str, statistics=(), scope: Scope = 'linears', **more
):
  """Registers a function as a technique; `more` are further fields of `Technique`.

  Raises ValueError if the name is already registered.
  """

  def register(function: Callable) -> Callable:
    if name in TECHNIQUES:
      raise ValueError(f'the technique {name!r} is registered already')
    TECHNIQUES[name] = Technique(
      name=name,
      function=function,
      spec=spec,
      statistics=tuple(statistics),
      paper=paper,
      scope=scope,
      **more,
    )
    return function

  return register


def lookup(name: str) -> Technique:
  """Finds a technique. Raises ValueError with the nearest names if there is none."""
  if name in TECHNIQUES:
    return TECHNIQUES[name]
  raise ValueError(f'unknown technique {name!r}{nearest(name, TECHNIQUES)}')


def nearest(name: str, known) -> str:
  """Returns '; did you mean ...?' with the nearest known names, or a list of all known names."""
  close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
  if close:
    return f'; did you mean {" or ".join(close)}?'
  return f'; there are {", ".join(sorted(known))}'


DEFAULT_SPARSITY = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneSpec:
  """Which weights to drop: a fraction (`sparsity`), or all but n of every m consecutive inputs.

  The default is a sparsity of 0.5. With `per_output`, the inputs of each output are compared with
  each other; otherwise all weights of the matrix are.
  """

  sparsity: float | None = None
  n: int | None = None
  m: int | None = None
  per_output: bool = True

  def __post_init__(self):
    if (self.n is None) != (self.m is None):
      raise ValueError(f'N:M pruning needs both n and m, not n={self.n}, m={self.m}')
    if self.sparsity is not None and self.n is not None:
      raise ValueError('pruning takes either a sparsity, such as 0.5, or n and m, such as 2 and 4')
    if self.n is not None:
      sparse.check_n_of_m(self.m, self.n, self.m)
    if self.sparsity is not None and not 0 <= self.sparsity < 1:
      raise ValueError(f'a sparsity is at least 0 and below 1, not {self.sparsity}')


def pruning_score(name: str, *, paper: str, statistics=(), spec: type = PruneSpec):
  """Registers a score (w_IO, statistics) -> score_IO as a technique that prunes low scores."""

  def register(score):
    @functools.wraps(score)
    def prune(w, stats, options):
      if isinstance(w, quantized.QuantizedTensor):
        # Every format left here has a code for zero, and the kept weights stay on their grid.
        _check_grid(w, options)
        grid = w.scales, w.zeros, w.format
        return map_values(lambda v: quantized.encode(v, *grid), prune(w.dense(), stats, options))
      if isinstance(w, Weight):
        raise ValueError(f'{name} prunes plain matrices, not a {type(w).__name__}; prune first')
      score_IO, n, m = score(w, stats), options.n, options.m
      if n is not None:
        return sparse.compress(w, sparse.n_of_m_mask(score_IO, n, m), n, m)
      share = DEFAULT_SPARSITY if options.sparsity is None else options.sparsity
      mask_IO = sparse.unstructured_mask(score_IO, share, per_output=options.per_output)
      return jnp.where(mask_IO, w, 0)

    technique(name, spec=spec, paper=paper, statistics=statistics, prunes=True)(prune)
    return score

  return register


def _check_grid(w: quantized.QuantizedTensor, options: PruneSpec) -> None:
  """Raises ValueError if pruning would take weights off the grid of a quantized matrix."""
  if options.n is None and not w.holds_zero:
    raise ValueError(
      'zero has no code where zero points are no integers, so pruned weights would not be zero; '
      'prune n of m, whose zeros are not stored, or quantize with integer zero points, such as '
      'by round_to_nearest or gptq'
    )
  if options.m is not None and w.group_size % options.m and w.group_size != w.inputs:
    raise ValueError(
      f'a scale is shared by {w.group_size} inputs, which are no whole number of groups of '
      f'{options.m} for {options.n}:{options.m} sparsity; prune before the quantization, or '
      f'quantize in groups of a multiple of {options.m}'
    )
