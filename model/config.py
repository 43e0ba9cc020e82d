"""The shape of a network: one frozen `ModelConfig` that holds a `LayerConfig` for each layer.

Layers may differ in every field, because structured pruning leaves them with different widths, and
in the kinds of their sub-layers (`model.layers`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args

from model.layers import kinds, lending
from model.layers.basic import NormKind, StreamConfig
from model.layers.block import LayerConfig
from model.layers.checks import check_choice, check_count, check_positive
from ops.rope import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A decoder-only transformer language model of any supported family.

  Sizes are at least 1; where there is a rope, the part of each head that rotates is even.
  """

  family: str  # a row of model/hf_names: the names on disk, nothing else
  vocab_size: int
  width: int
  layers: tuple[LayerConfig, ...]
  max_positions: int
  norm: NormKind = 'rms'
  norm_eps: float = 1e-5
  norm_offset: float = 0.0  # added to the norm's scale (Gemma: 1)
  rope: RopeConfig | None = RopeConfig()  # None: learned positions (GPT-2)
  tied: bool = False  # the head is the embedding
  embedding_scale: float = 1.0
  logit_divisor: float = 1.0  # logits are divided by it (Granite)
  logit_softcap: float | None = None
  head_bias: bool = False
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  pad_id: int | None = None  # nothing reads it here; it is kept for those who read our files

  def __post_init__(self):
    for name in ('vocab_size', 'width', 'max_positions'):
      check_count(name, getattr(self, name))
    if not self.layers:
      raise ValueError('a model needs at least one layer; layers is empty')
    check_choice('norm', self.norm, get_args(NormKind))
    if not (self.norm_eps >= 0 and math.isfinite(self.norm_eps)):
      raise ValueError(f'norm_eps must be a number of at least 0, not {self.norm_eps}')
    for name in ('embedding_scale', 'logit_divisor', 'logit_softcap'):
      check_positive(name, getattr(self, name))
    for l, layer in enumerate(self.layers):
      rotated = layer.mixer.rotated
      if self.rope_of(layer) is not None and rotated is not None and rotated % 2:
        raise ValueError(
          f'a rope rotates pairs, but layer {l} rotates {rotated} elements of a head; '
          'choose an even head_width or rotary_width'
        )
    lending.check(self.layers)

  @property
  def stream(self) -> StreamConfig:
    """What blocks have to know of the model."""
    return StreamConfig(
      width=self.width,
      depth=len(self.layers),
      norm=self.norm,
      norm_eps=self.norm_eps,
      norm_offset=self.norm_offset,
    )

  def rope_of(self, layer: LayerConfig) -> RopeConfig | None:
    """The rope of a layer: its own, or that of the model."""
    return layer.mixer.rope or self.rope

  def replace(self, **changes) -> 'ModelConfig':
    return dataclasses.replace(self, **changes)


def to_json(config: ModelConfig) -> dict[str, Any]:
  """The config as plain JSON values; `from_json` gives it back."""
  return {**dataclasses.asdict(config), 'layers': list(map(_layer_to_json, config.layers))}


def from_json(data: Mapping[str, Any]) -> ModelConfig:
  """Reads what `to_json` wrote, now or before layers had sub-layers."""
  fields = dict(data)
  fields['layers'] = tuple(map(_layer_from_json, fields['layers']))
  fields['rope'] = RopeConfig(**fields['rope']) if fields['rope'] is not None else None
  fields['eos_ids'] = tuple(fields['eos_ids'])
  return ModelConfig(**fields)


def _layer_to_json(layer):
  parts = {'mixer': kinds.to_json(layer.mixer), 'ffn': kinds.to_json(layer.ffn)}
  return {**dataclasses.asdict(layer), **parts}


def _layer_from_json(data):
  fields = dict(data if 'mixer' in data else _from_flat(data))
  fields['mixer'] = kinds.from_json(fields['mixer'], kinds.MIXERS)
  fields['ffn'] = kinds.from_json(fields['ffn'], kinds.FFNS)
  return LayerConfig(**fields)


# Folders that were saved before layers had sub-layers hold each layer as one flat dictionary. This
# table is all that still knows of it: field of a sub-layer -> key of the dictionary.
_FLAT_MIXER = {
  **{name: name for name in ('query_heads', 'kv_heads', 'head_width', 'window', 'rotary_width')},
  **{name: name for name in ('query_scale', 'qkv_bias', 'output_bias', 'qk_norm')},
  'softcap': 'attention_softcap',
}
_FLAT_FFN = {
  'width': 'ffn_width',
  'activation': 'activation',
  'gated': 'gated',
  'bias': 'mlp_bias',
}


def _from_flat(data):
  """The form of today of a layer that was saved as one flat dictionary."""
  rest = dict(data)
  mixer = {field: rest.pop(key) for field, key in _FLAT_MIXER.items() if key in rest}
  ffn = {field: rest.pop(key) for field, key in _FLAT_FFN.items() if key in rest}
  return {'mixer': {'kind': 'attention', **mixer}, 'ffn': {'kind': 'dense', **ffn}, **rest}
