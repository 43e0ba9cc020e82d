"""AWQ: scale up the weights of strong inputs before rounding, and clip what rounding reaches.

After Lin et al. (2023), https://arxiv.org/abs/2306.00978. For each group of layers that read the
same input (model/compress/folding.py), the rows of the weights are multiplied by
s = mean|x|**alpha, and the layer that produces the input is divided by s. Of a grid of alphas, the
one whose rounded weights change the block's output least is kept. Then the weights that share a
scale are clipped to the range, from the whole of it down to half, whose rounding changes the
layer's output least.

Each of the four groups of a block costs `grid` forward passes of the block on `rows` rows, which is
nearly all of the time for large blocks, and each matrix is rounded 21 times.

Differences from the paper and its reference code: no scaling is always a candidate, so scales are
never worse than none by the error that is compared. That error is measured on some of the
calibration rows (experiments/LOG.md compares numbers of rows), and always at the output of the
whole block. With grouped queries the value and output layers are scaled too, with equal scales for
heads that share values. An input that is zero in all calibration tokens is not scaled. Clipping
weighs errors by the covariance of a group's inputs, which gives the exact mean squared error over
all calibration tokens, where the paper takes a sample of them; and it takes 20 steps, not 10.

Experts share the alpha of a group. Between its own matrices each expert has scales from its inputs.

`duo` divides by the weights' own mean magnitude, s = x**alpha / w**(1 - alpha), as llm-compressor
does, where w is relative to the largest weight in its quantization group.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from model.compress import folding
from model.compress.registry import Changes, Outcome, lookup, technique
from model.compress.techniques import QuantizeSpec, round_to_nearest
from ops import experts, quantized
from ops.linear import Matrix, Weight

SMALLEST_SCALE = 1e-4
CLIP_STEPS, SMALLEST_RANGE = 20, 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class AwqSpec:
  """A storage format as in `round_to_nearest`, and how it is searched for.

  `grid` alphas from 0 up to 1 are compared on `rows` rows of calibration text, on all for null.
  With `quantize` false the weights are only scaled, for the best result in `format`, and a later
  step, such as gptq, rounds them.
  """

  format: quantized.FormatName = 'int4'
  group_size: int | None = None
  symmetric: bool = False
  clip: quantized.Clip = 'none'
  clip_search: bool = True
  grid: int = 20
  rows: int | None = 8
  duo: bool = False
  quantize: bool = True

  def __post_init__(self):
    if self.grid < 1:
      raise ValueError(f'the grid of alphas has at least one point, not {self.grid}')
    if self.rows is not None and self.rows < 1:
      raise ValueError(f'alphas are compared on at least one row, not {self.rows}')
    _ = self.rounding

  @property
  def rounding(self) -> QuantizeSpec:
    """The options of the rounding itself."""
    return QuantizeSpec(
      format=self.format, group_size=self.group_size, symmetric=self.symmetric, clip=self.clip
    )


@dataclasses.dataclass(frozen=True)
class Rounded:
  """Gives a matrix the values of rounding to nearest; statistics of inputs play no part."""

  spec: QuantizeSpec

  def __call__(self, w_IO: jax.Array, measured_I: jax.Array) -> jax.Array:
    del measured_I
    return _nearest(w_IO, self.spec).astype(w_IO.dtype)


def becomes(w: Matrix, spec: AwqSpec) -> Matrix:
  """The weight that a matrix becomes. Raises ValueError if it cannot."""
  if isinstance(w, Weight):
    raise ValueError(f'awq scales plain matrices, not a {type(w).__name__}')
  stored = round_to_nearest(w, {}, spec.rounding).weight
  return stored if spec.quantize else w


@technique(
  'awq',
  spec=AwqSpec,
  statistics=('input_absmean', 'input_covariance'),
  paper='Lin et al. 2023, https://arxiv.org/abs/2306.00978',
  scope='block',
  becomes=becomes,
)
def awq(site, spec):
  """Scale up the weights of large inputs, clip ranges, then round to nearest."""
  skipped = folding.unscaled(site.layer)
  events = {layer: {why: 1} for layer, why in skipped.items() if layer in site.targets}
  values, rows, failed = _scaled(site, spec)
  events |= {layer: {why: 1} for layer, why in failed.items()}
  if not spec.quantize:
    return Changes(parameters=values, events=events)
  outcomes = _rounded(*_to_round(site, values, rows, spec), spec.rounding)
  for layer, outcome in outcomes.items():
    values[f'{layer}.weight'] = outcome.weight
    events[layer] = {**events.get(layer, {}), **outcome.events}
  return Changes(parameters=values, events=events)


def _scaled(site, spec):
  """Parameters that scales change, by path; scales per layer; and why a layer has none."""
  trials, failed = [], {}
  for group in folding.groups(site.config, site.layer):
    targets = tuple(layer for layer in group.consumers if layer in site.targets)
    why = folding.obstacle(site.parameters, group)
    if why is None and targets:
      trials.append(folding.Trial(group, targets, Rounded(spec.rounding)))
    failed |= dict.fromkeys(targets if why else (), why)
  if not trials:
    return {}, {}, failed
  groups = tuple(trial.group for trial in trials)
  scales, improved = _best(site, trials, spec)
  values, rows = _folded(dict(site.parameters), scales, groups)
  for trial, better in zip(trials, improved, strict=True):
    why = 'not scaled, because no scales of the grid were better'
    failed |= dict.fromkeys(() if better else trial.targets, why)
  return values, rows, failed


def _to_round(site, values, rows, spec):
  """The matrices to round, the scales of their inputs, and covariances for clipping."""
  # Layers whose outputs meet in a softmax are not clipped: their own output errors mislead there.
  unclipped = site.layer.wiring.scores
  clipped = [one for one in site.targets if spec.clip_search and one not in unclipped]
  return (
    {layer: values.get(path := f'{layer}.weight', site.parameters[path]) for layer in site.targets},
    {layer: scales_I for layer, scales_I in rows.items() if layer in clipped},
    {layer: site.statistics[layer]['input_covariance'] for layer in clipped},
  )


def _best(site, trials, spec):
  """The scales with the least block error per group, and whether they are better than none."""
  means = [trial.group.read(site.statistics, 'input_absmean', jnp.mean) for trial in trials]
  weights = [[site.parameters[f'{one}.weight'] for one in trial.targets] for trial in trials]
  groups = tuple(trial.group for trial in trials)
  scales = _all_candidates(means, weights, groups, spec)
  together = folding.Trials(tuple(trials), spec.grid)
  arrays = tuple(zip(scales, means, strict=True))
  errors = site.errors(together, arrays, len(trials) * spec.grid, spec.rows)
  errors = np.where(np.isfinite(errors), errors, np.inf).reshape(len(trials), spec.grid)
  best = errors.argmin(1)
  found = [scales_AO[k] for scales_AO, k in zip(scales, best, strict=True)]
  return found, errors.min(1) < errors[:, 0]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _all_candidates(means, weights, groups, spec):
  return [
    _candidates(mean_I, own, group, spec)
    for mean_I, own, group in zip(means, weights, groups, strict=True)
  ]


@functools.partial(jax.jit, static_argnums=2)
def _folded(parameters, scales, groups):
  """The parameters that folding the scales changes, and the scales of each layer's inputs."""
  values, rows = {}, {}
  for group, scales_O in zip(groups, scales, strict=True):
    changed, rows_I = folding.apply({**parameters, **values}, group, scales_O)
    values |= changed
    rows |= dict.fromkeys(group.consumers, rows_I)
  return values, rows


