"""Phi-3 and Phi-4-mini without longrope: Llama with fused projections and partial rotary heads.

transformers: models/phi3 (5.23).
"""

from model.hf_names import fields, llama, rope
from model.hf_names.family import TRANSPOSE, Family, Row

DEFAULTS = llama.Defaults(
  vocab_size=32064, width=3072, ffn_width=8192, max_positions=4096, eps=1e-5, eos=32000, pad=32000
)
_QKV = tuple(f'layers.{{l}}.attention.{part}' for part in ('query', 'key', 'value'))
_GATE_UP = ('layers.{l}.ffn.gate', 'layers.{l}.ffn.up')
ROWS = (
  *(row for row in llama.ROWS if row.ours[0] not in (*_QKV, *_GATE_UP)),
  Row('model.layers.{l}.self_attn.qkv_proj', _QKV, TRANSPOSE),
  Row('model.layers.{l}.mlp.gate_up_proj', _GATE_UP, TRANSPOSE),
)


def _from_hf(hf):
  scaling = rope.parameters(hf)
  fraction = fields.number(hf, 'partial_rotary_factor', 1.0)
  fraction = fields.number(scaling, 'partial_rotary_factor', fraction)
  layer, *_ = layers = llama.blocks(
    hf, DEFAULTS, mixer={'window': fields.size_or_null(hf, 'sliding_window', None)}
  )
  rotary = rope.rotary_width(layer.mixer.head_width, fraction)
  max_positions = fields.size(hf, 'max_position_embeddings', DEFAULTS.max_positions)
  return llama.decoder(
    hf,
    'phi3',
    DEFAULTS,
    tuple(layer.with_mixer(rotary_width=rotary) for layer in layers),
    # 'yarn' and 'su' are names of longrope in this family.
    rope=rope.from_hf(hf, max_positions, types=('default',)),
  )


def _to_hf(config):
  heads = config.layers[0].mixer
  fraction = rope.rotary_fraction(heads.head_width, heads.rotary_width)
  return {
    **llama.decoder_to_hf(config),
    **rope.to_hf(config.rope, partial_rotary_factor=fraction),
    'partial_rotary_factor': fraction,
    'original_max_position_embeddings': config.max_positions,
    'sliding_window': heads.window,
  }


PHI3 = Family(
  model_type='phi3',
  architecture='Phi3ForCausalLM',
  prefix='model.',
  rows=ROWS,
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
)
