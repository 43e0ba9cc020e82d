"""Finds what is removed together with a unit of a network, and builds networks without it.

A unit is a feed-forward channel ('F'), a key/value head with the query heads that read it ('K'), a
dimension of the residual stream ('D') or a whole layer ('L'). Which arrays are cut for it, and
along which axis, follows from the letters of their axes (`axes` of the modules in `model.layers`)
and from `SubLayerConfig.units`: a key/value head takes an equal share of every 'K' axis, and its
query heads one of every 'N' axis.

What is left is a smaller dense model of the same class, with a config of its own.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.config import ModelConfig
from model.layers import basic, lending
from model.layers.block import Block, LayerConfig
from model.layers.sublayer import Units
from model.transformer import Transformer, abstract, linears, modules, parameters
from ops.linear import Weight

Unit = Literal['F', 'K', 'D', 'L']
NAMES = {
  'F': 'feed-forward channels',
  'K': 'key/value heads with their query heads',
  'D': 'dimensions of the residual stream',
  'L': 'layers',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
  """The units that stay, as increasing indices; everything that is not named stays whole.

  layers: of the model.  width: dimensions of the residual stream.  channels and heads: feed-forward
  channels and key/value heads by the number of the layer in the model that is cut.
  """

  layers: Sequence[int] | None = None
  width: np.ndarray | None = None
  channels: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
  heads: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
  """An axis of an array along which each unit has `run` consecutive elements."""

  path: str
  axis: int
  letter: str
  run: int


def letters(model: Transformer) -> dict[str, tuple[str, ...]]:
  """Returns the letters of the axes of every parameter by its path.

  A vector has the last letter of its module; so the letter of a bias is that of the outputs.
  """
  return {
    '.'.join((*path, name)): basic.letters(module, len(value.get_value().shape))
    for path, module in modules(model)
    for name, value in vars(module).items()
    if isinstance(value, nnx.Param)
  }


def layer_of(path: str) -> int | None:
  """Returns the number of the layer that a parameter belongs to, None outside the layers."""
  first, *rest = path.split('.')
  return int(rest[0]) if first == 'layers' else None


def cuts(model: Transformer, unit: Unit, layer: int | None = None) -> list[Cut]:
  """Returns every axis along which units 'F', 'K' or 'D' are cut, in one layer or in the model."""
  found, params = [], parameters(model)
  for path, names in letters(model).items():
    l = layer_of(path)
    if layer is not None and l != layer:
      continue
    cut = (unit,) if l is None else _axes(model.config.layers[l], unit)
    for axis, letter in enumerate(names):
      if letter in cut:
        size = params[path].get_value().shape[axis]
        elements = 1 if l is None else run(model.config.layers[l], letter, size)
        found.append(Cut(path=path, axis=axis, letter=letter, run=elements))
  return found


def _axes(layer: LayerConfig, unit: Unit) -> tuple[str, ...]:
  """The letters of the axes in one layer that consist of this unit."""
  return (unit,) if unit == 'D' else _units(layer, unit).axes


def _units(layer: LayerConfig, unit: Unit) -> Units:
  """The units of one letter in one layer. Raises ValueError if it has none."""
  for units in layer.units:
    if units.letter == unit:
      return units
  raise ValueError(f'a layer has no {NAMES[unit]}')


def unit_of(layer: LayerConfig, letter: str) -> str:
  """Returns the letter of the units that an axis of a matrix in this layer consists of."""
  return next((units.letter for units in layer.units if letter in units.axes), letter)


def run(layer: LayerConfig, letter: str, size: int) -> int:
  """Returns how many elements a unit has along an axis of this letter and size, in a layer."""
  return next((size // units.count for units in layer.units if letter in units.axes), 1)


def readers(block: Block, unit: Unit) -> tuple[str, ...]:
  """Returns the linear layers of a block whose inputs are its units, by their paths in it."""
  read = _axes(block.layer, unit)
  return tuple(path for path, linear in linears(block).items() if linear.axes[-2] in read)


def sizes(config: ModelConfig, unit: Unit) -> list[int]:
  """Returns how many units there are: of each layer for 'F' and 'K', else one number."""
  if unit == 'D':
    return [config.width]
  if unit == 'L':
    return [len(config.layers)]
  return [_units(layer, unit).count for layer in config.layers]


def keep(unit: Unit, indices: Sequence[np.ndarray]) -> Kept:
  """Returns the `Kept` of one kind of unit from the indices of each layer, or of the one list."""
  if unit == 'D':
    return Kept(width=indices[0])
  if unit == 'L':
    return Kept(layers=[int(i) for i in indices[0]])
  by_layer = dict(enumerate(indices))
  return Kept(channels=by_layer) if unit == 'F' else Kept(heads=by_layer)


def resized(config: ModelConfig, kept: Kept) -> ModelConfig:
  """Returns the config of the smaller model."""
  numbers = range(len(config.layers)) if kept.layers is None else kept.layers
  lending.check_kept(config.layers, numbers)
  layers = tuple(_resized_layer(config.layers[l], kept, l) for l in numbers)
  width = config.width if kept.width is None else len(kept.width)
  return config.replace(width=width, layers=layers)


def _resized_layer(layer: LayerConfig, kept: Kept, l: int) -> LayerConfig:
  for letter, kept_units in (('F', kept.channels), ('K', kept.heads)):
    if l in kept_units:
      layer = layer.resized(letter, len(kept_units[l]))
  return layer


def cut(model: Transformer, kept: Kept) -> tuple[ModelConfig, dict[str, jax.Array]]:
  """Returns the config of the smaller model, and its parameters by path.

  Raises ValueError if a parameter that has to be cut is no plain array.
  """
  numbers = range(len(model.config.layers)) if kept.layers is None else kept.layers
  place = {old: new for new, old in enumerate(numbers)}
  names, values = letters(model), {}
  for path, param in parameters(model).items():
    l = layer_of(path)
    if l is not None and l not in place:
      continue
    value = param.get_value()
    for axis, indices in _indices(model.config, kept, names[path], value.shape, l):
      check_plain(path, value)
      value = jnp.take(value, indices, axis=axis)
    values[path if l is None else _renumbered(path, place[l])] = value
  return resized(model.config, kept), values


def _indices(config, kept: Kept, names, shape, l) -> Iterator[tuple[int, np.ndarray]]:
  """The axes along which an array is cut, and the elements that stay."""
  chosen = {'D': kept.width}
  if l is not None:
    chosen |= {'F': kept.channels.get(l), 'K': kept.heads.get(l)}
  for unit, units in chosen.items():
    if units is not None:
      cut = (unit,) if l is None else _axes(config.layers[l], unit)
      for axis, letter in enumerate(names):
        if letter in cut:
          own = 1 if l is None else run(config.layers[l], letter, shape[axis])
          yield axis, elements(units, own)


def elements(units: np.ndarray, run: int) -> np.ndarray:
  """Returns the elements of some units along an axis where each has `run` of them."""
  return (np.asarray(units)[:, None] * run + np.arange(run)).reshape(-1)


def _renumbered(path: str, l: int) -> str:
  _, _, rest = path.split('.', 2)
  return f'layers.{l}.{rest}'


def check_plain(path: str, value) -> None:
  """Raises ValueError if a parameter is compressed already."""
  if isinstance(value, Weight):
    raise ValueError(
      f'{path} is a {type(value).__name__}; units are removed from plain arrays, before other steps'
    )


def build(config: ModelConfig, values: Mapping[str, jax.Array], dtype=jnp.float32) -> Transformer:
  """Builds a model of a config from its parameters; `dtype` is that of the activations.

  Raises ValueError if a parameter is missing, unexpected or misshapen.
  """
  model = abstract(config, dtype)
  expected = {path: tuple(p.get_value().shape) for path, p in parameters(model).items()}
  found = {path: tuple(value.shape) for path, value in values.items()}
  if found != expected:
    wrong = sorted(dict(found.items() ^ expected.items()))
    raise ValueError(f'parameters do not fit the config: {", ".join(wrong[:20])}')
  for path, param in parameters(model).items():
    param.set_value(values[path])
  return model
