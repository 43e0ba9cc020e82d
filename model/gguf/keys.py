"""The keys of a GGUF file that describe a network: one table for each architecture.

Each row pairs a key of the metadata with the key of config.json that says the same, so the table is
read in both directions: `metadata.to_config` reads a file by it, `metadata.describe` writes one.
What a file does not say, and llama.cpp assumes (which layers of a Gemma have a window, the scale of
its queries), is `derived`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from model.gguf.fields import REQUIRED, Fields
from model.hf_names.rope import rotary_fraction

Hf = dict[str, Any]  # what config.json would say
Kind = Literal['size', 'count', 'number', 'flag']  # a method of `Fields`
ROPE_BASE = 'rope.freq_base'


@dataclasses.dataclass(frozen=True)
class Key:
  """A key without the architecture in front, and the key of config.json that says the same.

  default: what an absent key means; a function is given what the rows before have read.
  fixed: the value follows from that of config.json, and a file that has another one is refused.
  decode, encode: between the value of the file and that of config.json, which is the second
    argument's. None is a value that is not written.
  """

  name: str
  hf: str
  kind: Kind = 'size'
  default: Any = REQUIRED
  fixed: bool = False
  decode: Callable[[Any, Hf], Any] = lambda value, hf: value
  encode: Callable[[Any, Hf], Any] = lambda value, hf: value

  def read(self, fields: Fields, hf: Hf) -> None:
    """Adds the key of config.json to `hf`. Raises ValueError as `Fields` does."""
    if self.fixed:
      fields.refuse(self.name, hf[self.hf])
      return
    default = self.default(hf) if callable(self.default) else self.default
    value = self.decode(getattr(fields, self.kind)(self.name, default), hf)
    if value is not None:
      hf[self.hf] = value

  def write(self, hf: Hf) -> Any:
    """The value of the file, or None if the key is left out."""
    value = hf.get(self.hf)
    if value is None:
      return None
    value = self.encode(value, hf)
    return {'size': int, 'count': int, 'number': float, 'flag': bool}[self.kind](value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """What the metadata of an architecture says.

  derived: (fields, hf) -> keys of config.json that no key of the file holds.
  refused: keys that change what is computed, with the values that do not.
  """

  keys: tuple[Key, ...]
  derived: Callable[[Fields, Hf], Hf] = lambda fields, hf: {}
  refused: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Of every architecture, unless it has a row for the key.
REFUSED = {
  'expert_count': 0,
  'attention.causal': True,
  'attention.scale': 0.0,
  'attention.clamp_kqv': 0.0,
  'attention.max_alibi_bias': 0.0,
  'logit_scale': 0.0,
  'residual_scale': 0.0,
  'embedding_scale': 0.0,
}
# The one Gemma 2 and the one Gemma 3 whose queries are not scaled by their own width.
_GEMMA_27B_LAYERS = {'gemma2': 46, 'gemma3': 62}


def _head_width(hf):
  return hf['hidden_size'] // hf['num_attention_heads']


def _rotated(hf_key: str, width: Callable[[Hf], int]) -> Key:
  """The part of a head that rotates: a width in the file, a fraction in config.json."""
  return Key(
    'rope.dimension_count',
    hf_key,
    default=width,
    decode=lambda value, hf: rotary_fraction(width(hf), value),
    encode=lambda fraction, hf: width(hf) * fraction,
  )


_WIDTHS = (
  Key('attention.head_count', 'num_attention_heads'),
  Key('embedding_length', 'hidden_size'),
  Key('feed_forward_length', 'intermediate_size'),
  Key('block_count', 'num_hidden_layers'),
  Key('context_length', 'max_position_embeddings'),
)
_DECODER = (
  *_WIDTHS,
  Key('attention.head_count_kv', 'num_key_value_heads', default=lambda hf: hf[_WIDTHS[0].hf]),
  Key('attention.key_length', 'head_dim', default=_head_width),
  Key('attention.value_length', 'head_dim', fixed=True),
  Key('attention.layer_norm_rms_epsilon', 'rms_norm_eps', 'number'),
)
_BASE = Key(ROPE_BASE, 'rope_theta', 'number', 10000.0)
_ALL_ROTATES = Key('rope.dimension_count', 'head_dim', fixed=True)
_WHOLE_HEADS = (*_DECODER, _BASE, _ALL_ROTATES)
_SOME_WINDOW = Key(
  'attention.sliding_window', 'sliding_window', 'count', 0, decode=lambda value, hf: value or None
)
_GEMMA_WINDOW = Key('attention.sliding_window', 'sliding_window', default=4096)


def _biases(fields, hf):
  biased = lambda part: f'blk.0.{part}.bias' in fields.tensors
  return {'attention_bias': biased('attn_q'), 'mlp_bias': biased('ffn_up')}


def _llama(fields, hf):
  """Llama, and Mistral where the file has a window, which llama.cpp's converter leaves out."""
  return {**_biases(fields, hf), **({'model_type': 'mistral'} if 'sliding_window' in hf else {})}


