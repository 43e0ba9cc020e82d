"""Granite (dense): Llama with four multipliers, which Granite-MoE has too.

They multiply embeddings, scores of attention and what each sub-layer adds to the stream, and divide
logits. transformers: models/granite (5.24).
"""

from model.config import ModelConfig
from model.hf_names import fields, llama, rope
from model.hf_names.family import Family
from model.layers.block import LayerConfig

DEFAULTS = llama.Defaults()
Layers = tuple[LayerConfig, ...]


def blocks(hf: dict, **parts) -> Layers:
  """The layers with their multipliers; `parts` as for `llama.blocks`."""
  llama.only_whole_heads(hf)
  biased = fields.flag(hf, 'attention_bias', False)
  mixer = {
    'qkv_bias': biased,
    'output_bias': biased,
    'query_scale': fields.positive(hf, 'attention_multiplier', 1.0),
  }
  added = fields.positive(hf, 'residual_multiplier', 1.0)
  return llama.blocks(hf, DEFAULTS, mixer=mixer, residual_scale=added, **parts)


def decoder(hf: dict, family: str, layers: Layers) -> ModelConfig:
  """The config of a model, with the multipliers of embeddings and logits."""
  return llama.decoder(
    hf,
    family,
    DEFAULTS,
    layers,
    embedding_scale=fields.positive(hf, 'embedding_multiplier', 1.0),
    logit_divisor=fields.positive(hf, 'logits_scaling', 1.0),
  )


def to_hf(config: ModelConfig) -> dict:
  """The keys that `blocks` and `decoder` read."""
  layer, heads = config.layers[0], config.layers[0].mixer
  return {
    **llama.decoder_to_hf(config),
    **rope.to_hf(config.rope),
    'attention_bias': heads.qkv_bias,
    'attention_multiplier': heads.query_scale or heads.head_width**-0.5,
    'residual_multiplier': layer.residual_scale,
    'embedding_multiplier': config.embedding_scale,
    'logits_scaling': config.logit_divisor,
  }


def _from_hf(hf):
  bias = fields.flag(hf, 'mlp_bias', False)
  return decoder(hf, 'granite', blocks(hf, ffn={'bias': bias}))


GRANITE = Family(
  model_type='granite',
  architecture='GraniteForCausalLM',
  prefix='model.',
  rows=llama.ROWS,
  config_from_hf=_from_hf,
  config_to_hf=lambda config: {**to_hf(config), 'mlp_bias': config.layers[0].ffn.bias},
)
