"""Qwen3 (dense): Llama with RMS norms on each query and key head.

transformers: models/qwen3 (5.23).
"""

import dataclasses

from model.hf_names import fields, llama, qwen2, rope
from model.hf_names.family import Family, Row

DEFAULTS = dataclasses.replace(qwen2.DEFAULTS, head_width=128)
QK_NORMS = (
  Row('model.layers.{l}.self_attn.q_norm', ('layers.{l}.attention.query_norm',)),
  Row('model.layers.{l}.self_attn.k_norm', ('layers.{l}.attention.key_norm',)),
)
ROWS = (*llama.ROWS, *QK_NORMS)


def _from_hf(hf):
  llama.only_whole_heads(hf)
  biased = fields.flag(hf, 'attention_bias', False)
  mixer = {'qk_norm': True, 'qkv_bias': biased, 'output_bias': biased}
  layers = llama.blocks(hf, DEFAULTS, mixer=mixer)
  return llama.decoder(hf, 'qwen3', DEFAULTS, qwen2.late_windows(hf, layers))


def _to_hf(config):
  return {
    **llama.decoder_to_hf(config),
    **rope.to_hf(config.rope),
    **qwen2.late_windows_to_hf(config.layers),
    'attention_bias': config.layers[0].mixer.qkv_bias,
  }


QWEN3 = Family(
  model_type='qwen3',
  architecture='Qwen3ForCausalLM',
  prefix='model.',
  rows=ROWS,
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
)
