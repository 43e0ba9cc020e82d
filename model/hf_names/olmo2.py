"""OLMo 2: norms after each half of a block and none before, and over all query or key heads.

transformers: models/olmo2 (5.24).
"""

from model.hf_names import fields, gemma2, llama, qwen3, rope
from model.hf_names.family import Family

DEFAULTS = llama.Defaults(vocab_size=50304, eps=1e-5, bos=None, eos=50279, pad=1)
_BEFORE = (('layers.{l}.attention_norm',), ('layers.{l}.ffn_norm',))
ROWS = tuple(row for row in (*gemma2.ROWS, *qwen3.QK_NORMS) if row.ours not in _BEFORE)


def _from_hf(hf):
  llama.only_whole_heads(hf)
  biased = fields.flag(hf, 'attention_bias', False)
  mixer = {'qk_norm': True, 'qk_norm_over': 'all', 'qkv_bias': biased, 'output_bias': biased}
  layers = llama.blocks(hf, DEFAULTS, mixer=mixer, pre_norms=False, post_norms=True)
  return llama.decoder(hf, 'olmo2', DEFAULTS, layers)


def _to_hf(config):
  return {
    **llama.decoder_to_hf(config),
    **rope.to_hf(config.rope),
    'attention_bias': config.layers[0].mixer.qkv_bias,
  }


OLMO2 = Family(
  model_type='olmo2',
  architecture='Olmo2ForCausalLM',
  prefix='model.',
  rows=ROWS,
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
)
