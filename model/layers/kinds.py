"""The kinds of sub-layers by the names that they have in files; a new kind is a row here."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.delta import GatedDeltaConfig
from model.layers.mixers.latent import LatentConfig
from model.layers.mixers.linear import LinearConfig
from model.layers.mixers.linformer import LinformerConfig
from model.layers.mixers.moba import MobaConfig
from model.layers.mixers.shared import SharedConfig
from model.layers.routed import RoutedConfig
from model.layers.sublayer import FfnConfig, MixerConfig, SubLayerConfig
from ops import patterns
from ops.patterns import Pattern

MIXERS: dict[str, type[MixerConfig]] = {
  'attention': AttentionConfig,
  'shared': SharedConfig,
  'latent': LatentConfig,
  'linformer': LinformerConfig,
  'moba': MobaConfig,
  'linear': LinearConfig,
  'gated_delta': GatedDeltaConfig,
}
FFNS: dict[str, type[FfnConfig]] = {'dense': FeedForwardConfig, 'routed': RoutedConfig}


def to_json(config: SubLayerConfig) -> dict[str, Any]:
  """The fields of a config and the name of its kind, as plain JSON values.

  Raises ValueError for a config that is no row here.
  """
  names = {cls: name for name, cls in (MIXERS | FFNS).items()}
  if type(config) not in names:
    raise ValueError(f'{type(config).__name__} has no name in model/layers/kinds.py; add its row')
  fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  return {'kind': names[type(config)], **{name: _plain(value) for name, value in fields.items()}}


def from_json(data: Mapping[str, Any], kinds: Mapping[str, type[SubLayerConfig]]) -> SubLayerConfig:
  """Reads what `to_json` wrote. Raises ValueError for a kind that is not one of `kinds`."""
  fields = dict(data)
  kind = fields.pop('kind', None)
  if kind not in kinds:
    raise ValueError(f'this version knows no {kind!r}; the kinds are {", ".join(kinds)}')
  types = typing.get_type_hints(kinds[kind])
  return kinds[kind](**{name: _read(types[name], value) for name, value in fields.items()})


def _plain(value):
  if isinstance(value, Pattern):
    return str(value)
  return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def _read(hint, value):
  if isinstance(value, Mapping):
    return _config_type(hint)(**value)
  if isinstance(value, list):
    return tuple(value)
  return patterns.parse(value) if _config_type(hint) is Pattern and value is not None else value


def _config_type(hint) -> type:
  """The type of a config within another, which may also be None there."""
  return next((one for one in typing.get_args(hint) if one is not type(None)), hint)
