"""The config of a model from the metadata of its GGUF file.

The metadata is turned into what config.json would say, because the family's own mapping knows the
rest. What the file does not say is what llama.cpp assumes: which layers of a Gemma have a window,
the scale of its queries, the layers of a SmolLM3 that do not rotate, the activation.
"""

from model import hf_names
from model.config import ModelConfig
from model.gguf import architectures, rope, vocabulary
from model.gguf.container import Container
from model.gguf.fields import Fields
from model.hf_names.rope import rotary_fraction

EMBEDDING, HEAD = 'token_embd.weight', 'output.weight'
# The one Gemma 2 and the one Gemma 3 whose queries are not scaled by their own width.
_GEMMA_27B_LAYERS = {'gemma2': 46, 'gemma3': 62}
# Keys that change what is computed, and the values that do not.
_REFUSED = {
  'expert_count': 0,
  'attention.causal': True,
  'attention.scale': 0.0,
  'attention.clamp_kqv': 0.0,
  'attention.max_alibi_bias': 0.0,
  'logit_scale': 0.0,
  'residual_scale': 0.0,
  'embedding_scale': 0.0,
}
# Of these keys, the ones that an architecture computes; 0 stands for none.
_MULTIPLIERS = {
  'granite': {
    'attention.scale': 'attention_multiplier',
    'embedding_scale': 'embedding_multiplier',
    'residual_scale': 'residual_multiplier',
    'logit_scale': 'logits_scaling',
  }
}


def to_config(file: Container) -> ModelConfig:
  """Raises ValueError where the file describes something unsupported, naming the key."""
  try:
    return _to_config(file)
  except ValueError as error:
    raise ValueError(f'{file.path}: {error}') from error


def _to_config(file):
  name = file.metadata.get('general.architecture')
  family = architectures.find(name).model_type
  fields = Fields(name, file.metadata, file.tensors)
  for key, harmless in _REFUSED.items():
    if key not in _MULTIPLIERS.get(name, ()):
      fields.refuse(key, harmless)
  if EMBEDDING not in file.tensors:
    raise ValueError(f'the tensor {EMBEDDING} is missing')
  common = {
    'model_type': family,
    'vocab_size': file.tensors[EMBEDDING].shape[0],
    'tie_word_embeddings': HEAD not in file.tensors,
    **vocabulary.special_ids(file),
  }
  return hf_names.config_from_hf({**common, **_KEYS[name](fields)})


