"""The flags that name a model's shape: a preset, made wider, its head untied."""

import dataclasses

from absl import flags

from model import presets
from model.config import ModelConfig


def define() -> dict[str, flags.FlagHolder]:
  """The flags; `config` reads them."""
  return {
    'preset': flags.DEFINE_string('preset', 'smollm2-135m', 'A shape of model/presets.py.'),
    'scale': flags.DEFINE_integer(
      'scale', 1, 'Multiplies width, heads and feed-forward.', lower_bound=1
    ),
    'untie': flags.DEFINE_bool('untie', True, 'Gives a tied head a matrix of its own.'),
  }


def config(holders: dict[str, flags.FlagHolder]) -> ModelConfig:
  """The shape that the flags ask for. Raises ValueError if there is no such preset."""
  shape = scaled(presets.preset(holders['preset'].value), holders['scale'].value)
  return shape.replace(tied=False) if holders['untie'].value else shape


def scaled(shape: ModelConfig, factor: int) -> ModelConfig:
  """A shape with `factor` times the width, heads and feed-forward, and the same depth."""
  wider = tuple(
    dataclasses.replace(
      layer,
      query_heads=factor * layer.query_heads,
      kv_heads=factor * layer.kv_heads,
      ffn_width=factor * layer.ffn_width,
    )
    for layer in shape.layers
  )
  return shape.replace(width=factor * shape.width, layers=wider)
