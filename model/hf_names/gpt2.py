"""GPT-2: learned positions, layer norms, matrices stored (inputs, outputs).

transformers: models/gpt2 (5.23).
"""

from model.config import ModelConfig
from model.hf_names import fields
from model.hf_names.family import TRANSPOSE, Family, Row
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig

_QKV = tuple(f'layers.{{l}}.attention.{part}' for part in ('query', 'key', 'value'))
ROWS = (
  Row('transformer.wte', ('embedding',)),
  Row('transformer.wpe', ('positions',)),
  Row('transformer.h.{l}.ln_1', ('layers.{l}.attention_norm',)),
  Row('transformer.h.{l}.attn.c_attn', _QKV),
  Row('transformer.h.{l}.attn.c_proj', ('layers.{l}.attention.output',)),
  Row('transformer.h.{l}.ln_2', ('layers.{l}.ffn_norm',)),
  Row('transformer.h.{l}.mlp.c_fc', ('layers.{l}.ffn.up',)),
  Row('transformer.h.{l}.mlp.c_proj', ('layers.{l}.ffn.down',)),
  Row('transformer.ln_f', ('final_norm',)),
  Row('lm_head', ('head',), TRANSPOSE),
)


def _from_hf(hf):
  fields.refuse(hf, 'add_cross_attention', False)
  width, vocab_size = fields.size(hf, 'n_embd', 768), fields.size(hf, 'vocab_size', 50257)
  return ModelConfig(
    family='gpt2',
    vocab_size=vocab_size,
    width=width,
    layers=_blocks(hf, width),
    max_positions=fields.size(hf, 'n_positions', 1024),
    norm='layer',
    norm_eps=fields.number(hf, 'layer_norm_epsilon', 1e-5),
    rope=None,
    tied=fields.flag(hf, 'tie_word_embeddings', True),
    **fields.tokens(hf, 50256, 50256, vocab_size=vocab_size),
  )


def _blocks(hf, width):
  heads = fields.size(hf, 'n_head', 12)
  if width % heads:
    raise ValueError(f'n_embd {width} in config.json is no multiple of n_head {heads}')
  layer = LayerConfig(
    mixer=AttentionConfig(
      query_heads=heads,
      kv_heads=heads,
      head_width=width // heads,
      qkv_bias=True,
      output_bias=True,
    ),
    ffn=FeedForwardConfig(
      width=fields.size_or_null(hf, 'n_inner', None) or 4 * width,
      activation=fields.activation(hf, 'activation_function', 'gelu_new'),
      gated=False,
      bias=True,
    ),
  )
  scaled = fields.flag(hf, 'scale_attn_weights', True)
  by_layer = fields.flag(hf, 'scale_attn_by_inverse_layer_idx', False)
  return tuple(
    layer.with_mixer(query_scale=_query_scale(layer.mixer, l, scaled, by_layer))
    for l in range(fields.size(hf, 'n_layer', 12))
  )


def _query_scale(heads, l, scaled, by_layer):
  if scaled and not by_layer:
    return None
  return (heads.head_width**-0.5 if scaled else 1.0) / (l + 1 if by_layer else 1)


def _to_hf(config):
  heads, ffn, last = config.layers[0].mixer, config.layers[0].ffn, config.layers[-1].mixer
  scales = [one.query_scale or one.head_width**-0.5 for one in (heads, last)]
  return {
    'vocab_size': config.vocab_size,
    'n_positions': config.max_positions,
    'n_embd': config.width,
    'n_layer': len(config.layers),
    'n_head': heads.query_heads,
    'n_inner': ffn.width,
    'activation_function': _ACTIVATION_NAMES.get(ffn.activation, ffn.activation),
    'layer_norm_epsilon': config.norm_eps,
    'scale_attn_weights': scales[0] == heads.head_width**-0.5,
    'scale_attn_by_inverse_layer_idx': scales[0] != scales[1],
    'tie_word_embeddings': config.tied,
  }


_ACTIVATION_NAMES = {'gelu_tanh': 'gelu_new'}
GPT2 = Family(
  model_type='gpt2',
  architecture='GPT2LMHeadModel',
  prefix='transformer.',
  rows=ROWS,
  ignored=(r'\.attn\.bias$',),
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
)
