"""GPT-NeoX and Pythia: parallel blocks, layer norms, queries, keys and values interleaved by head.

transformers: models/gpt_neox (5.23).
"""

from model.config import ModelConfig
from model.hf_names import fields, rope
from model.hf_names.family import INTERLEAVED, TRANSPOSE, Family, Row
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig

_QKV = tuple(f'layers.{{l}}.attention.{part}' for part in ('query', 'key', 'value'))
ROWS = (
  Row('gpt_neox.embed_in', ('embedding',)),
  Row('gpt_neox.layers.{l}.input_layernorm', ('layers.{l}.attention_norm',)),
  Row('gpt_neox.layers.{l}.attention.query_key_value', _QKV, INTERLEAVED),
  Row('gpt_neox.layers.{l}.attention.dense', ('layers.{l}.attention.output',), TRANSPOSE),
  Row('gpt_neox.layers.{l}.post_attention_layernorm', ('layers.{l}.ffn_norm',)),
  Row('gpt_neox.layers.{l}.mlp.dense_h_to_4h', ('layers.{l}.ffn.up',), TRANSPOSE),
  Row('gpt_neox.layers.{l}.mlp.dense_4h_to_h', ('layers.{l}.ffn.down',), TRANSPOSE),
  Row('gpt_neox.final_layer_norm', ('final_norm',)),
  Row('embed_out', ('head',), TRANSPOSE),
)


def _from_hf(hf):
  width = fields.size(hf, 'hidden_size', 6144)
  max_positions = fields.size(hf, 'max_position_embeddings', 2048)
  vocab_size = fields.size(hf, 'vocab_size', 50432)
  return ModelConfig(
    family='gpt_neox',
    vocab_size=vocab_size,
    width=width,
    layers=(_block(hf, width),) * fields.size(hf, 'num_hidden_layers', 44),
    max_positions=max_positions,
    norm='layer',
    norm_eps=fields.number(hf, 'layer_norm_eps', 1e-5),
    rope=rope.from_hf(hf, max_positions, theta_key='rotary_emb_base'),
    tied=fields.flag(hf, 'tie_word_embeddings', False),
    **fields.tokens(hf, 0, 2, vocab_size=vocab_size),
  )


def _block(hf, width):
  heads = fields.size(hf, 'num_attention_heads', 64)
  if width % heads:
    raise ValueError(
      f'hidden_size {width} in config.json is no multiple of num_attention_heads {heads}'
    )
  fraction = fields.number(hf, 'rotary_pct', 0.25)
  fraction = fields.number(rope.parameters(hf), 'partial_rotary_factor', fraction)
  biased = fields.flag(hf, 'attention_bias', True)
  return LayerConfig(
    mixer=AttentionConfig(
      query_heads=heads,
      kv_heads=heads,
      head_width=width // heads,
      rotary_width=rope.rotary_width(width // heads, fraction),
      qkv_bias=biased,
      output_bias=biased,
    ),
    ffn=FeedForwardConfig(
      width=fields.size(hf, 'intermediate_size', 24576),
      activation=fields.activation(hf, 'hidden_act', 'gelu'),
      gated=False,
      bias=True,
    ),
    parallel=fields.flag(hf, 'use_parallel_residual', True),
  )


def _to_hf(config):
  layer, heads = config.layers[0], config.layers[0].mixer
  fraction = rope.rotary_fraction(heads.head_width, heads.rotary_width)
  return {
    'vocab_size': config.vocab_size,
    'hidden_size': config.width,
    'intermediate_size': layer.ffn.width,
    'num_hidden_layers': len(config.layers),
    'num_attention_heads': heads.query_heads,
    'hidden_act': fields.activation_name(layer.ffn.activation),
    'max_position_embeddings': config.max_positions,
    'layer_norm_eps': config.norm_eps,
    'rotary_pct': fraction,
    **rope.to_hf(config.rope, theta_key='rotary_emb_base', partial_rotary_factor=fraction),
    'attention_bias': heads.qkv_bias,
    'use_parallel_residual': layer.parallel,
    'tie_word_embeddings': config.tied,
  }


GPT_NEOX = Family(
  model_type='gpt_neox',
  architecture='GPTNeoXForCausalLM',
  prefix='gpt_neox.',
  rows=ROWS,
  ignored=(r'\.attention\.bias$',),
  aliases={'lm_head.weight': 'embed_out.weight'},  # its name in memory since transformers 5
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
)
