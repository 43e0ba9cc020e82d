"""Lets consecutive layers share the keys and values of the first of them, and its cache.

After Brandon et al. (2024), cross-layer attention, https://arxiv.org/abs/2405.12981, who train such
models from scratch; here it is a retrofit. The layers are divided into groups of `every` (CLA2,
CLA3, ...), the last of which may be smaller. The first layer of a group keeps its matrices for keys
and values, or gets the mean of those of its group, as merged heads do in `grouped_heads`. The
others keep their queries and outputs, and read the keys and values of the first one.

Keys and values of the other layers came from another hidden state, so the model is damaged more
than by merged heads, and steps that train should follow. Where the first layers of all groups write
nothing to the residual stream, and the matrices of a group are equal, the outputs do not change.
With `every: 1` nothing changes.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from model.compress.registry import Reshaped, technique
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.shared import SharedConfig
from model.transformer import Transformer, parameters

KEYS = ('key', 'value', 'key_norm')  # what makes keys and values


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedCachesSpec:
  """How many consecutive layers share a cache, and how their matrices are merged.

  mode: the mean of their matrices, or the first one's as it is.
  """

  every: int = 2
  mode: Literal['mean', 'first'] = 'mean'

  def __post_init__(self):
    if self.every < 1:
      raise ValueError(f'every must be at least 1, not {self.every}; 1 leaves all as it is')


def _reshapes(model: Transformer, spec: SharedCachesSpec) -> ModelConfig:
  layers = []
  for l, layer in enumerate(model.config.layers):
    mixer, last = layer.mixer, len(model.config.layers) - 1
    if type(mixer) is not AttentionConfig or mixer.lends:
      what = (
        'shares its keys and values already' if mixer.lends else f'has a {type(mixer).__name__}'
      )
      raise ValueError(
        f'layer {l} {what}; only attention with keys and values of its own can share'
      )
    back = l % spec.every
    if back:
      layers.append(dataclasses.replace(layer, mixer=_reader(mixer, back)))
    else:
      layers.append(layer.with_mixer(lends=spec.every > 1 and l < last))
  return model.config.replace(layers=tuple(layers))


def _reader(mixer: AttentionConfig, back: int) -> SharedConfig:
  fields = {field.name: getattr(mixer, field.name) for field in dataclasses.fields(mixer)}
  return SharedConfig(**fields, back=back)


@technique(
  'shared_caches',
  spec=SharedCachesSpec,
  paper='Brandon et al. 2024, https://arxiv.org/abs/2405.12981',
  scope='shape',
  reshapes=_reshapes,
  calibrates=lambda spec: False,
)
def shared_caches(model, measurements, spec):
  """Let consecutive layers read the keys and values of the first, which alone has a cache."""
  del measurements
  config = _reshapes(model, spec)
  values = {path: param.get_value() for path, param in parameters(model).items()}
  for l, layer in enumerate(config.layers):
    if layer.mixer.lends:
      group = _group(config.layers, l)
      for path, rest in _keys(values, l).items():
        own = [values[f'layers.{one}.attention.{rest}'] for one in group]
        values[path] = _mean(own) if spec.mode == 'mean' else own[0]
  for l, layer in enumerate(config.layers):
    for path in _keys(values, l) if layer.mixer.back else ():
      del values[path]
  events = {
    f'layers.{l}.attention': {'layers back to the one whose cache it reads': layer.mixer.back}
    for l, layer in enumerate(config.layers)
    if layer.mixer.back
  }
  return Reshaped(config=config, parameters=values, events=events)


def _group(layers: tuple[LayerConfig, ...], first: int) -> list[int]:
  """A layer that lends, and those that read from it."""
  reads = lambda l: layers[l].mixer.back and l - layers[l].mixer.back == first
  return [first, *filter(reads, range(len(layers)))]


def _keys(values: dict[str, Any], l: int) -> dict[str, str]:
  """The parameters of a layer that make keys and values, and their paths in the mixer."""
  start = f'layers.{l}.attention.'
  rests = {path: path.removeprefix(start) for path in values if path.startswith(start)}
  return {path: rest for path, rest in rests.items() if rest.split('.')[0] in KEYS}


def _mean(arrays) -> jnp.ndarray:
  mean = np.mean([np.asarray(one, np.float64) for one in arrays], axis=0)
  return jnp.asarray(mean.astype(arrays[0].dtype))
