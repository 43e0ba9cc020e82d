"""Granite-MoE, without and with a shared expert: Llama with experts, and four multipliers.

They multiply embeddings, scores of attention and what each sub-layer adds to the stream, and divide
logits. The experts of a layer are one tensor. transformers: models/granitemoe, granitemoeshared
(5.24).
"""

import dataclasses

from model.hf_names import fields, llama, moe, rope
from model.hf_names.family import TRANSPOSE, Family, Layout, Row
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import RoutedConfig

DEFAULTS = llama.Defaults()
MOE, SHARED_MLP = 'model.layers.{l}.block_sparse_moe', 'model.layers.{l}.shared_mlp'
SHARED = 'layers.{l}.ffn.shared'
COMMON = (
  *moe.without_dense(llama.ROWS),
  Row(f'{SHARED_MLP}.input_linear', (f'{SHARED}.gate', f'{SHARED}.up'), TRANSPOSE),
  Row(f'{SHARED_MLP}.output_linear', (f'{SHARED}.down',), TRANSPOSE),
)
ROWS = (
  *COMMON,
  Row(f'{MOE}.router.layer', moe.ROUTER, TRANSPOSE),
  Row(f'{MOE}.input_linear', (moe.GATE, moe.UP), TRANSPOSE, stacked=True),
  Row(f'{MOE}.output_linear', (moe.DOWN,), TRANSPOSE, stacked=True),
)
IN_MEMORY = (*COMMON, Row(f'{MOE}.router', moe.ROUTER, TRANSPOSE), *moe.fused(f'{MOE}.experts'))


def _from_hf(hf, family, **shared):
  llama.only_whole_heads(hf)
  fields.refuse(hf, 'norm_topk_prob', True, None)
  biased = fields.flag(hf, 'attention_bias', False)
  mixer = {
    'qkv_bias': biased,
    'output_bias': biased,
    'query_scale': fields.positive(hf, 'attention_multiplier', 1.0),
  }
  added = fields.positive(hf, 'residual_multiplier', 1.0)
  layers = llama.blocks(hf, DEFAULTS, mixer=mixer, residual_scale=added)
  router = {'score': 'softmax_of_chosen'}
  width = layers[0].ffn.width
  experts = moe.routed(hf, experts=8, choices=2, width=width, router=router, **shared)
  return llama.decoder(
    hf,
    family,
    DEFAULTS,
    moe.everywhere(layers, experts),
    embedding_scale=fields.positive(hf, 'embedding_multiplier', 1.0),
    logit_divisor=fields.positive(hf, 'logits_scaling', 1.0),
  )


def _shared_from_hf(hf):
  width = fields.integer(hf, 'shared_intermediate_size', 0)
  return _from_hf(hf, 'granitemoeshared', shared_width=width)


def _to_hf(config):
  layer, heads = config.layers[0], config.layers[0].mixer
  return {
    **llama.decoder_to_hf(config),
    **rope.to_hf(config.rope),
    'attention_bias': heads.qkv_bias,
    'attention_multiplier': heads.query_scale or heads.head_width**-0.5,
    'residual_multiplier': layer.residual_scale,
    'embedding_multiplier': config.embedding_scale,
    'logits_scaling': config.logit_divisor,
    'num_local_experts': layer.ffn.experts,
    'num_experts_per_tok': layer.ffn.router.choices,
  }


GRANITE_MOE = Family(
  model_type='granitemoe',
  architecture='GraniteMoeForCausalLM',
  prefix='model.',
  rows=ROWS,
  others=(Layout(rows=IN_MEMORY),),
  config_from_hf=lambda hf: _from_hf(hf, 'granitemoe'),
  config_to_hf=_to_hf,
  kinds=(AttentionConfig, RoutedConfig),
)
GRANITE_MOE_SHARED = dataclasses.replace(
  GRANITE_MOE,
  model_type='granitemoeshared',
  architecture='GraniteMoeSharedForCausalLM',
  config_from_hf=_shared_from_hf,
  config_to_hf=lambda config: {
    **_to_hf(config),
    'shared_intermediate_size': config.layers[0].ffn.shared_width,
  },
)
