"""Qwen3-MoE: Qwen3 with experts in all layers but those that config.json names.

transformers: models/qwen3_moe (5.24).
"""

from model.hf_names import fields, llama, moe, qwen3, rope
from model.hf_names.family import TRANSPOSE, Family, Layout, Row
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import RoutedConfig

DEFAULTS = llama.Defaults(
  vocab_size=151936,
  width=2048,
  ffn_width=6144,
  layers=24,
  kv_heads=4,
  max_positions=32768,
  bos=None,
  eos=None,
)
EXPERTS = 'model.layers.{l}.mlp.experts'
NAMES = ('gate_proj', 'up_proj', 'down_proj')
COMMON = (*qwen3.ROWS, Row('model.layers.{l}.mlp.gate', moe.ROUTER, TRANSPOSE))


def _from_hf(hf):
  llama.only_whole_heads(hf)
  biased = fields.flag(hf, 'attention_bias', False)
  window = fields.flag(hf, 'use_sliding_window', False) or None
  window = window and fields.size_or_null(hf, 'sliding_window', 4096)
  mixer = {'qk_norm': True, 'qkv_bias': biased, 'output_bias': biased, 'window': window}
  experts = moe.routed(
    hf,
    experts=128,
    choices=8,
    width=fields.size(hf, 'moe_intermediate_size', 768),
    router={'renormalize': fields.flag(hf, 'norm_topk_prob', False)},
  )
  layers = moe.sparse(hf, llama.blocks(hf, DEFAULTS, mixer=mixer), experts)
  return llama.decoder(hf, 'qwen3_moe', DEFAULTS, layers)


def _to_hf(config):
  experts, mixer = moe.first(config), config.layers[0].mixer
  return {
    **llama.decoder_to_hf(config),
    **rope.to_hf(config.rope),
    **moe.sparse_to_hf(config, DEFAULTS.ffn_width),
    'attention_bias': mixer.qkv_bias,
    'use_sliding_window': mixer.window is not None,
    'sliding_window': mixer.window,
    'num_experts': experts.experts,
    'num_experts_per_tok': experts.router.choices,
    'moe_intermediate_size': experts.width,
    'norm_topk_prob': experts.router.renormalize,
  }


QWEN3_MOE = Family(
  model_type='qwen3_moe',
  architecture='Qwen3MoeForCausalLM',
  prefix='model.',
  rows=(*COMMON, *moe.one_by_one(EXPERTS, NAMES)),
  others=(Layout(rows=(*COMMON, *moe.fused(EXPERTS))),),
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
  kinds=(AttentionConfig, FeedForwardConfig, RoutedConfig),
)
