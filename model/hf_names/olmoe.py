"""OLMoE: experts in all layers, and RMS norms over the queries and the keys of all heads together.

`intermediate_size` is the width of an expert. transformers: models/olmoe (5.24).
"""

from model.config import ModelConfig
from model.hf_names import fields, llama, moe, qwen3, qwen3_moe, rope
from model.hf_names.family import TRANSPOSE, Family, Layout, Row
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import RoutedConfig

DEFAULTS = llama.Defaults(
  vocab_size=50304,
  width=2048,
  ffn_width=2048,
  layers=16,
  heads=16,
  max_positions=4096,
  eps=1e-5,
  bos=None,
  eos=50279,
  pad=1,
)
EXPERTS = qwen3_moe.EXPERTS
COMMON = (
  *moe.without_dense(qwen3.ROWS),
  Row('model.layers.{l}.mlp.gate', moe.ROUTER, TRANSPOSE),
)


def _from_hf(hf):
  llama.only_whole_heads(hf)
  fields.refuse(hf, 'clip_qkv', None)
  biased = fields.flag(hf, 'attention_bias', False)
  mixer = {'qk_norm': True, 'qk_norm_over': 'all', 'qkv_bias': biased, 'output_bias': biased}
  layers = llama.blocks(hf, DEFAULTS, mixer=mixer)
  experts = moe.routed(
    hf,
    experts=64,
    choices=8,
    width=layers[0].ffn.width,
    router={'renormalize': fields.flag(hf, 'norm_topk_prob', False)},
  )
  config = llama.decoder(hf, 'olmoe', DEFAULTS, moe.everywhere(layers, experts))
  _check_heads(config)
  return config


def _check_heads(config: ModelConfig) -> None:
  """Raises ValueError where transformers gives the norm of the queries another width."""
  heads = config.layers[0].mixer
  if heads.query_heads * heads.head_width != config.width:
    raise ValueError(
      f'an olmoe has heads of hidden_size / num_attention_heads elements, but head_dim is '
      f'{heads.head_width} for {heads.query_heads} heads and a hidden_size of {config.width}'
    )


def _to_hf(config):
  _check_heads(config)
  experts = moe.first(config)
  return {
    **llama.decoder_to_hf(config),
    **rope.to_hf(config.rope),
    'attention_bias': config.layers[0].mixer.qkv_bias,
    'num_experts': experts.experts,
    'num_experts_per_tok': experts.router.choices,
    'norm_topk_prob': experts.router.renormalize,
  }


OLMOE = Family(
  model_type='olmoe',
  architecture='OlmoeForCausalLM',
  prefix='model.',
  rows=(*COMMON, *moe.one_by_one(EXPERTS, qwen3_moe.NAMES)),
  others=(Layout(rows=(*COMMON, *moe.fused(EXPERTS))),),
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
  kinds=(AttentionConfig, RoutedConfig),
)
