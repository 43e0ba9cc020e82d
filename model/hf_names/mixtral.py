"""Mixtral: Mistral with routed feed-forward layers.

transformers: models/mixtral (5.24). The coefficient of its balance loss and the noise of its router
matter to training alone, and are not read.
"""

import dataclasses

from model.hf_names import fields, llama, moe, rope
from model.hf_names.family import TRANSPOSE, Family, Layout, Row
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import RoutedConfig

DEFAULTS = dataclasses.replace(llama.MISTRAL_DEFAULTS, eps=1e-5)
THETA = 1e6
COMMON = moe.without_dense(llama.ROWS)
MOE, MLP = 'model.layers.{l}.block_sparse_moe', 'model.layers.{l}.mlp'
ROWS = (
  *COMMON,
  Row(f'{MOE}.gate', moe.ROUTER, TRANSPOSE),
  *moe.one_by_one(f'{MOE}.experts', ('w1', 'w3', 'w2')),
)
FUSED = (
  *COMMON,
  Row(f'{MLP}.gate', moe.ROUTER, TRANSPOSE),
  *moe.fused(f'{MLP}.experts'),
)


def _from_hf(hf):
  llama.only_whole_heads(hf)
  fields.refuse(hf, 'norm_topk_prob', True, None)
  window = fields.size_or_null(hf, 'sliding_window', None)
  layers = llama.blocks(hf, DEFAULTS, mixer={'window': window})
  router = {'renormalize': True}
  experts = moe.routed(hf, experts=8, choices=2, width=layers[0].ffn.width, router=router)
  layers = moe.everywhere(layers, experts)
  return llama.decoder({'rope_theta': THETA, **hf}, 'mixtral', DEFAULTS, layers)


def _to_hf(config):
  layer = config.layers[0]
  return {
    **llama.decoder_to_hf(config),
    **rope.to_hf(config.rope),
    'sliding_window': layer.mixer.window,
    'num_local_experts': layer.ffn.experts,
    'num_experts_per_tok': layer.ffn.router.choices,
  }


MIXTRAL = Family(
  model_type='mixtral',
  architecture='MixtralForCausalLM',
  prefix='model.',
  rows=ROWS,
  others=(Layout(rows=FUSED),),
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
  kinds=(AttentionConfig, RoutedConfig),
)
