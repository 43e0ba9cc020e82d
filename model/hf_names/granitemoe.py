"""Granite-MoE, without and with a shared expert: Granite with experts.

The experts of a layer are one tensor. transformers: models/granitemoe, granitemoeshared (5.24).
"""

import dataclasses

from model.hf_names import fields, granite, llama, moe
from model.hf_names.family import TRANSPOSE, Family, Layout, Row
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import RoutedConfig

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
  fields.refuse(hf, 'norm_topk_prob', True, None)
  layers = granite.blocks(hf)
  router = {'score': 'softmax_of_chosen'}
  width = layers[0].ffn.width
  experts = moe.routed(hf, experts=8, choices=2, width=width, router=router, **shared)
  return granite.decoder(hf, family, moe.everywhere(layers, experts))


def _shared_from_hf(hf):
  width = fields.integer(hf, 'shared_intermediate_size', 0)
  return _from_hf(hf, 'granitemoeshared', shared_width=width)


def _to_hf(config):
  layer = config.layers[0]
  return {
    **granite.to_hf(config),
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