def _candidates(mean_I, weights, group, spec) -> jax.Array:
  """The scales of each alpha, the first of them all 1: [A, O] or [A, E, O]."""
  x_O = group.tie(mean_I, jnp.mean)
  alphas_A = jnp.arange(spec.grid, dtype=jnp.float32) / spec.grid
  alphas_A1 = alphas_A.reshape(-1, *[1] * x_O.ndim)
  scales_AO = x_O[None] ** alphas_A1
  if spec.duo:
    own = x_O.ndim > 1  # scales of its own for each expert
    size = functools.partial(_relative_size, spec=spec)
    w_O = group.tie(jax.vmap(size)(weights) if own else size(_flat(weights)), jnp.mean)
    scales_AO = scales_AO / (w_O[None] ** (1 - alphas_A1) + SMALLEST_SCALE)
  live_O = x_O[None] > 0
  scales_AO = jnp.maximum(scales_AO, SMALLEST_SCALE)
  high_A1 = jnp.where(live_O, scales_AO, 0).max(-1, keepdims=True)
  low_A1 = jnp.where(live_O, scales_AO, jnp.inf).min(-1, keepdims=True)
  scales_AO = jnp.where(live_O, scales_AO / jnp.sqrt(high_A1 * low_A1), 1)
  return scales_AO.at[0].set(1)


