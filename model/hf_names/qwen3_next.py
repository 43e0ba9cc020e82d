"""Qwen3-Next: gated DeltaNet in three of four layers, gated attention in the fourth, and experts.

The file keeps the projections of a DeltaNet layer together, key head by key head: `in_proj_qkvz`
has the query, the key, the values and the gates of one key head, then those of the next, and
`in_proj_ba` the strengths and the decays of its value heads. `q_proj` of attention has the query
and the gate of each head. The layers that predict further tokens (`mtp`) are not read.

transformers: models/qwen3_next (5.24).
"""

import dataclasses

from model.config import ModelConfig
from model.hf_names import fields, llama, moe, qwen2_moe, qwen3_moe, rope
from model.hf_names.family import DEPTHWISE, INTERLEAVED, TRANSPOSE, Family, Heads, Layout, Row
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.delta import GatedDeltaConfig
from model.layers.routed import RoutedConfig
from model.layers.sublayer import MixerConfig

DEFAULTS = llama.Defaults(
  vocab_size=151936,
  width=2048,
  ffn_width=5632,
  layers=48,
  heads=16,
  kv_heads=2,
  head_width=256,
  max_positions=32768,
  bos=None,
  eos=None,
)
PERIOD = 4  # the last layer of so many has attention
ROTATED = 0.25  # of a head
FULL, LINEAR = 'full_attention', 'linear_attention'
DELTA = GatedDeltaConfig(key_heads=16, value_heads=32, key_width=128, value_width=128)
# The fields of DeltaNet, and their keys.
SIZES = {
  'key_heads': 'linear_num_key_heads',
  'value_heads': 'linear_num_value_heads',
  'key_width': 'linear_key_head_dim',
  'value_width': 'linear_value_head_dim',
  'conv_width': 'linear_conv_kernel_dim',
}


def _ours(*names: str) -> tuple[str, ...]:
  return tuple(f'layers.{{l}}.attention.{name}' for name in names)


def _attention(theirs: str, names: tuple[str, ...], *codec) -> Row:
  return Row(f'model.layers.{{l}}.self_attn.{theirs}', _ours(*names), *codec, kind=AttentionConfig)


def _delta(theirs: str, names: tuple[str, ...], *codec, **leaves) -> Row:
  place = f'model.layers.{{l}}.linear_attn.{theirs}'
  return Row(place, _ours(*names), *codec, kind=GatedDeltaConfig, **leaves)


COMMON = (
  *(row for row in qwen2_moe.COMMON if '.self_attn.' not in row.theirs),
  _attention('q_proj', ('query', 'gate'), INTERLEAVED),
  _attention('k_proj', ('key',), TRANSPOSE),
  _attention('v_proj', ('value',), TRANSPOSE),
  _attention('o_proj', ('output',), TRANSPOSE),
  _attention('q_norm', ('query_norm',)),
  _attention('k_norm', ('key_norm',)),
  _delta('in_proj_qkvz', ('query', 'key', 'value', 'gate'), INTERLEAVED),
  _delta('in_proj_ba', ('strength', 'decay'), INTERLEAVED, leaves={'weight': '.weight'}),
  _delta('dt_bias', ('decay',), leaves={'bias': ''}),
  _delta('A_log', ('rates',), leaves={'log_rate': ''}),
  _delta(
    'conv1d', ('query_conv', 'key_conv', 'value_conv'), DEPTHWISE, leaves={'kernel': '.weight'}
  ),
  _delta('norm', ('head_norm',)),
  _delta('out_proj', ('output',), TRANSPOSE),
)