def _query_scalar(fields, hf):
  """What Gemma divides the scores by, squared."""
  largest = hf['num_hidden_layers'] == _GEMMA_27B_LAYERS[fields.name]
  return {'query_pre_attn_scalar': _head_width(hf) if largest else hf['head_dim']}


def _multiplier(name: str, hf_key: str, absent: Callable[[Hf], float | None]) -> Key:
  """A factor of Granite; 0 stands for none."""
  return Key(name, hf_key, 'number', 0.0, decode=lambda value, hf: value or absent(hf))


_NONE = lambda hf: None
ARCHITECTURES = {
  'llama': Architecture(keys=(*_WHOLE_HEADS, _SOME_WINDOW), derived=_llama),
  'smollm3': Architecture(keys=_WHOLE_HEADS, derived=_biases),
  'olmo2': Architecture(
    # A file of OLMo 3, which has windows, says so in the same architecture.
    keys=_WHOLE_HEADS,
    derived=_biases,
    refused={'attention.sliding_window': 0},
  ),
  'granite': Architecture(
    keys=(
      *_WHOLE_HEADS,
      _multiplier('attention.scale', 'attention_multiplier', lambda hf: hf['head_dim'] ** -0.5),
      _multiplier('embedding_scale', 'embedding_multiplier', _NONE),
      _multiplier('residual_scale', 'residual_multiplier', _NONE),
      _multiplier('logit_scale', 'logits_scaling', _NONE),
    ),
    derived=_biases,
  ),
  'qwen2': Architecture(keys=_WHOLE_HEADS),
  'qwen3': Architecture(keys=_WHOLE_HEADS, derived=_biases),
  'gemma2': Architecture(
    keys=(
      *_WHOLE_HEADS,
      _GEMMA_WINDOW,
      Key('attn_logit_softcapping', 'attn_logit_softcapping', 'number', 50.0),
      Key('final_logit_softcapping', 'final_logit_softcapping', 'number', 30.0),
    ),
    derived=_query_scalar,
    refused={'attention.sliding_window_pattern': 2},
  ),
  'gemma3': Architecture(
    keys=(
      *_DECODER,
      _ALL_ROTATES,
      Key(ROPE_BASE, 'rope_theta', 'number', 1e6),
      Key('rope.freq_base_swa', 'rope_local_base_freq', 'number', 1e4),
      _GEMMA_WINDOW,
      _multiplier('final_logit_softcapping', 'final_logit_softcapping', _NONE),
    ),
    derived=_query_scalar,
    refused={'attention.sliding_window_pattern': 6, 'attn_logit_softcapping': 0.0},
  ),
  'phi3': Architecture(
    keys=(
      *_DECODER,
      _BASE,
      _SOME_WINDOW,  # Phi-4 says 0
      _rotated('partial_rotary_factor', lambda hf: hf['head_dim']),
    )
  ),
  'gpt2': Architecture(
    keys=(
      Key('attention.head_count', 'n_head'),
      Key('embedding_length', 'n_embd'),
      Key('feed_forward_length', 'n_inner'),
      Key('block_count', 'n_layer'),
      Key('context_length', 'n_positions'),
      Key('attention.layer_norm_epsilon', 'layer_norm_epsilon', 'number'),
    )
  ),
  'gptneox': Architecture(
    keys=(
      *_WIDTHS,
      Key('attention.layer_norm_epsilon', 'layer_norm_eps', 'number'),
      Key('use_parallel_residual', 'use_parallel_residual', 'flag', True),
      _rotated('rotary_pct', _head_width),
      Key(ROPE_BASE, 'rotary_emb_base', 'number', 10000.0),
    )
  ),
}
