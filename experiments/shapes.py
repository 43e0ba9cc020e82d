"""Defines the flags for a model's shape: a preset, its width and depth, and an untied head."""

from absl import flags

from model import presets
from model.config import ModelConfig


def define() -> dict[str, flags.FlagHolder]:
  """Defines the flags, which `config` reads."""
  return {
    'preset': flags.DEFINE_string('preset', 'smollm2-135m', 'A shape of model/presets.py.'),
    'scale': flags.DEFINE_integer(
      'scale', 1, 'Multiplies width, heads and feed-forward.', lower_bound=1
    ),
    'layers': flags.DEFINE_integer(
      'layers', None, 'Keeps so many of the layers, the first ones.', lower_bound=1
    ),
    'untie': flags.DEFINE_bool('untie', True, 'Gives a tied head a matrix of its own.'),
  }


def config(holders: dict[str, flags.FlagHolder]) -> ModelConfig:
  """Returns the config that the flags describe.

  Raises ValueError if the preset is unknown or has not as many layers.
  """
  shape = scaled(presets.preset(holders['preset'].value), holders['scale'].value)
  kept = holders['layers'].value
  if kept is not None and kept > len(shape.layers):
    raise ValueError(f'--layers={kept}, but {holders["preset"].value} has {len(shape.layers)}')
  shape = shape.replace(layers=shape.layers[:kept])
  return shape.replace(tied=False) if holders['untie'].value else shape


def scaled(shape: ModelConfig, factor: int) -> ModelConfig:
  """Returns a config with `factor` times the width, heads and feed-forward, and the same depth."""
  wider = tuple(
    layer.with_ffn(width=factor * layer.ffn.width).resized(
      layer.mixer.units.letter, factor * layer.mixer.units.count
    )
    for layer in shape.layers
  )
  return shape.replace(width=factor * shape.width, layers=wider)
