"""Removes whole units of a network, which leaves a smaller dense model.

Feed-forward channels, key/value heads with their query heads, dimensions of the residual stream,
and layers. After Muralidharan et al. (2024), Minitron, https://arxiv.org/abs/2407.14679, and Men et
al. (2024), ShortGPT, https://arxiv.org/abs/2403.03853. All units are scored once, on the model as
it is, and those of the lowest scores go; `importance` has the scores and `sizes` the targets.

Embedding scales, query scales and head widths stay, so that the kept units compute the same. If
config.json derives one of them from a width that changed, the model is saved in the format of
`model.native`.
"""

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp
import numpy as np

from model import units
from model.compress import norms, sizes, starvation
from model.compress.importance import Importance, score
from model.compress.programs import compiled
from model.compress.registry import Reshaped, technique
from model.compress.sizes import SizeSpec
from model.config import ModelConfig
from model.transformer import linears, parameters
from ops import experts, structure

MINITRON = 'Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679'
DAMPING = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class WidthSpec(SizeSpec):
  """How many dimensions of the residual stream go, and by which importance."""

  importance: Importance = 'output'


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitSpec(WidthSpec):
  """How many units of each layer go, and by which importance.

  uneven: the same number of units goes in total, but those with the lowest scores of all layers;
    scores other than 'taylor' are first divided by their root mean square in the layer.
  refit: adjust the output weights of the kept units to take over what the removed ones did, by
    least squares on the calibration text.
  """

  uneven: bool = False
  refit: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSpec(UnitSpec):
  """`UnitSpec` for key/value heads."""

  multiple: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec(SizeSpec):
  """How many layers go; `latency` and `multiple` do not apply to layers."""

  importance: Literal['influence'] = 'influence'
  multiple: int = 1

  def __post_init__(self):
    super().__post_init__()
    if self.latency is not None or self.multiple != 1:
      raise ValueError('layers take equally long; give a ratio of them, and no latency or multiple')


def _calibrates(spec) -> bool:
  return spec.importance != 'weights' or spec.refit


def _reshapes(unit):
  def reshapes(model, spec):
    counts = _expected(model, spec, unit)
    return units.resized(model.config, units.keep(unit, [np.arange(n) for n in counts]))

  return reshapes


def _expected(model, spec, unit) -> list[int]:
  """How many units stay in each layer; where that is not known yet, the strictest of all cases.

  A later step that accepts `multiple` units accepts every multiple of it.
  """
  layers = len(units.sizes(model.config, unit))
  if spec.latency is not None:
    sizes.each(model.config, unit)
    return [spec.multiple] * layers
  count = sizes.uniform(model, spec, unit)
  if layers > 1 and spec.uneven:
    return [spec.multiple, 2 * count - spec.multiple, *[count] * (layers - 2)]
  return [count] * layers


@technique(
  'prune_ffn',
  spec=UnitSpec,
  paper=MINITRON,
  scope='shape',
  reshapes=_reshapes('F'),
  calibrates=_calibrates,
)
def prune_ffn(model, measurements, spec):
  """Remove feed-forward channels of low importance."""
  return _remove(model, measurements, spec, 'F')


@technique(
  'prune_heads',
  spec=HeadSpec,
  paper=MINITRON,
  scope='shape',
  reshapes=_reshapes('K'),
  calibrates=_calibrates,
)
def prune_heads(model, measurements, spec):
  """Remove key/value heads of low importance together with their query heads."""
  return _remove(model, measurements, spec, 'K')


def _remove(model, measurements, spec, unit) -> Reshaped:
  count, timed = _count(model, spec, unit)
  scores = score(model, measurements, unit, spec.importance)
  counts = [count] * len(scores)
  if spec.uneven:
    counts = structure.allocate(_comparable(scores, spec), count * len(scores), spec.multiple)
  kept = [structure.best(s, n) for s, n in zip(scores, counts, strict=True)]
  config, values = units.cut(model, units.keep(unit, kept))
  if spec.refit:
    values |= _refitted(model, measurements, unit, kept)
  events = {f'layers.{l}': _removed(unit, s, k) for l, (s, k) in enumerate(zip(scores, kept))}
  return Reshaped(config=config, parameters=values, events={'model': timed, **events})


