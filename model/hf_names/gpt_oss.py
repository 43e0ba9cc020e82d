"""gpt-oss: attention sinks, windows on every other layer, experts with biases and limited gates.

An expert computes down((up + 1) * gate * sigmoid(1.702 gate)), with gate at most 7 and up within 7
on both sides. Gate and up alternate in one tensor [E, D, 2 I]. On the hub the weights of experts
are MXFP4: `gate_up_proj_blocks` [E, 2 I, D / 32, 16] of two codes a byte, the even one in the low
half, and `gate_up_proj_scales` [E, 2 I, D / 32] of exponents plus 127. These are the bytes of
`ops.quantized` in another order, so nothing is rounded. After OpenAI (2025),
https://arxiv.org/abs/2508.10925. transformers: models/gpt_oss, integrations/mxfp4 (5.24).
"""

from model.hf_names import fields, llama, moe, rope
from model.hf_names.family import BARE, PLAIN, TRANSPOSE, Codec, Family, Layout, Row
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import RoutedConfig

DEFAULTS = llama.Defaults(
  vocab_size=201088,
  width=2880,
  ffn_width=2880,
  layers=36,
  heads=64,
  kv_heads=8,
  head_width=64,
  max_positions=131072,
  eps=1e-5,
  bos=None,
  eos=None,
)
THETA, WINDOW = 150000.0, 128
YARN = {
  'rope_type': 'yarn',
  'factor': 32.0,
  'beta_fast': 32.0,
  'beta_slow': 1.0,
  'truncate': False,
  'original_max_position_embeddings': 4096,
}
ALPHA = 1.702  # of the activation that is called quick_gelu
ALTERNATING = Codec(alternating=True)
CODES = Codec(transpose=True, alternating=True, block=16, raw=True)
SCALES = Codec(transpose=True, alternating=True, raw=True)
EXPERTS = 'model.layers.{l}.mlp.experts'
PAIR = (moe.GATE, moe.UP)
COMMON = (
  *moe.without_dense(llama.ROWS),
  Row('model.layers.{l}.self_attn.sinks', ('layers.{l}.attention.sinks',), PLAIN, BARE),
  Row('model.layers.{l}.mlp.router', moe.ROUTER, TRANSPOSE),
)


def _experts(name: str, ours: tuple[str, ...], codec: Codec, **leaves: str) -> Row:
  return Row(f'{EXPERTS}.{name}', ours, codec, leaves, stacked=True)


ROWS = (
  *COMMON,
  _experts('gate_up_proj', PAIR, ALTERNATING, **BARE),
  _experts('down_proj', (moe.DOWN,), PLAIN, **BARE),
)
MXFP4_ROWS = (
  *COMMON,
  _experts('gate_up_proj_bias', PAIR, ALTERNATING, bias=''),
  _experts('gate_up_proj_blocks', PAIR, CODES, **{'weight.values': ''}),
  _experts('gate_up_proj_scales', PAIR, SCALES, **{'weight.scales': ''}),
  _experts('down_proj_bias', (moe.DOWN,), PLAIN, bias=''),
  _experts('down_proj_blocks', (moe.DOWN,), CODES, **{'weight.values': ''}),
  _experts('down_proj_scales', (moe.DOWN,), SCALES, **{'weight.scales': ''}),
)
MXFP4_KEYS = {
  'quantization_config': {
    'quant_method': 'mxfp4',
    'modules_to_not_convert': [
      *('model.layers.*.self_attn', 'model.layers.*.mlp.router', 'model.embed_tokens', 'lm_head')
    ],
  }
}


def _from_hf(hf):
  llama.only_whole_heads(hf)
  fields.refuse(hf, 'hidden_act', 'silu')
  fields.refuse(hf, 'swiglu_alpha', ALPHA)
  fields.refuse(hf, 'norm_topk_prob', True, None)
  hf = {'rope_theta': THETA, **hf, **({} if rope.parameters(hf) else {'rope_parameters': YARN})}
  biased = fields.flag(hf, 'attention_bias', True)
  mixer = {'qkv_bias': biased, 'output_bias': biased, 'sinks': True}
  layers = llama.blocks(hf, DEFAULTS, mixer=mixer)
  experts = moe.routed(
    hf,
    experts=128,
    choices=4,
    width=layers[0].ffn.width,
    router={'score': 'softmax_of_chosen'},
    activation='quick_gelu',
    bias=True,
    router_bias=True,
    limit=fields.positive(hf, 'swiglu_limit', 7.0),
    up_offset=1.0,
  )
  window = fields.size_or_null(hf, 'sliding_window', WINDOW)
  windows = fields.windows(hf, [l % 2 == 0 for l in range(len(layers))], window)
  layers = llama.windowed(moe.everywhere(layers, experts), windows)
  return llama.decoder(hf, 'gpt_oss', DEFAULTS, layers)


def _to_hf(config):
  layer = config.layers[0]
  return {
    **llama.decoder_to_hf(config),
    **rope.to_hf(config.rope),
    'hidden_act': 'silu',
    'swiglu_alpha': ALPHA,
    'swiglu_limit': layer.ffn.limit,
    'attention_bias': layer.mixer.qkv_bias,
    # transformers needs a window even if no layer slides.
    'sliding_window': fields.first_window(config.layers) or WINDOW,
    'layer_types': fields.layer_types(config.layers),
    'num_local_experts': layer.ffn.experts,
    'num_experts_per_tok': layer.ffn.router.choices,
  }


GPT_OSS = Family(
  model_type='gpt_oss',
  architecture='GptOssForCausalLM',
  prefix='model.',
  rows=ROWS,
  others=(Layout(rows=MXFP4_ROWS, format='mxfp4', keys=MXFP4_KEYS),),
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
  kinds=(AttentionConfig, RoutedConfig),
)
