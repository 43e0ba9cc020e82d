"""Quantizes weights and activations to integers, with and without SmoothQuant.

After Xiao et al. (2022), https://arxiv.org/abs/2211.10438. A few input channels are so large that
an 8-bit step wide enough for them rounds all others away. SmoothQuant divides the inputs of a group
of layers by s = max|x|**alpha / max|w|**(1 - alpha) and multiplies the weights by s, so that part
of the range moves to the weights. The division is folded into the norm before the group
(model/compress/folding.py). Then weights are rounded with one scale per output, and inputs with
one scale per token or one for all tokens.

Differs from the paper: alpha can be searched per group, by the error of the block's output with the
quantized group; one candidate is no smoothing. Channels that are zero in all calibration tokens or
in all weights are not scaled. Experts share the scales of a norm. Between its own matrices each
expert has scales from its own inputs.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from model.compress import folding
from model.compress.registry import Changes, technique
from model.config import ModelConfig
from ops import activations, quantized
from ops.activations import Bits
from ops.linear import Matrix, Weight

SMALLEST_SCALE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationSpec:
  """The bits per code of an input."""

  bits: Bits = 8

  def __post_init__(self):
    _check_bits(self.bits)


@technique(
  'quantize_activations',
  spec=ActivationSpec,
  paper='Yao et al. 2022, https://arxiv.org/abs/2206.01861',
)
def quantize_activations(w, statistics, spec):
  """Quantize the inputs of each layer to integers, with one scale per token."""
  del statistics
  return activations.quantize_activations(w, spec.bits)


@technique(
  'quantize_activations_static',
  spec=ActivationSpec,
  statistics=('input_absmax',),
  paper='Jacob et al. 2017, https://arxiv.org/abs/1712.05877',
)
def quantize_activations_static(w, statistics, spec):
  """Quantize the inputs of each layer to integers, with one calibrated scale for all tokens."""
  return activations.quantize_activations(w, spec.bits, absmax=statistics['input_absmax'].max())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuantSpec:
  """The strength of the smoothing, and the formats of weights and inputs.

  alpha: the exponent, from 0 (only the weights determine s) to 1 (only the inputs do). None
    searches for it in `grid` steps, compared on `rows` rows of calibration text (None: all rows).
  fold: 'norms' smooths the groups whose producer is a norm, as in the paper; 'all' every group.
  activations: one scale per token ('dynamic'), or one calibrated scale for all ('static').
  quantize: False only smooths, and leaves quantization to later steps.
  """

  alpha: float | None = 0.5
  grid: int = 20
  rows: int | None = 8
  fold: Literal['norms', 'all'] = 'norms'
  activations: Literal['dynamic', 'static'] = 'dynamic'
  weight_bits: Bits = 8
  activation_bits: Bits = 8
  quantize: bool = True

  def __post_init__(self):
    if self.alpha is not None and not 0 <= self.alpha <= 1:
      raise ValueError(f'alpha lies between 0 and 1, or is null for a search, not {self.alpha}')
    if self.grid < 1:
      raise ValueError(f'the grid of alphas has at least one step, not {self.grid}')
    if self.rows is not None and self.rows < 1:
      raise ValueError(f'alphas are compared on at least one row, not {self.rows}')
    if self.fold not in ('norms', 'all'):
      raise ValueError(f'fold is norms or all, not {self.fold!r}')
    if self.activations not in ('dynamic', 'static'):
      raise ValueError(f'activations are dynamic or static, not {self.activations!r}')
    _check_bits(self.weight_bits)
    _check_bits(self.activation_bits)


def _check_bits(bits):
  if bits not in (8, 4):
    raise ValueError(f'the codes have 8 or 4 bits, not {bits}')


@dataclasses.dataclass(frozen=True)
class Stored:
  """Quantizes a matrix with one scale per output, and its inputs when it is multiplied."""

  weight_bits: Bits
  activation_bits: Bits
  static: bool

  def __call__(self, w_IO: jax.Array, absmax_I: jax.Array) -> Matrix:
    w = quantized.quantize(w_IO, f'int{self.weight_bits}', group_size=-1)
    absmax = absmax_I.max() if self.static else None
    return activations.quantize_activations(w, self.activation_bits, absmax=absmax)

  @classmethod
  def of(cls, spec: SmoothQuantSpec) -> 'Stored':
    return cls(spec.weight_bits, spec.activation_bits, spec.activations == 'static')


def becomes(w: Matrix, spec: SmoothQuantSpec) -> Matrix:
  """Returns the weight that a matrix becomes. Raises ValueError if it is not a plain matrix."""
  if isinstance(w, Weight):
    raise ValueError(f'smoothquant scales plain matrices, not a {type(w).__name__}')
  return Stored.of(spec)(w, jnp.ones(w.shape[0])) if spec.quantize else w


def check(config: ModelConfig, spec: SmoothQuantSpec) -> None:
  """Raises ValueError if there is no norm that scales could be folded into."""
  if spec.fold == 'norms' and not any(layer.pre_norms for layer in config.layers):
    raise ValueError(
      'fold: norms folds scales into the norms before attention and feed-forward, and this model '
      'has none; fold: all smooths the other groups'
    )


@technique(
  'smoothquant',
  spec=SmoothQuantSpec,
  statistics=('input_absmax',),
  paper='Xiao et al. 2022, https://arxiv.org/abs/2211.10438',
  scope='block',
  check=check,
  becomes=becomes,
)
def smoothquant(site, spec):
  """Scale input outliers down and the weights up, then quantize both to integers."""
  values, absmax, events = _smoothed(site, spec)
  if spec.quantize:
    for layer in site.targets:
      path = f'{layer}.weight'
      absmax_I = absmax.get(layer, site.statistics[layer]['input_absmax'])
      values[path] = _store(Stored.of(spec), values.get(path, site.parameters[path]), absmax_I)
  return Changes(parameters=values, events=events)


_store = jax.jit(folding.stored, static_argnums=0)


def _smoothed(site, spec):
  """Returns the changes by path, the absmax of the smoothed inputs by layer, and the events."""
  values, absmax = {}, {}
  skipped = folding.unscaled(site.layer) if spec.fold == 'all' else {}
  events = {layer: {why: 1} for layer, why in skipped.items() if layer in site.targets}
  for group in folding.groups(site.config, site.layer):
    targets = tuple(layer for layer in group.consumers if layer in site.targets)
    if not targets or (spec.fold == 'norms' and group.norm_offset is None):
      continue
    why = folding.obstacle(site.parameters, group)
    if why is not None:
      events |= {layer: {why: 1} for layer in targets}
      continue
    absmax_I = group.read(site.statistics, 'input_absmax', jnp.max)
    scales_O = _scales(site, group, targets, absmax_I, spec)
    merged = {**site.parameters, **values}
    own = {path: merged[path] for path in group.parameters if path in merged}
    changed, rows_I = folding.apply(own, group, scales_O)
    values |= changed
    for layer in targets:
      own = site.statistics[layer]['input_absmax']
      absmax[layer] = own / jnp.broadcast_to(rows_I, own.shape)
  return values, absmax, events


def _scales(site, group, targets, absmax_I, spec):
  weights = [site.parameters[f'{layer}.weight'] for layer in targets]
  scales_AO = _candidates(absmax_I, weights, group, spec)
  if spec.alpha is not None:
    return scales_AO[0]
  trial = folding.Trial(group, targets, Stored.of(spec))
  errors = site.errors(trial, (scales_AO, absmax_I), len(scales_AO), spec.rows)
  return scales_AO[int(np.argmin(np.where(np.isfinite(errors), errors, np.inf)))]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _candidates(absmax_I, weights, group, spec) -> jax.Array:
  """The scales of the given alpha, or of no smoothing and of each alpha: [A, O] or [A, E, O]."""
  x_O = group.tie(absmax_I, jnp.max)
  sizes = [jnp.abs(w.astype(jnp.float32)).max(-1) for w in weights]
  sizes = [size if size.ndim == x_O.ndim else size.max(0) for size in sizes]  # of all experts
  w_O = group.tie(jnp.stack(sizes).max(0), jnp.max)
  dead_O = (x_O == 0) | (w_O == 0)
  x_O, w_O = jnp.where(dead_O, 1, x_O), jnp.where(dead_O, 1, w_O)
  if spec.alpha is not None:
    alphas_A = jnp.full(1, spec.alpha, jnp.float32)
  else:
    alphas_A = jnp.linspace(0, 1, spec.grid + 1, dtype=jnp.float32)
  alphas_A1 = alphas_A.reshape(-1, *[1] * x_O.ndim)
  scales_AO = x_O[None] ** alphas_A1 / w_O[None] ** (1 - alphas_A1)
  scales_AO = jnp.maximum(scales_AO, SMALLEST_SCALE)
  if spec.alpha is None:
    scales_AO = jnp.concatenate([jnp.ones_like(scales_AO[:1]), scales_AO])
  return scales_AO
