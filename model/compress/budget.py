"""Joint search of what to do to each layer under one budget of bytes.

Each matrix can be treated in one of several ways (bits, groups, sparsity, or left as it is). The
cost of a treatment is measured: the KL divergence, on calibration tokens, of the model with this
one matrix treated from the model as it is. The treated weight multiplies as its type does, so
rounding its inputs counts too. An exact integer program then picks one treatment for each matrix,
so that the sum of the costs is smallest within the budget. Costs need not add up, so the whole
result is measured as well, beside every uniform treatment that fits, and the best of them is taken.

The idea of scoring layers alone and allocating by a program is that of Hubara et al. (2021),
https://arxiv.org/abs/2006.10518; the program is solved by HiGHS through scipy.

Each treatment of each matrix costs a forward pass through its block and all later ones: with L
blocks of 7 matrices and C treatments, about 7 * C * L * L / 2 block passes over the calibration
tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from flax import nnx

from model.compress import calibrate, pipeline, programs, starvation, threads
from model.compress.parts import Part, parts, targets, weights
from model.compress.recipe import Recipe, Step
from model.transformer import Transformer, matrices, parameters
from ops import losses
from ops.linear import Matrix, dense, map_inner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Treatment:
  """One way to store a matrix: steps on single matrices; no step leaves it as it is."""

  name: str
  steps: tuple[Step, ...]

  def __post_init__(self):
    for step in self.steps:
      if step.row.scope != 'linears' or step.row.plan or step.only != ('*',):
        raise ValueError(
          f'{self.name}: {step.technique} does not treat one matrix at a time, so it cannot be '
          'chosen layer by layer'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
  """The cost of a treatment of a layer. `kl` is that of the model from the base, nats per token."""

  layer: str
  treatment: str
  nbytes: int
  kl: float


def treatments(recipes: Iterable[Recipe]) -> list[Treatment]:
  """The matrix steps of some recipes without casts, and no step, which leaves a matrix as it is."""
  found = [Treatment(name='as it is', steps=())]
  for one in recipes:
    steps = tuple(step for step in one.steps if step.row.scope != 'parameters')
    found.append(Treatment(name=one.name, steps=steps))
  return found


def measure(
  model: Transformer,
  choices: Sequence[Treatment],
  calibration_BT: np.ndarray,
  *,
  progress: Callable = iter,
) -> list[Option]:
  """Measures every treatment of every matrix of the blocks, one at a time.

  `calibration_BT` is [rows, length] of token ids; `progress` wraps the list of blocks.
  """
  for choice in choices:
    if choice.steps:
      pipeline.check(model, Recipe(name=choice.name, steps=choice.steps), calibration_BT)
  with threads.few(max(w.shape[-2] for w in matrices(model).values())):
    return _measure_all(model, choices, calibration_BT, progress)


def _measure_all(model, choices, calibration_BT, progress) -> list[Option]:
  tokens = calibrate.batches(calibration_BT, pipeline.CALIBRATION_BATCH)
  stream = calibrate.Stream(model, tokens)
  expected = _through(model, stream.batches, 0)
  blocks = [part for part in parts(model) if part.is_block]
  options = []
  for i, part in enumerate(progress(blocks)):
    for layer, treated in _treated(part, choices, stream):
      for choice, w in treated:
        kl = 0.0 if not choice.steps else _kl(model, part, i, layer, w, stream, expected)
        option = Option(layer=part.layer(layer), treatment=choice.name, nbytes=w.nbytes, kl=kl)
        options.append(option)
    stream.advance(part.module)
  return options


def _treated(part: Part, choices, stream):
  """For each matrix of a block: its path, and an iterator of (treatment, weight)."""
  names = tuple(sorted({n for c in choices for step in c.steps for n in step.row.statistics}))
  values, found = weights(part), {}
  if names:
    found = stream.observe(part.module, (*names, starvation.ROWS), part.prefix)
    inputs = {layer: w.shape[-2] for layer, w in matrices(part.module).items()}
    found, _ = starvation.feed(found, inputs, 'budget')
  for path in targets(part, _EVERYTHING, Recipe(name='all', steps=())):
    measured = found.get(path.removesuffix('.weight'), {})
    yield path, ((choice, _treat(choice, values[path], measured)) for choice in choices)


# Matches every matrix of a block.
_EVERYTHING = Step(technique='magnitude', spec=None)


def _treat(choice: Treatment, w: Matrix, measured) -> Matrix:
  for step in choice.steps:
    known = {name: measured[name] for name in step.row.statistics}
    w = programs.execute(step.row, step.spec, w, programs.Prepared(step).join(known, w)).weight
  return w


def _kl(model, part, i, path, w, stream, expected) -> float:
  block = nnx.clone(part.module)
  parameters(block)[path].set_value(_widened(w))
  rows = list(calibrate.run(stream.config, block, stream.batches))
  actual = _through(model, rows, i + 1)
  total = sum(float(_divergence(model, p, q)) for p, q in zip(expected, actual, strict=True))
  return total / sum(t.size for t, _ in stream.batches)


def _through(model, batches, start: int) -> list[np.ndarray]:
  """The last hidden states of batches that stand before block `start`."""
  for block in list(model.layers)[start:]:
    batches = list(calibrate.run(model.config, block, batches))
  return [x_BTD for _, x_BTD in batches]


@jax.jit
def _widened(w: Matrix) -> Matrix:
  """Widens the codes of a weight; it still rounds or rotates its inputs.

  Blocks whose treatments differ only in their codes then run in one program.
  """
  return map_inner(dense, w)


def _divergence(model, p_BTD, q_BTD) -> jax.Array:
  graphdef, state = nnx.split(model)
  return _summed_kl(graphdef, state, p_BTD, q_BTD)


@functools.partial(jax.jit, static_argnums=0)
def _summed_kl(graphdef, state, p_BTD, q_BTD):
  model = nnx.merge(graphdef, state)
  logits = lambda x_TD: model.logits(model.final_norm(x_TD))
  # A row at a time, because the logits are far larger than the hidden states.
  rows = lambda pq: losses.kl_divergence(logits(pq[0]), logits(pq[1])).sum()
  return jax.lax.map(rows, (p_BTD, q_BTD)).sum()


def allocate(options: Sequence[Option], budget_bytes: int) -> dict[str, str]:
  """The treatment of each layer with the lowest sum of costs that fits: {layer: treatment}.

  Exact: the program is solved to a gap of zero. Raises ValueError if nothing fits, saying what the
  smallest would need.
  """
  layers = list(dict.fromkeys(option.layer for option in options))
  least = sum(min(o.nbytes for o in options if o.layer == layer) for layer in layers)
  if least > budget_bytes:
    raise ValueError(
      f'the matrices take at least {least:,} bytes with these treatments, and {budget_bytes:,} are '
      'left for them; allow more, or offer smaller treatments'
    )
  one_each = np.array([[o.layer == layer for o in options] for layer in layers], float)
  sizes = np.array([o.nbytes for o in options], float)
  costs = np.array([max(o.kl, 0.0) for o in options])
  # Scaled to numbers of order 1: the solver's tolerances are absolute.
  scale = max(costs.max(), 1e-30)
  result = scipy.optimize.milp(
    costs / scale,
    integrality=np.ones(len(options)),
    bounds=scipy.optimize.Bounds(0, 1),
    constraints=[
      scipy.optimize.LinearConstraint(one_each, 1, 1),
      scipy.optimize.LinearConstraint(sizes[None] / budget_bytes, -np.inf, 1),
    ],
    options={'mip_rel_gap': 0.0},
  )
  if result.x is None:
    raise ValueError(f'the solver found no allocation: {result.message}')
  picked = [o for o, x in zip(options, result.x, strict=True) if x > 0.5]
  if sum(o.nbytes for o in picked) > budget_bytes or len(picked) != len(layers):
    raise ValueError('the solver returned an allocation that does not fit')
  return {o.layer: o.treatment for o in picked}


def recipe_of(
  name: str, allocation: Mapping[str, str], choices: Sequence[Treatment], first: Sequence[Step] = ()
) -> Recipe:
  """The recipe that does what an allocation says, after the steps of `first`."""
  steps = list(first)
  for choice in choices:
    layers = tuple(layer for layer, chosen in allocation.items() if chosen == choice.name)
    if layers:
      steps += [dataclasses.replace(step, only=layers) for step in choice.steps]
  return Recipe(name=name, steps=tuple(steps), description=_description(allocation))


def _description(allocation: Mapping[str, str]) -> str:
  names = list(allocation.values())
  counts = [f'{names.count(name)} x {name}' for name in dict.fromkeys(names)]
  return f'found under a budget: {", ".join(counts)}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """A recipe within a budget. `kl` is measured on the whole model, `predicted` is the sum."""

  recipe: Recipe
  nbytes: int  # of all parameters
  kl: float
  predicted: float


def search(
  model: Transformer,
  choices: Sequence[Treatment],
  calibration_BT: np.ndarray,
  budget_bytes: int,
  *,
  first: Sequence[Step] = (),
  options: list[Option] | None = None,
  progress: Callable = iter,
) -> tuple[Found, list[Option]]:
  """Finds the best recipe whose stored parameters fit into a budget, and the costs it comes from.

  `first` are steps that every candidate begins with, such as a cast; they decide the bytes of all
  parameters that are not matrices. `options` are the costs if they are known, from an earlier
  search with the same model, text, treatments and `first`. Raises ValueError if nothing fits.
  """
  start, _ = pipeline.compress(model, Recipe(name='first', steps=tuple(first)), calibration_BT)
  if options is None:
    options = measure(start, choices, calibration_BT, progress=progress)
  treated = {option.layer for option in options}
  everything = sum(p.get_value().nbytes for p in parameters(start).values())
  rest = everything - sum(w.nbytes for path, w in matrices(start).items() if path in treated)
  allocations = [allocate(options, budget_bytes - rest)]
  for choice in choices:
    sizes = [o.nbytes for o in options if o.treatment == choice.name]
    if sum(sizes) + rest <= budget_bytes:
      allocations.append(dict.fromkeys(treated, choice.name))
  cost = {(o.layer, o.treatment): o.kl for o in options}
  found = []
  for allocation in allocations:
    one = recipe_of('budget', allocation, choices, first)
    result, _ = pipeline.compress(model, one, calibration_BT)
    nbytes = sum(p.get_value().nbytes for p in parameters(result).values())
    if nbytes > budget_bytes:
      raise ValueError(f'{one.description}: {nbytes:,} bytes do not fit into {budget_bytes:,}')
    predicted = sum(cost[item] for item in allocation.items())
    kl = _whole_kl(model, result, calibration_BT)
    found.append(Found(recipe=one, nbytes=nbytes, kl=kl, predicted=predicted))
  return min(found, key=lambda f: f.kl), options


def _whole_kl(model, other, calibration_BT) -> float:
  """The mean KL divergence of a compressed model from the model, in nats a token."""
  total = 0.0
  for tokens_BT in calibrate.batches(calibration_BT, pipeline.CALIBRATION_BATCH):
    total += float(_model_kl(*nnx.split(model), *nnx.split(other), tokens_BT))
  return total / calibration_BT.size


@functools.partial(jax.jit, static_argnums=(0, 2))
def _model_kl(graphdef, state, other_graphdef, other_state, tokens_BT):
  def row(tokens_T):
    p, q = (
      nnx.merge(g, s)(tokens_T[None]) for g, s in ((graphdef, state), (other_graphdef, other_state))
    )
    return losses.kl_divergence(p, q).sum()

  return jax.lax.map(row, jnp.asarray(tokens_BT)).sum()
