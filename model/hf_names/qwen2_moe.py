"""Qwen2-MoE (Qwen1.5-MoE): Qwen2 with experts, and a shared one behind a sigmoid gate.

transformers: models/qwen2_moe (5.24).
"""

import dataclasses

from model.hf_names import fields, llama, moe, qwen3_moe, rope
from model.hf_names.family import TRANSPOSE, Family, Layout, Row
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import RoutedConfig

DEFAULTS = dataclasses.replace(qwen3_moe.DEFAULTS, ffn_width=5632, heads=16, kv_heads=16)
LATE = 28  # the default of max_window_layers
EXPERTS = qwen3_moe.EXPERTS
MLP = 'model.layers.{l}.mlp'
SHARED = 'layers.{l}.ffn.shared'
COMMON = (
  *llama.ROWS,
  Row(f'{MLP}.gate', moe.ROUTER, TRANSPOSE),
  Row(f'{MLP}.shared_expert.gate_proj', (f'{SHARED}.gate',), TRANSPOSE),
  Row(f'{MLP}.shared_expert.up_proj', (f'{SHARED}.up',), TRANSPOSE),
  Row(f'{MLP}.shared_expert.down_proj', (f'{SHARED}.down',), TRANSPOSE),
  Row(f'{MLP}.shared_expert_gate', ('layers.{l}.ffn.shared_gate',), TRANSPOSE),
)


def _from_hf(hf):
  llama.only_whole_heads(hf)
  experts = moe.routed(
    hf,
    experts=60,
    choices=4,
    width=fields.size(hf, 'moe_intermediate_size', 1408),
    router={'renormalize': fields.flag(hf, 'norm_topk_prob', False)},
    shared_width=fields.size(hf, 'shared_expert_intermediate_size', 5632),
    shared_gate=True,
  )
  layers = llama.blocks(hf, DEFAULTS, mixer={'qkv_bias': fields.flag(hf, 'qkv_bias', True)})
  layers = _windowed(hf, moe.sparse(hf, layers, experts))
  return llama.decoder(hf, 'qwen2_moe', DEFAULTS, layers)


def _windowed(hf, layers):
  """Every other early layer slides, unless config.json names them."""
  if not fields.flag(hf, 'use_sliding_window', False):
    hf = {**hf, 'sliding_window': None}  # transformers writes 0
  window = fields.size_or_null(hf, 'sliding_window', 4096)
  last = fields.integer(hf, 'max_window_layers', LATE)
  slides = [window is not None and l % 2 == 0 and l < last for l in range(len(layers))]
  return llama.windowed(layers, fields.windows(hf, slides, window))


def _to_hf(config):
  experts, window = moe.first(config), fields.first_window(config.layers)
  return {
    **llama.decoder_to_hf(config),
    **rope.to_hf(config.rope),
    **moe.sparse_to_hf(config, DEFAULTS.ffn_width),
    'qkv_bias': config.layers[0].mixer.qkv_bias,
    'use_sliding_window': window is not None,
    'sliding_window': window,
    'max_window_layers': LATE,
    'layer_types': fields.layer_types(config.layers),
    'num_experts': experts.experts,
    'num_experts_per_tok': experts.router.choices,
    'moe_intermediate_size': experts.width,
    'norm_topk_prob': experts.router.renormalize,
    'shared_expert_intermediate_size': experts.shared_width,
  }


QWEN2_MOE = Family(
  model_type='qwen2_moe',
  architecture='Qwen2MoeForCausalLM',
  prefix='model.',
  rows=(*COMMON, *moe.one_by_one(EXPERTS, qwen3_moe.NAMES)),
  others=(Layout(rows=(*COMMON, *moe.fused(EXPERTS))),),
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
  kinds=(AttentionConfig, FeedForwardConfig, RoutedConfig),
)