def _decoder(fields):
  """The keys that all families with RMS norms share."""
  heads, width = fields.size('attention.head_count'), fields.size('embedding_length')
  head_width = fields.size('attention.key_length', width // heads)
  fields.refuse('attention.value_length', head_width)
  max_positions = fields.size('context_length')
  return {
    'hidden_size': width,
    'intermediate_size': fields.size('feed_forward_length'),
    'num_hidden_layers': fields.size('block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': fields.size('attention.head_count_kv', heads),
    'head_dim': head_width,
    'max_position_embeddings': max_positions,
    'rms_norm_eps': fields.number('attention.layer_norm_rms_epsilon'),
    **rope.to_hf(fields, max_positions),
  }


def _whole_heads(fields):
  keys = _decoder(fields)
  fields.refuse('rope.dimension_count', keys['head_dim'])
  return keys


def _biases(fields):
  biased = lambda part: f'blk.0.{part}.bias' in fields.tensors
  return {'attention_bias': biased('attn_q'), 'mlp_bias': biased('ffn_up')}


def _llama(fields):
  """Llama, and Mistral where the file has a window, which llama.cpp's converter leaves out."""
  keys = {**_whole_heads(fields), **_biases(fields)}
  window = fields.number('attention.sliding_window', 0)
  return {**keys, 'model_type': 'mistral', 'sliding_window': window} if window else keys


def _qwen3(fields):
  return {**_whole_heads(fields), **_biases(fields)}


def _gemma2(fields):
  fields.refuse('attention.sliding_window_pattern', 2)
  keys = _whole_heads(fields)
  return {
    **keys,
    'query_pre_attn_scalar': _query_scalar(fields, keys),
    'sliding_window': fields.size('attention.sliding_window', 4096),
    'attn_logit_softcapping': fields.number('attn_logit_softcapping', 50.0),
    'final_logit_softcapping': fields.number('final_logit_softcapping', 30.0),
  }


def _query_scalar(fields, keys):
  """What Gemma divides the scores by, squared."""
  largest = keys['num_hidden_layers'] == _GEMMA_27B_LAYERS[fields.name]
  return keys['hidden_size'] // keys['num_attention_heads'] if largest else keys['head_dim']


def _gemma3(fields):
  fields.refuse('attention.sliding_window_pattern', 6)
  fields.refuse('attn_logit_softcapping', 0.0)
  keys = _whole_heads(fields)
  return {
    **keys,
    'rope_theta': fields.number('rope.freq_base', 1e6),
    'rope_local_base_freq': fields.number('rope.freq_base_swa', 1e4),
    'query_pre_attn_scalar': _query_scalar(fields, keys),
    'sliding_window': fields.size('attention.sliding_window', 4096),
    'final_logit_softcapping': fields.number('final_logit_softcapping', 0.0) or None,
  }


def _olmo2(fields):
  """OLMo 2; a file of OLMo 3, which has windows, says so in the same architecture."""
  fields.refuse('attention.sliding_window', 0)
  return {**_whole_heads(fields), **_biases(fields)}


def _granite(fields):
  keys = {**_whole_heads(fields), **_biases(fields)}
  values = {ours: fields.number(key, 0.0) for key, ours in _MULTIPLIERS['granite'].items()}
  own = {'attention_multiplier': keys['head_dim'] ** -0.5}
  return {**keys, **own, **{ours: value for ours, value in values.items() if value}}


def _phi3(fields):
  keys = _decoder(fields)
  window = fields.number('attention.sliding_window', 0)  # Phi-4 says 0
  fraction = _rotary_fraction(fields, keys['head_dim'])
  return {**keys, 'sliding_window': window or None, 'partial_rotary_factor': fraction}


def _gpt2(fields):
  return {
    'n_positions': fields.size('context_length'),
    'n_embd': fields.size('embedding_length'),
    'n_layer': fields.size('block_count'),
    'n_head': fields.size('attention.head_count'),
    'n_inner': fields.size('feed_forward_length'),
    'layer_norm_epsilon': fields.number('attention.layer_norm_epsilon'),
  }


def _gptneox(fields):
  heads, width = fields.size('attention.head_count'), fields.size('embedding_length')
  max_positions = fields.size('context_length')
  rotary = rope.to_hf(fields, max_positions)
  return {
    'hidden_size': width,
    'intermediate_size': fields.size('feed_forward_length'),
    'num_hidden_layers': fields.size('block_count'),
    'num_attention_heads': heads,
    'max_position_embeddings': max_positions,
    'layer_norm_eps': fields.number('attention.layer_norm_epsilon'),
    'use_parallel_residual': fields.flag('use_parallel_residual', True),
    'rotary_pct': _rotary_fraction(fields, width // heads),
    'rotary_emb_base': rotary['rope_theta'],
    'rope_scaling': rotary['rope_scaling'],
  }


def _rotary_fraction(fields, head_width):
  return rotary_fraction(head_width, fields.size('rope.dimension_count', head_width))


_KEYS = {
  'llama': _llama,
  'smollm3': lambda fields: {**_whole_heads(fields), **_biases(fields)},
  'granite': _granite,
  'olmo2': _olmo2,
  'gemma3': _gemma3,
  'qwen2': _whole_heads,
  'qwen3': _qwen3,
  'gemma2': _gemma2,
  'phi3': _phi3,
  'gpt2': _gpt2,
  'gptneox': _gptneox,
}
