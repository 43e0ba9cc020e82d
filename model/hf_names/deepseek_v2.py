"""DeepSeek-V2: latent attention, experts in groups, and shared experts that all tokens go through.

The last elements of each head rotate in neighbouring pairs, (2i, 2i + 1), and are brought to halves
here, so that the same rope serves all families. YaRN's mscale, squared, multiplies the scores. The
latents have RMS norms with an epsilon of their own. After DeepSeek-AI (2024),
https://arxiv.org/abs/2405.04434. transformers: models/deepseek_v2 (5.24).

Differs from the authors' code in what transformers leaves out: `norm_topk_prob` is refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.hf_names import fields, llama, moe, qwen3_moe, rope
from model.hf_names.family import CHOICE_BIAS, INTERLEAVED, TRANSPOSE, Codec, Family, Layout, Row
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.latent import LatentConfig
from model.layers.routed import RoutedConfig
from ops.rope import RopeConfig

DEFAULTS = llama.Defaults(vocab_size=102400)
QUERY_RANK, FIRST_DENSE, CHOICES = 1536, 0, 6
GREEDY, LIMITED = 'greedy', 'group_limited_greedy'  # values of topk_method
ATTENTION, MLP = 'model.layers.{l}.self_attn', 'model.layers.{l}.mlp'
OURS = 'layers.{l}.attention'


def _of_queries(mixer: LatentConfig) -> Codec:
  return Codec(transpose=True, tail=(mixer.head_width, mixer.rotary_width))


def _of_latents(mixer: LatentConfig) -> Codec:
  return Codec(transpose=True, tail=(mixer.rank + mixer.rotary_width, mixer.rotary_width))


COMMON = (
  *(row for row in llama.ROWS if '.self_attn.' not in row.theirs),
  Row(f'{ATTENTION}.q_proj', (f'{OURS}.query',), _of_queries),
  Row(f'{ATTENTION}.q_a_proj', (f'{OURS}.query_down',), TRANSPOSE),
  Row(f'{ATTENTION}.q_a_layernorm', (f'{OURS}.query_norm',)),
  Row(f'{ATTENTION}.q_b_proj', (f'{OURS}.query_up',), _of_queries),
  Row(f'{ATTENTION}.kv_a_proj_with_mqa', (f'{OURS}.kv_down', f'{OURS}.rotary_key'), _of_latents),
  Row(f'{ATTENTION}.kv_a_layernorm', (f'{OURS}.kv_norm',)),
  Row(f'{ATTENTION}.kv_b_proj', (f'{OURS}.key_up', f'{OURS}.value_up'), INTERLEAVED),
  Row(f'{ATTENTION}.o_proj', (f'{OURS}.output',), TRANSPOSE),
  Row(f'{MLP}.gate', moe.ROUTER, TRANSPOSE),
  Row(f'{MLP}.gate', ('layers.{l}.ffn',), leaves=CHOICE_BIAS),
  Row(f'{MLP}.shared_experts.gate_proj', ('layers.{l}.ffn.shared.gate',), TRANSPOSE),
  Row(f'{MLP}.shared_experts.up_proj', ('layers.{l}.ffn.shared.up',), TRANSPOSE),
  Row(f'{MLP}.shared_experts.down_proj', ('layers.{l}.ffn.shared.down',), TRANSPOSE),
)


def mixer(hf: dict, defaults: llama.Defaults, own_rope: RopeConfig) -> LatentConfig:
  """The heads and latents of a layer; the rope is the model's."""
  llama.only_whole_heads(hf)
  heads = fields.size(hf, 'num_attention_heads', defaults.heads)
  fields.refuse(hf, 'num_key_value_heads', heads, None)
  rank = fields.size_or_null(hf, 'q_lora_rank', QUERY_RANK)
  biased = fields.flag(hf, 'attention_bias', False)
  if biased and rank is None:
    raise ValueError(
      'attention_bias in config.json with a q_lora_rank of null is not supported: keys would '
      'have a bias and queries none'
    )
  config = LatentConfig(
    query_heads=heads,
    kv_heads=heads,
    still_width=fields.size(hf, 'qk_nope_head_dim', 128),
    rotary_width=fields.size(hf, 'qk_rope_head_dim', 64),
    value_width=fields.size(hf, 'v_head_dim', 128),
    rank=fields.size(hf, 'kv_lora_rank', 512),
    query_rank=rank,
    qkv_bias=biased,
    output_bias=biased,
  )
  scale = mscale(own_rope) ** 2 * config.head_width**-0.5
  return config if mscale(own_rope) == 1 else dataclasses.replace(config, query_scale=scale)


def mscale(own_rope: RopeConfig) -> float:
  """What YaRN multiplies queries and keys by, those that do not rotate included."""
  if own_rope.kind != 'yarn' or not own_rope.mscale_all_dim or own_rope.factor <= 1:
    return 1.0
  return 0.1 * own_rope.mscale_all_dim * math.log(own_rope.factor) + 1