def _from_hf(hf):
  if fields.activation(hf, 'hidden_act', 'silu') != 'silu':
    raise ValueError(
      f'hidden_act = {hf["hidden_act"]!r} in config.json is not supported here; supported: silu'
    )
  biased = fields.flag(hf, 'attention_bias', False)
  fraction = fields.number(hf, 'partial_rotary_factor', ROTATED)
  fraction = fields.number(rope.parameters(hf), 'partial_rotary_factor', fraction)
  head_width = fields.size(hf, 'head_dim', DEFAULTS.head_width)
  mixer = {
    'rotary_width': rope.rotary_width(head_width, fraction),
    'qkv_bias': biased,
    'output_bias': biased,
    'qk_norm': True,
    'gated': True,
  }
  experts = moe.routed(
    hf,
    experts=512,
    choices=10,
    width=fields.size(hf, 'moe_intermediate_size', 512),
    router={'renormalize': fields.flag(hf, 'norm_topk_prob', True)},
    shared_width=fields.size(hf, 'shared_expert_intermediate_size', 512),
    shared_gate=True,
  )
  layers = moe.sparse(hf, llama.blocks(hf, DEFAULTS, mixer=mixer), experts)
  return llama.decoder(hf, 'qwen3_next', DEFAULTS, _mixed(hf, layers), norm_offset=1.0)


def _mixed(hf, layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
  """The layers, those without attention with a DeltaNet in its place."""
  sizes = {name: fields.size(hf, key, getattr(DELTA, name)) for name, key in SIZES.items()}
  period, types = fields.size(hf, 'full_attention_interval', PERIOD), hf.get('layer_types')
  if types is None:
    types = [LINEAR if (l + 1) % period else FULL for l in range(len(layers))]
  if not isinstance(types, list) or any(kind not in (FULL, LINEAR) for kind in types):
    raise ValueError(f'layer_types = {types!r} in config.json; supported: {FULL}, {LINEAR}')
  if len(types) != len(layers):
    raise ValueError(
      f'layer_types in config.json has {len(types)} entries, but there are {len(layers)} layers'
    )
  delta = GatedDeltaConfig(**sizes)
  return tuple(
    layer if kind == FULL else dataclasses.replace(layer, mixer=delta)
    for layer, kind in zip(layers, types)
  )


def _to_hf(config: ModelConfig) -> dict:
  experts = moe.first(config)
  mixers = [layer.mixer for layer in config.layers]
  heads = next((m for m in mixers if isinstance(m, AttentionConfig)), _default_heads())
  delta = next((m for m in mixers if isinstance(m, GatedDeltaConfig)), DELTA)
  shape = config.replace(layers=(dataclasses.replace(config.layers[0], mixer=heads),))
  fraction = rope.rotary_fraction(heads.head_width, heads.rotary_width)
  partial = {'partial_rotary_factor': fraction}
  return {
    **llama.decoder_to_hf(shape),
    'num_hidden_layers': len(config.layers),
    **rope.to_hf(config.rope, **partial),
    **partial,
    **moe.sparse_to_hf(config, DEFAULTS.ffn_width),
    'attention_bias': heads.qkv_bias,
    'layer_types': [FULL if isinstance(m, AttentionConfig) else LINEAR for m in mixers],
    **{key: getattr(delta, name) for name, key in SIZES.items()},
    'num_experts': experts.experts,
    'num_experts_per_tok': experts.router.choices,
    'moe_intermediate_size': experts.width,
    'norm_topk_prob': experts.router.renormalize,
    'shared_expert_intermediate_size': experts.shared_width,
  }


def _default_heads() -> AttentionConfig:
  """What is written of attention where no layer has it."""
  return AttentionConfig(
    query_heads=DEFAULTS.heads,
    kv_heads=DEFAULTS.kv_heads,
    head_width=DEFAULTS.head_width,
    rotary_width=rope.rotary_width(DEFAULTS.head_width, ROTATED),
  )


def _heads(mixer: MixerConfig) -> Heads:
  if isinstance(mixer, AttentionConfig):
    return Heads(mixer.query_heads, mixer.head_width)
  return Heads(mixer.key_heads, mixer.key_width)


QWEN3_NEXT = Family(
  model_type='qwen3_next',
  architecture='Qwen3NextForCausalLM',
  prefix='model.',
  rows=(*COMMON, *moe.one_by_one(qwen3_moe.EXPERTS, qwen3_moe.NAMES)),
  others=(Layout(rows=(*COMMON, *moe.fused(qwen3_moe.EXPERTS))),),
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
  ignored=(r'^mtp\.',),
  kinds=(AttentionConfig, GatedDeltaConfig, FeedForwardConfig, RoutedConfig),
  heads=_heads,
)