def _count(model, spec, unit) -> tuple[int, dict[str, int]]:
  """How many units of each layer stay, and events."""
  if spec.latency is not None:
    return sizes.within_latency(model, spec, unit)
  return sizes.uniform(model, spec, unit), {}


def _comparable(scores, spec) -> list[np.ndarray]:
  """Scores that can be compared between layers."""
  if spec.importance == 'taylor':
    return scores
  tiny = np.finfo(np.float32).tiny
  return [s / max(float(np.sqrt(np.mean(np.square(s)))), tiny) for s in scores]


def _removed(unit, scores, kept) -> dict[str, int]:
  return {f'{units.NAMES[unit]} removed, of {len(scores)}': len(scores) - len(kept)}


def _refitted(model, measurements, unit, kept) -> dict:
  """The matrices that read the units, with their rows adjusted, by path."""
  params, layers, found = parameters(model), linears(model), {}
  readers = functools.partial(units.readers, unit=unit)
  names = ('input_covariance', starvation.ROWS)
  for l, measured in enumerate(measurements.inputs(readers, names)):
    inputs = {one: layers[f'layers.{l}.{one}'].weight.shape[-2] for one in measured}
    fed, _ = starvation.feed(measured, inputs, 'refit')
    for layer, statistics in fed.items():
      letter = layers[f'layers.{l}.{layer}'].axes[-2]
      run = units.run(model.config.layers[l], letter, inputs[layer])
      rows = jnp.asarray(units.elements(kept[l], run))
      path = f'layers.{l}.{layer}.weight'
      w_IO, covariance_II = params[path].get_value(), statistics['input_covariance']
      found[path] = _refit(covariance_II, w_IO, rows, DAMPING)
  return found


@compiled
def _refit(covariance, w, rows, damping):
  """The adjusted rows of a matrix, or of each expert by its own inputs."""
  if experts.count(w) is None:
    return structure.refit(covariance, w, rows, damping)
  return experts.each(lambda own: structure.refit(*own, rows, damping), (covariance, w))


def check_width(config: ModelConfig, spec: WidthSpec) -> None:
  """Raises ValueError if dimensions of the stream cannot be scored by what its norms put out."""
  del spec
  if not all(layer.pre_norms for layer in config.layers):
    raise ValueError(
      'dimensions of the residual stream are scored and rescaled by the norms before attention and '
      'feed-forward, which some layers lack; prune_ffn, prune_heads and drop_layers need none'
    )


@technique(
  'prune_width',
  spec=WidthSpec,
  paper=MINITRON,
  scope='shape',
  check=check_width,
  reshapes=_reshapes('D'),
  calibrates=lambda spec: True,
)
def prune_width(model, measurements, spec):
  """Remove dimensions of the residual stream of low importance, and rescale the norms."""
  count, timed = _count(model, spec, 'D')
  (scores,) = score(model, measurements, 'D', spec.importance)
  kept = structure.best(scores, count)
  config, values = units.cut(model, units.keep('D', [kept]))
  norms.rescale(values, norms.factors(model, measurements, kept), config.norm_offset)
  events = timed | _removed('D', scores, kept)
  return Reshaped(config=config, parameters=values, events={'model': events})


@technique(
  'drop_layers',
  spec=LayerSpec,
  paper='Men et al. 2024, https://arxiv.org/abs/2403.03853',
  scope='shape',
  reshapes=lambda model, spec: units.resized(
    model.config,
    units.keep('L', [np.arange(len(model.config.layers) - sizes.dropped_layers(model, spec))]),
  ),
  calibrates=lambda spec: True,
)
def drop_layers(model, measurements, spec):
  """Remove the layers that change the residual stream least (block influence)."""
  influence = measurements.influence()
  kept = structure.best(influence, len(influence) - sizes.dropped_layers(model, spec))
  config, values = units.cut(model, units.keep('L', [kept]))
  gone = sorted(set(range(len(influence))) - set(kept.tolist()))
  events = {f'layers.{l}': {'layer removed': 1} for l in gone}
  return Reshaped(config=config, parameters=values, events=events)
