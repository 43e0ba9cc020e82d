"""SmoothQuant, and the plain quantization of activations that it is compared with.

After Xiao et al. (2022), https://arxiv.org/abs/2211.10438. A few input channels are so large that
8-bit steps wide enough for them lose all others. The inputs of a group of layers are divided by
s = max|x|**alpha / max|w|**(1 - alpha), and the weights multiplied by it, which moves the
difficulty over to the weights; the division is folded into the norm before them
(model/compress/folding.py).
Then weights are rounded with one scale an output, and inputs with one a token, or one for all.

Different from the paper: alpha can be searched for, for each group, by the error of the block's
output with the group quantized as it will be; no smoothing is a candidate too. Channels that are
zero in all calibration tokens, or in all weights, are not scaled.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from model.compress import folding
from model.compress.registry import Changes, technique
from ops import activations, quantized
from ops.activations import Bits
from ops.linear import Matrix, Weight

SMALLEST_SCALE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationSpec:
  """The bits of an input's codes."""

  bits: Bits = 8

  def __post_init__(self):
    _check_bits(self.bits)


@technique(
  'quantize_activations',
  spec=ActivationSpec,
  paper='Yao et al. 2022, https://arxiv.org/abs/2206.01861',
)
def quantize_activations(w, statistics, spec):
  """Round each layer's inputs too, with a scale of each token."""
  del statistics
  return activations.quantize_activations(w, spec.bits)


@technique(
  'quantize_activations_static',
  spec=ActivationSpec,
  statistics=('input_absmax',),
  paper='Jacob et al. 2017, https://arxiv.org/abs/1712.05877',
)
def quantize_activations_static(w, statistics, spec):
  """Round each layer's inputs too, with one scale that calibration found."""
  return activations.quantize_activations(w, spec.bits, absmax=statistics['input_absmax'].max())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuantSpec:
  """How much moves from inputs to weights, and what both become.

  alpha: from 0 (nothing but the weights counts) to 1; None: searched, in `grid` steps, which are
    compared on `rows` rows of calibration text, or all of them.
  fold: the groups whose producer is a norm, as in the paper, or all.
  activations: a scale of each token ('dynamic'), or one that calibration found ('static').
  quantize: false only smooths, so that later steps quantize.
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
    raise ValueError(f'8 or 4 bits, not {bits}')


@dataclasses.dataclass(frozen=True)
class Stored:
  """Stores a matrix with one scale an output, and has it round its inputs."""

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
  """What a matrix will be. Raises ValueError where it cannot."""
  if isinstance(w, Weight):
    raise ValueError(f'smoothquant scales plain matrices, not a {type(w).__name__}')
  return Stored.of(spec)(w, jnp.ones(w.shape[0])) if spec.quantize else w


@technique(
  'smoothquant',
  spec=SmoothQuantSpec,
  statistics=('input_absmax',),
  paper='Xiao et al. 2022, https://arxiv.org/abs/2211.10438',
  scope='block',
  becomes=becomes,
)
def smoothquant(site, spec):
  """Move outliers from inputs to weights, then round both to integers."""
  values, absmax, events = _smoothed(site, spec)
  if spec.quantize:
    for layer in site.targets:
      path = f'{layer}.weight'
      absmax_I = absmax.get(layer, site.statistics[layer]['input_absmax'])
      values[path] = _store(values.get(path, site.parameters[path]), absmax_I, Stored.of(spec))
  return Changes(parameters=values, events=events)


_store = jax.jit(lambda w_IO, absmax_I, stored: stored(w_IO, absmax_I), static_argnums=2)


def _smoothed(site, spec):
  """What smoothing changes, by path; the largest inputs of the layers after it; and events."""
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
    absmax_I = site.statistics[targets[0]]['input_absmax']
    scales_O = _scales(site, group, targets, absmax_I, spec)
    merged = {**site.parameters, **values}
    own = {path: merged[path] for path in group.parameters if path in merged}
    changed, rows_I = folding.apply(own, group, scales_O)
    values |= changed
    absmax |= dict.fromkeys(group.consumers, absmax_I / rows_I)
  return values, absmax, events


def _scales(site, group, targets, absmax_I, spec):
  weights = [site.parameters[f'{layer}.weight'] for layer in group.consumers]
  scales_AO = _candidates(absmax_I, weights, group, spec)
  if spec.alpha is not None:
    return scales_AO[0]
  trial = folding.Trial(group, targets, Stored.of(spec))
  errors = site.errors(trial, (scales_AO, absmax_I), len(scales_AO), spec.rows)
  return scales_AO[int(np.argmin(np.where(np.isfinite(errors), errors, np.inf)))]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _candidates(absmax_I, weights, group, spec) -> jax.Array:
  """The scales of the one alpha, or none and those of the grid: [A, O]."""
  x_O = group.tie(absmax_I, jnp.max)
  sizes_I = jnp.stack([jnp.abs(w.astype(jnp.float32)).max(1) for w in weights]).max(0)
  w_O = group.tie(sizes_I, jnp.max)
  dead_O = (x_O == 0) | (w_O == 0)
  x_O, w_O = jnp.where(dead_O, 1, x_O), jnp.where(dead_O, 1, w_O)
  if spec.alpha is not None:
    alphas_A1 = jnp.full((1, 1), spec.alpha, jnp.float32)
  else:
    alphas_A1 = jnp.linspace(0, 1, spec.grid + 1, dtype=jnp.float32)[:, None]
  scales_AO = x_O[None] ** alphas_A1 / w_O[None] ** (1 - alphas_A1)
  scales_AO = jnp.maximum(scales_AO, SMALLEST_SCALE)
  if spec.alpha is None:
    scales_AO = jnp.concatenate([jnp.ones_like(scales_AO[:1]), scales_AO])
  return scales_AO
