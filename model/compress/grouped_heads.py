"""Gives attention fewer key/value heads, each of which several query heads read.

After Ainslie et al. (2023), GQA, https://arxiv.org/abs/2305.13245. Consecutive key/value heads are
merged into one, so the query heads keep their order, and those that shared a head share one still.
A merged head is the mean of its heads, the first of them, or drawn at random with the spread of the
matrix. All heads have the same rotation, so merging by the mean commutes with it. A norm of keys
comes after the merged heads; its scales are merged in the same way.

The paper trains for 5 % of the tokens of pretraining afterwards; a recipe can go on with steps that
train. Where all heads of a group are equal, the outputs of the model do not change.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from model import units
from model.compress.registry import Reshaped, technique
from model.config import ModelConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedHeadsSpec:
  """How many key/value heads a layer has afterwards, and how several become one."""

  kv_heads: int = 1
  mode: Literal['mean', 'first', 'random'] = 'mean'
  seed: int = 0

  def __post_init__(self):
    if self.kv_heads < 1:
      raise ValueError(f'kv_heads must be at least 1, not {self.kv_heads}')


def _reshapes(model: Transformer, spec: GroupedHeadsSpec) -> ModelConfig:
  config, layers = model.config, []
  for l, layer in enumerate(config.layers):
    if type(layer.mixer) is not AttentionConfig:
      raise ValueError(f'layer {l} has a {type(layer.mixer).__name__}; only attention has groups')
    if layer.mixer.kv_heads % spec.kv_heads:
      raise ValueError(
        f'the {layer.mixer.kv_heads} key/value heads of layer {l} cannot be merged into '
        f'{spec.kv_heads} of equally many; choose a divisor'
      )
    layers.append(layer.with_mixer(kv_heads=spec.kv_heads))
  return config.replace(layers=tuple(layers))


@technique(
  'grouped_heads',
  spec=GroupedHeadsSpec,
  paper='Ainslie et al. 2023, https://arxiv.org/abs/2305.13245',
  scope='shape',
  reshapes=_reshapes,
  calibrates=lambda spec: False,
)
def grouped_heads(model, measurements, spec):
  """Merge neighbouring key/value heads into one, which all of their query heads read."""
  del measurements
  rng, names, values = np.random.default_rng(spec.seed), units.letters(model), {}
  for path, param in parameters(model).items():
    value = param.get_value()
    if 'K' in names[path]:
      heads = model.config.layers[units.layer_of(path)].mixer.kv_heads
      value = _merged(value, names[path].index('K'), heads, spec, rng)
    values[path] = value
  events = {
    f'layers.{l}': {
      f'key/value heads merged into others, of {layer.mixer.kv_heads}': layer.mixer.kv_heads
      - spec.kv_heads
    }
    for l, layer in enumerate(model.config.layers)
  }
  return Reshaped(config=_reshapes(model, spec), parameters=values, events=events)


def _merged(value, axis: int, heads: int, spec: GroupedHeadsSpec, rng) -> jnp.ndarray:
  """An array with merged heads along an axis; only matrices are drawn at random."""
  rows = np.moveaxis(np.asarray(value, np.float64), axis, 0)
  grouped = rows.reshape(spec.kv_heads, heads // spec.kv_heads, -1, *rows.shape[1:])
  if spec.mode == 'random' and value.ndim > 1:
    merged = rng.normal(0, rows.std(), grouped[:, 0].shape)
  else:
    merged = grouped[:, 0] if spec.mode == 'first' else grouped.mean(1)
  merged = np.moveaxis(merged.reshape(-1, *rows.shape[1:]), 0, axis)
  return jnp.asarray(merged.astype(value.dtype))
