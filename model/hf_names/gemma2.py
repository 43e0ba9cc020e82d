"""Gemma 2: norms before and after each half of a block, soft caps, windows on every other layer.

Norm scales are stored minus one, and embeddings are multiplied by the square root of the width.
transformers: models/gemma2 (5.23).
"""

from model.hf_names import fields, llama, rope
from model.hf_names.family import Family, Row

DEFAULTS = llama.Defaults(
  vocab_size=256000,
  width=2304,
  ffn_width=9216,
  layers=26,
  heads=8,
  kv_heads=4,
  head_width=256,
  max_positions=8192,
  tied=True,
  bos=2,
  eos=1,
  pad=0,
  activation_key='hidden_activation',
  activation='gelu_pytorch_tanh',
)
WINDOW = 4096
# Llama's name of the norm before the feed-forward is Gemma 2's name of the norm after attention.
_NORMS = (
  Row('model.layers.{l}.post_attention_layernorm', ('layers.{l}.attention_post_norm',)),
  Row('model.layers.{l}.pre_feedforward_layernorm', ('layers.{l}.ffn_norm',)),
  Row('model.layers.{l}.post_feedforward_layernorm', ('layers.{l}.ffn_post_norm',)),
)
ROWS = (*(row for row in llama.ROWS if row.ours != ('layers.{l}.ffn_norm',)), *_NORMS)


def _from_hf(hf):
  llama.only_whole_heads(hf)
  fields.refuse(hf, 'use_bidirectional_attention', False, None)
  biased = fields.flag(hf, 'attention_bias', False)
  mixer = {
    'query_scale': fields.size(hf, 'query_pre_attn_scalar', 256) ** -0.5,
    'softcap': fields.number_or_null(hf, 'attn_logit_softcapping', 50.0),
    'qkv_bias': biased,
    'output_bias': biased,
  }
  layers = llama.blocks(hf, DEFAULTS, mixer=mixer, post_norms=True)
  window = fields.size_or_null(hf, 'sliding_window', WINDOW)
  slides = [l % 2 == 0 for l in range(len(layers))]
  return llama.decoder(
    hf,
    'gemma2',
    DEFAULTS,
    llama.windowed(layers, fields.windows(hf, slides, window)),
    norm_offset=1.0,
    embedding_scale=fields.size(hf, 'hidden_size', DEFAULTS.width) ** 0.5,
    logit_softcap=fields.number_or_null(hf, 'final_logit_softcapping', 30.0),
  )


def _to_hf(config):
  llama.require_divisible(config)
  heads = config.layers[0].mixer
  scale = heads.query_scale or heads.head_width**-0.5
  return {
    **llama.decoder_to_hf(config, DEFAULTS.activation_key),
    **rope.to_hf(config.rope),
    'attention_bias': heads.qkv_bias,
    'query_pre_attn_scalar': max(1, round(scale**-2)),
    'attn_logit_softcapping': heads.softcap,
    'final_logit_softcapping': config.logit_softcap,
    # transformers needs a window even if no layer slides.
    'sliding_window': fields.first_window(config.layers) or WINDOW,
    'layer_types': fields.layer_types(config.layers),
  }


GEMMA2 = Family(
  model_type='gemma2',
  architecture='Gemma2ForCausalLM',
  prefix='model.',
  rows=ROWS,
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
  bos_in_windows=True,
)
