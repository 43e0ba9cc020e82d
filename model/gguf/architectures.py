"""The architectures of GGUF files: one table of tensor names each.

An architecture is a family of `model.hf_names` with other names and codecs, so reading is the same
there and here. The codecs undo what llama.cpp's converter does to the tensors of a Hugging Face
checkpoint: rows of queries and keys lie in pairs (llama, smollm3, granite), norm scales have one
added (gemma2, gemma3), and the parts of a fused matrix lie one after another, not interleaved
(gptneox).
"""

import dataclasses
import difflib

from model import hf_names
from model.hf_names.family import PAIRED, PLAIN, TRANSPOSE, Codec, Family, Row

_ATTENTION = tuple(f'layers.{{l}}.attention.{part}' for part in ('query', 'key', 'value'))
_GATE_UP = ('layers.{l}.ffn.gate', 'layers.{l}.ffn.up')
_ONE_MORE = Codec(offset=1.0)


# Families that are written as an architecture that has another name.
ALIASES = {'mistral': 'llama'}
IGNORED = (
  r'^rope_freqs\.weight$',  # part of the config
  r'^blk\.\d+\.(rope_freqs|attn_rot_embd)\.weight$',  # a copy, and a buffer in old files
)


def _common(norm: Codec = PLAIN) -> tuple[Row, ...]:
  """What all architectures have; `norm` is the codec of the norms."""
  return (
    Row('token_embd', ('embedding',)),
    Row('output_norm', ('final_norm',), norm),
    Row('output', ('head',), TRANSPOSE),
    Row('blk.{l}.attn_norm', ('layers.{l}.attention_norm',), norm),
    Row('blk.{l}.ffn_norm', ('layers.{l}.ffn_norm',), norm),
    Row('blk.{l}.attn_output', ('layers.{l}.attention.output',), TRANSPOSE),
    Row('blk.{l}.ffn_down', ('layers.{l}.ffn.down',), TRANSPOSE),
  )


def _separate(codec: Codec = TRANSPOSE) -> tuple[Row, ...]:
  """Queries, keys and values apart; `codec` is that of queries and keys."""
  query, key, value = _ATTENTION
  return (
    Row('blk.{l}.attn_q', (query,), codec),
    Row('blk.{l}.attn_k', (key,), codec),
    Row('blk.{l}.attn_v', (value,), TRANSPOSE),
  )


_FUSED = (Row('blk.{l}.attn_qkv', _ATTENTION, TRANSPOSE),)
_UP = (Row('blk.{l}.ffn_up', ('layers.{l}.ffn.up',), TRANSPOSE),)
_GATED = (Row('blk.{l}.ffn_gate', ('layers.{l}.ffn.gate',), TRANSPOSE), *_UP)


def _qk_norms(norm: Codec = PLAIN) -> tuple[Row, ...]:
  return (
    Row('blk.{l}.attn_q_norm', ('layers.{l}.attention.query_norm',), norm),
    Row('blk.{l}.attn_k_norm', ('layers.{l}.attention.key_norm',), norm),
  )


def _post_norms(norm: Codec = PLAIN) -> tuple[Row, ...]:
  return (
    Row('blk.{l}.post_attention_norm', ('layers.{l}.attention_post_norm',), norm),
    Row('blk.{l}.post_ffw_norm', ('layers.{l}.ffn_post_norm',), norm),
  )


_LLAMA = (*_common(), *_separate(PAIRED), *_GATED)
_GEMMA2 = (*_common(_ONE_MORE), *_separate(), *_GATED, *_post_norms(_ONE_MORE))

ARCHITECTURES = {
  name: dataclasses.replace(hf_names.find(family), prefix='', rows=rows, ignored=IGNORED)
  for name, family, rows in (
    ('llama', 'llama', _LLAMA),
    ('smollm3', 'smollm3', _LLAMA),
    ('granite', 'granite', _LLAMA),
    ('qwen2', 'qwen2', (*_common(), *_separate(), *_GATED)),
    ('qwen3', 'qwen3', (*_common(), *_separate(), *_GATED, *_qk_norms())),
    ('gemma2', 'gemma2', _GEMMA2),
    ('gemma3', 'gemma3_text', (*_GEMMA2, *_qk_norms(_ONE_MORE))),
    ('olmo2', 'olmo2', (*_common(), *_separate(), *_GATED, *_qk_norms(), *_post_norms())),
    ('phi3', 'phi3', (*_common(), *_FUSED, Row('blk.{l}.ffn_up', _GATE_UP, TRANSPOSE))),
    ('gpt2', 'gpt2', (*_common(), Row('position_embd', ('positions',)), *_FUSED, *_UP)),
    ('gptneox', 'gpt_neox', (*_common(), *_FUSED, *_UP)),
  )
}


def find(name: str) -> Family:
  """The architecture of that name; ValueError with the nearest names where there is none."""
  if name in ARCHITECTURES:
    return ARCHITECTURES[name]
  near = difflib.get_close_matches(str(name), ARCHITECTURES, cutoff=0.4)
  hint = f'; did you mean {" or ".join(near)}?' if near else ''
  raise ValueError(
    f'general.architecture {name!r} is not supported; supported: '
    f'{", ".join(sorted(ARCHITECTURES))}{hint}'
  )


def name_of(family: str) -> str:
  """The architecture that holds models of a family of `hf_names`; ValueError if there is none."""
  names = {one.model_type: name for name, one in ARCHITECTURES.items()} | ALIASES
  if family not in names:
    raise ValueError(
      f'GGUF files of the family {family!r} are not written; written are {", ".join(sorted(names))}'
    )
  return names[family]