def decoder(
  hf: dict, family: str, defaults: llama.Defaults, experts: RoutedConfig, first_dense: int
) -> ModelConfig:
  """The config of a model; `first_dense` is the default number of layers without experts."""
  max_positions = fields.size(hf, 'max_position_embeddings', defaults.max_positions)
  own_rope = rope.from_hf(hf, max_positions)
  dense = FeedForwardConfig(
    width=fields.size(hf, 'intermediate_size', defaults.ffn_width), activation=experts.activation
  )
  count = fields.size(hf, 'num_hidden_layers', defaults.layers)
  first = fields.integer(hf, 'first_k_dense_replace', first_dense)
  heads = mixer(hf, defaults, own_rope)
  layers = tuple(
    LayerConfig(mixer=heads, ffn=dense if l < first else experts) for l in range(count)
  )
  return llama.decoder(hf, family, defaults, layers, rope=own_rope)


def experts(
  hf: dict,
  *,
  count: int,
  choices: int,
  width: int,
  shared: int,
  router: Mapping[str, Any],
  **traits,
) -> RoutedConfig:
  """The experts of a layer. `count`, `choices`, `width` and `shared` are defaults."""
  fields.refuse(hf, 'moe_layer_freq', 1)
  scale = fields.positive(hf, 'routed_scaling_factor', router['scale'])
  width = fields.size(hf, 'moe_intermediate_size', width)
  return moe.routed(
    {key: value for key, value in hf.items() if key not in moe.ABSENT},
    experts=count,
    choices=choices,
    width=width,
    router={**router, 'scale': scale},
    shared_width=width * fields.size(hf, 'n_shared_experts', shared),
    **traits,
  )


def _from_hf(hf):
  fields.refuse(hf, 'scoring_func', 'softmax')
  fields.refuse(hf, 'norm_topk_prob', False, None)  # transformers ignores it
  fields.refuse(hf, 'mlp_bias', False)
  fields.refuse(hf, 'topk_method', GREEDY, LIMITED, None)
  router = {'scale': 1.0}
  if hf.get('topk_method') == LIMITED:
    router['groups'] = fields.size(hf, 'n_group', 1)
    router['group_limit'] = fields.size(hf, 'topk_group', 1)
  own = experts(hf, count=64, choices=CHOICES, width=1407, shared=2, router=router)
  return decoder(hf, 'deepseek_v2', DEFAULTS, own, FIRST_DENSE)


def to_hf(config: ModelConfig, defaults: llama.Defaults) -> dict:
  """The keys that `decoder` and `experts` read."""
  heads, own = config.layers[0].mixer, moe.first(config)
  dense = [layer.ffn for layer in config.layers if not isinstance(layer.ffn, RoutedConfig)]
  return {
    **_stream_to_hf(config),
    **rope.to_hf(config.rope),
    'num_attention_heads': heads.query_heads,
    'num_key_value_heads': heads.kv_heads,
    'qk_nope_head_dim': heads.still_width,
    'qk_rope_head_dim': heads.rotary_width,
    'v_head_dim': heads.value_width,
    'kv_lora_rank': heads.rank,
    'q_lora_rank': heads.query_rank,
    'attention_bias': heads.qkv_bias,
    'intermediate_size': dense[0].width if dense else defaults.ffn_width,
    'first_k_dense_replace': len(dense),
    'n_routed_experts': own.experts,
    'num_experts_per_tok': own.router.choices,
    'moe_intermediate_size': own.width,
    'n_shared_experts': own.shared_width // own.width,
    'routed_scaling_factor': own.router.scale,
  }


def _stream_to_hf(config):
  return {
    'hidden_size': config.width,
    'num_hidden_layers': len(config.layers),
    'hidden_act': fields.activation_name(moe.first(config).activation),
    'max_position_embeddings': config.max_positions,
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tied,
  }


def _to_hf(config):
  router = moe.first(config).router
  limited = router.groups > 1
  return {
    **to_hf(config, DEFAULTS),
    'scoring_func': 'softmax',
    'topk_method': LIMITED if limited else GREEDY,
    'n_group': router.groups if limited else None,
    'topk_group': router.open_groups if limited else None,
    'norm_topk_prob': False,
    'mlp_bias': False,
  }


DEEPSEEK_V2 = Family(
  model_type='deepseek_v2',
  architecture='DeepseekV2ForCausalLM',
  prefix='model.',
  rows=(*COMMON, *moe.one_by_one(qwen3_moe.EXPERTS, qwen3_moe.NAMES)),
  others=(Layout(rows=(*COMMON, *moe.fused(qwen3_moe.EXPERTS))),),
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
  kinds=(LatentConfig, FeedForwardConfig, RoutedConfig),
)
