"""The shape of a network: one frozen `ModelConfig` that holds a `LayerConfig` for each layer.

Layers may differ in every field, because structured pruning leaves them with different widths.
"""

import dataclasses
import math
from typing import Literal, get_args

from ops.rope import RopeConfig

Norm = Literal['rms', 'layer']
Activation = Literal['silu', 'gelu', 'gelu_tanh', 'relu']


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
  """One decoder block: its widths, and the traits in which model families differ.

  Every width is at least 1; the query heads are a multiple of the key/value heads.
  """

  query_heads: int
  kv_heads: int
  head_width: int
  ffn_width: int
  activation: Activation = 'silu'
  gated: bool = True  # gate(x) * up(x) instead of one up projection
  window: int | None = None  # keys that a query sees, itself included; None: all before it
  rotary_width: int | None = None  # leading part of a head that rotates; None: the whole head
  query_scale: float | None = None  # None: head_width ** -0.5
  attention_softcap: float | None = None
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False  # RMS norm over the head width of queries and keys (Qwen3)
  post_norms: bool = False  # a second norm after attention and feed-forward (Gemma 2)
  parallel: bool = False  # attention and feed-forward read the same input (GPT-NeoX)

  def __post_init__(self):
    for name in ('query_heads', 'kv_heads', 'head_width', 'ffn_width'):
      _check_count(name, getattr(self, name))
    if self.query_heads % self.kv_heads:
      raise ValueError(
        f'{self.query_heads} query heads do not divide into {self.kv_heads} key/value heads; '
        'query_heads must be a multiple of kv_heads'
      )
    _check_choice('activation', self.activation, get_args(Activation))
    if self.window is not None and self.window < 1:
      raise ValueError(f'a window holds at least one key, not {self.window}; None: all keys')
    if self.rotary_width is not None and not 0 < self.rotary_width <= self.head_width:
      raise ValueError(
        f'rotary_width must be within 1 and the head width {self.head_width}, not '
        f'{self.rotary_width}; None rotates the whole head'
      )
    for name in ('query_scale', 'attention_softcap'):
      _check_positive(name, getattr(self, name))


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
  norm: Norm = 'rms'
  norm_eps: float = 1e-5
  norm_offset: float = 0.0  # added to the norm's scale (Gemma: 1)
  rope: RopeConfig | None = RopeConfig()  # None: learned positions (GPT-2)
  tied: bool = False  # the head is the embedding
  embedding_scale: float = 1.0
  logit_softcap: float | None = None
  head_bias: bool = False
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  pad_id: int | None = None  # nothing reads it here; it is kept for those who read our files

  def __post_init__(self):
    for name in ('vocab_size', 'width', 'max_positions'):
      _check_count(name, getattr(self, name))
    if not self.layers:
      raise ValueError('a model needs at least one layer; layers is empty')
    _check_choice('norm', self.norm, get_args(Norm))
    if not (self.norm_eps >= 0 and math.isfinite(self.norm_eps)):
      raise ValueError(f'norm_eps must be a number of at least 0, not {self.norm_eps}')
    for name in ('embedding_scale', 'logit_softcap'):
      _check_positive(name, getattr(self, name))
    for l, layer in enumerate(self.layers):
      rotary_width = layer.rotary_width or layer.head_width
      if self.rope is not None and rotary_width % 2:
        raise ValueError(
          f'a rope rotates pairs, but layer {l} rotates {rotary_width} elements of a head; '
          'choose an even head_width or rotary_width'
        )

  def replace(self, **changes) -> 'ModelConfig':
    return dataclasses.replace(self, **changes)


def to_json(config: ModelConfig) -> dict:
  """The config as plain JSON values; `from_json` gives it back."""
  return dataclasses.asdict(config)


def from_json(data: dict) -> ModelConfig:
  """Reads what `to_json` wrote."""
  data = dict(data)
  data['layers'] = tuple(LayerConfig(**layer) for layer in data['layers'])
  data['rope'] = RopeConfig(**data['rope']) if data['rope'] is not None else None
  data['eos_ids'] = tuple(data['eos_ids'])
  return ModelConfig(**data)


def _check_count(name: str, value: int) -> None:
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise ValueError(f'{name} must be an integer of at least 1, not {value!r}')


def _check_positive(name: str, value: float | None) -> None:
  if value is not None and not (value > 0 and math.isfinite(value)):
    raise ValueError(f'{name} must be a positive number, not {value}')


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f'{name} {value!r} is not one of {", ".join(choices)}')
