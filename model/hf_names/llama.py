"""Llama and Mistral, and the names, widths and rope that other families share with them.

transformers: models/llama, models/mistral (5.23).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.hf_names import fields, rope
from model.hf_names.family import TRANSPOSE, Family, Row
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig

ROWS = (
  Row('model.embed_tokens', ('embedding',)),
  Row('model.layers.{l}.input_layernorm', ('layers.{l}.attention_norm',)),
  Row('model.layers.{l}.self_attn.q_proj', ('layers.{l}.attention.query',), TRANSPOSE),
  Row('model.layers.{l}.self_attn.k_proj', ('layers.{l}.attention.key',), TRANSPOSE),
  Row('model.layers.{l}.self_attn.v_proj', ('layers.{l}.attention.value',), TRANSPOSE),
  Row('model.layers.{l}.self_attn.o_proj', ('layers.{l}.attention.output',), TRANSPOSE),
  Row('model.layers.{l}.post_attention_layernorm', ('layers.{l}.ffn_norm',)),
  Row('model.layers.{l}.mlp.gate_proj', ('layers.{l}.ffn.gate',), TRANSPOSE),
  Row('model.layers.{l}.mlp.up_proj', ('layers.{l}.ffn.up',), TRANSPOSE),
  Row('model.layers.{l}.mlp.down_proj', ('layers.{l}.ffn.down',), TRANSPOSE),
  Row('model.norm', ('final_norm',)),
  Row('lm_head', ('head',), TRANSPOSE),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
  """What transformers assumes where config.json lacks a key."""

  vocab_size: int = 32000
  width: int = 4096
  ffn_width: int = 11008
  layers: int = 32
  heads: int = 32
  kv_heads: int | None = None  # None: as many as query heads
  head_width: int | None = None  # None: width / heads
  max_positions: int = 2048
  eps: float = 1e-6
  tied: bool = False
  bos: int | None = 1
  eos: int | None = 2
  pad: int | None = None
  activation_key: str = 'hidden_act'
  activation: str = 'silu'


def decoder(
  hf: dict, family: str, defaults: Defaults, layers: tuple[LayerConfig, ...], **traits
) -> ModelConfig:
  """The config of a model with RMS norms and rotary embeddings; `traits` are fields of it."""
  max_positions = fields.size(hf, 'max_position_embeddings', defaults.max_positions)
  vocab_size = fields.size(hf, 'vocab_size', defaults.vocab_size)
  return ModelConfig(
    family=family,
    vocab_size=vocab_size,
    width=fields.size(hf, 'hidden_size', defaults.width),
    layers=layers,
    max_positions=max_positions,
    norm='rms',
    norm_eps=fields.number(hf, 'rms_norm_eps', defaults.eps),
    tied=fields.flag(hf, 'tie_word_embeddings', defaults.tied),
    **fields.tokens(hf, defaults.bos, defaults.eos, defaults.pad, vocab_size=vocab_size),
    **({} if 'rope' in traits else {'rope': rope.from_hf(hf, max_positions)}),
    **traits,
  )


def blocks(
  hf: dict,
  defaults: Defaults,
  *,
  mixer: Mapping[str, Any] | None = None,
  ffn: Mapping[str, Any] | None = None,
  **traits,
) -> tuple[LayerConfig, ...]:
  """The layers, all equal; `mixer`, `ffn` and `traits` are further fields of their configs."""
  width = fields.size(hf, 'hidden_size', defaults.width)
  heads = fields.size(hf, 'num_attention_heads', defaults.heads)
  head_width = fields.size_or_null(hf, 'head_dim', defaults.head_width)
  if head_width is None and width % heads:
    raise ValueError(
      f'hidden_size {width} in config.json is no multiple of num_attention_heads {heads}'
    )
  attention = AttentionConfig(
    query_heads=heads,
    kv_heads=fields.size_or_null(hf, 'num_key_value_heads', defaults.kv_heads) or heads,
    head_width=head_width or width // heads,
    **(mixer or {}),
  )
  feed_forward = FeedForwardConfig(
    width=fields.size(hf, 'intermediate_size', defaults.ffn_width),
    activation=fields.activation(hf, defaults.activation_key, defaults.activation),
    **(ffn or {}),
  )
  layer = LayerConfig(mixer=attention, ffn=feed_forward, **traits)
  return (layer,) * fields.size(hf, 'num_hidden_layers', defaults.layers)


def windowed(layers: tuple[LayerConfig, ...], windows: list[int | None]) -> tuple[LayerConfig, ...]:
  return tuple(layer.with_mixer(window=window) for layer, window in zip(layers, windows))


def decoder_to_hf(config: ModelConfig, activation_key: str = 'hidden_act') -> dict:
  """The keys that `decoder` and `blocks` read, without those of the rope."""
  layer = config.layers[0]
  return {
    'vocab_size': config.vocab_size,
    'hidden_size': config.width,
    'intermediate_size': layer.ffn.width,
    'num_hidden_layers': len(config.layers),
    'num_attention_heads': layer.mixer.query_heads,
    'num_key_value_heads': layer.mixer.kv_heads,
    'head_dim': layer.mixer.head_width,
    activation_key: fields.activation_name(layer.ffn.activation),
    'max_position_embeddings': config.max_positions,
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tied,
  }


def require_divisible(config: ModelConfig) -> None:
  """Raises ValueError if transformers refuses the number of heads, whatever their width."""
  heads = config.layers[0].mixer.query_heads
  if config.width % heads:
    raise ValueError(
      f'transformers reads a {config.family} only where hidden_size ({config.width}) is a multiple '
      f'of num_attention_heads ({heads})'
    )


def only_whole_heads(hf: dict) -> None:
  """Raises ValueError for a partial rotary factor, which these families do not have."""
  for place in (hf, rope.parameters(hf)):
    fields.refuse(place, 'partial_rotary_factor', 1, None)


LLAMA_DEFAULTS = Defaults()
MISTRAL_DEFAULTS = Defaults(ffn_width=14336, kv_heads=8, max_positions=4096 * 32)


def _llama_from_hf(hf):
  only_whole_heads(hf)
  biased = fields.flag(hf, 'attention_bias', False)
  mlp_bias = fields.flag(hf, 'mlp_bias', False)
  mixer = {'qkv_bias': biased, 'output_bias': biased}
  layers = blocks(hf, LLAMA_DEFAULTS, mixer=mixer, ffn={'bias': mlp_bias})
  return decoder(hf, 'llama', LLAMA_DEFAULTS, layers)


def _llama_to_hf(config):
  require_divisible(config)
  layer = config.layers[0]
  biases = {'attention_bias': layer.mixer.qkv_bias, 'mlp_bias': layer.ffn.bias}
  return {**decoder_to_hf(config), **rope.to_hf(config.rope), **biases}


def _mistral_from_hf(hf):
  only_whole_heads(hf)
  layers = blocks(hf, MISTRAL_DEFAULTS)
  window = fields.size_or_null(hf, 'sliding_window', 4096)
  windows = fields.windows(hf, [window is not None] * len(layers), window)
  if len(set(windows)) > 1 or windows[0] != window:
    # transformers gives all layers the window, and so ignores these layer_types.
    raise ValueError(
      'layer_types in config.json contradicts sliding_window: a mistral has one kind'
    )
  return decoder(hf, 'mistral', MISTRAL_DEFAULTS, windowed(layers, windows))


def _mistral_to_hf(config):
  window = {'sliding_window': config.layers[0].mixer.window}
  return {**decoder_to_hf(config), **rope.to_hf(config.rope), **window}


LLAMA = Family(
  model_type='llama',
  architecture='LlamaForCausalLM',
  prefix='model.',
  rows=ROWS,
  config_from_hf=_llama_from_hf,
  config_to_hf=_llama_to_hf,
)
MISTRAL = dataclasses.replace(
  LLAMA,
  model_type='mistral',
  architecture='MistralForCausalLM',
  config_from_hf=_mistral_from_hf,
  config_to_hf=_mistral_to_hf,
)
