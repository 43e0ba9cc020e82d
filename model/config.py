"""The shape of a network: one frozen `ModelConfig` that holds one `LayerConfig` a layer.

Layers may differ in every field, for structured pruning leaves them with different widths.
"""

import dataclasses
from typing import Literal

from ops.rope import RopeConfig

Norm = Literal['rms', 'layer']
Activation = Literal['silu', 'gelu', 'gelu_tanh', 'relu']


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
  """One decoder block: its widths and the traits in which model families differ."""

  query_heads: int
  kv_heads: int
  head_width: int
  ffn_width: int
  activation: Activation = 'silu'
  gated: bool = True  # gate(x) * up(x), else one up projection
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
    if self.query_heads % self.kv_heads:
      raise ValueError(
        f'{self.query_heads} query heads do not divide into {self.kv_heads} key/value heads'
      )
    if self.window is not None and self.window < 1:
      raise ValueError(f'a window holds at least one key, not {self.window}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A decoder-only transformer language model of any supported family."""

  family: str  # a row of model/hf_names: decides the names on disk, nothing else
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
    if self.vocab_size < 1 or self.width < 1 or not self.layers:
      raise ValueError(
        f'a model needs a vocabulary, a width and layers; got {self.vocab_size}, {self.width}, '
        f'{len(self.layers)}'
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