def _flat(weights) -> list[jax.Array]:
  """Matrices [I, O], with all experts of a weight side by side."""
  return [jnp.moveaxis(w, -2, 0).reshape(w.shape[-2], -1) for w in weights]


def _relative_size(weights, spec):
  """The mean magnitude of each input's weights, relative to the largest in its group: [I]."""
  w_IO = jnp.abs(jnp.concatenate([w.astype(jnp.float32) for w in weights], axis=1))
  size = quantized.resolve_group(spec.format, w_IO.shape[0], spec.group_size)
  w_JgO = w_IO.reshape(-1, size, w_IO.shape[1])
  return (w_JgO / (w_JgO.max(1, keepdims=True) + 1e-6)).reshape(w_IO.shape).mean(1)


@functools.partial(jax.jit, static_argnums=3)
def _rounded(weights, rows, covariances, rounding) -> dict[str, Outcome]:
  """Clips each matrix whose inputs' covariance is given, and rounds all of them; by layer."""
  found = {}
  for layer, w_IO in weights.items():
    if layer in covariances:
      covariance = covariances[layer]
      if layer in rows:
        own = jnp.broadcast_to(rows[layer], covariance.shape[:-1])
        covariance = covariance / (own[..., :, None] * own[..., None, :])
      clipped = lambda given: clip(*given, rounding)
      given = (w_IO, covariance)
      w_IO = clipped(given) if experts.count(w_IO) is None else experts.each(clipped, given)
    found[layer] = lookup('round_to_nearest')(w_IO, {}, rounding)
  return found


def _nearest(w_IO, spec) -> jax.Array:
  """The values that `round_to_nearest` stores, float32 [I, O], without packing."""
  options = {key: getattr(spec, key) for key in ('group_size', 'symmetric', 'clip')}
  return quantized.project(w_IO, *quantized.fit(w_IO, spec.format, **options), spec.format)


def clip(w_IO: jax.Array, covariance_II: jax.Array, spec: QuantizeSpec) -> jax.Array:
  """Limits each group's weights to the range whose rounding moves the output least, [I, O].

  `covariance_II` is the mean of x xᵀ over the inputs of this matrix; a group shares one scale.
  """
  size = quantized.resolve_group(spec.format, w_IO.shape[0], spec.group_size)
  w_JgO = w_IO.astype(jnp.float32).reshape(-1, size, w_IO.shape[1])
  groups = jnp.arange(w_JgO.shape[0])
  blocks_Jgg = covariance_II.reshape(len(groups), size, len(groups), size)[groups, :, groups]
  high_JO = jnp.abs(w_JgO).max(1)

  def error(limit_JO):
    clipped_JgO = _clipped(w_JgO, limit_JO)
    moved_JgO = _nearest(clipped_JgO.reshape(w_IO.shape), spec).reshape(w_JgO.shape) - w_JgO
    felt_JgO = jnp.einsum('Jgh,JhO->JgO', blocks_Jgg, moved_JgO, precision='highest')
    return (moved_JgO * felt_JgO).sum(1)

  def step(i, best):
    limit_JO = (1 - i * (1 - SMALLEST_RANGE) / CLIP_STEPS) * high_JO
    candidate = (error(limit_JO), limit_JO)
    better_JO = candidate[0] < best[0]
    return jax.tree.map(functools.partial(jnp.where, better_JO), candidate, best)

  start = (jnp.full_like(high_JO, jnp.inf), high_JO)
  _, limit_JO = jax.lax.fori_loop(0, CLIP_STEPS + 1, step, start)
  return _clipped(w_JgO, limit_JO).reshape(w_IO.shape).astype(w_IO.dtype)


def _clipped(w_JgO, limit_JO):
  return jnp.clip(w_JgO, -limit_JO[:, None], limit_JO[:, None])
