"""Puts other mixers in the place of attention, in all layers of a model or in most of them.

A mixer has a name, such as gated_delta or linformer, or is a sparse pattern (ops/patterns.py), such
as window128+first4. With moba64x4 each query chooses 4 blocks of 64 tokens, besides its own; with
moba64x4+first the first block of the text is one of them.
"""

import dataclasses
import re
from collections.abc import Callable

from model.config import ModelConfig
from model.layers.mixers import linear
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.delta import GatedDeltaConfig
from model.layers.mixers.linformer import LinformerConfig
from model.layers.mixers.moba import MobaConfig
from model.layers.sublayer import MixerConfig
from ops import patterns

ATTENTION = 'attention'
# Heads as many and as wide as the query heads of attention; key heads of a delta rule as many as
# its key/value heads.
RECURRENT: dict[str, Callable[[AttentionConfig], MixerConfig]] = {
  'linear': lambda a: linear.linear_attention(a.query_heads, a.head_width, a.head_width),
  'retnet': lambda a: linear.retnet(a.query_heads, a.head_width, a.head_width),
  'gla': lambda a: linear.gla(a.query_heads, a.head_width, a.head_width),
  'gated_delta': lambda a: GatedDeltaConfig(
    key_heads=a.kv_heads,
    value_heads=a.query_heads,
    key_width=a.head_width,
    value_width=a.head_width,
  ),
}
SUMS = {'window': 128, 'chunk': 64, 'summaries': 16}
LINFORMERS: dict[str, Callable[[AttentionConfig], MixerConfig]] = {
  'linformer': lambda a: LinformerConfig(**{**vars(a), **SUMS}),
  'linformer_dynamic': lambda a: LinformerConfig(**{**vars(a), **SUMS, 'weights': 'dynamic'}),
}
NAMED = RECURRENT | LINFORMERS
HELP = (
  f'{ATTENTION}, {", ".join(NAMED)}, blocks that are chosen such as moba64x4, or a sparse pattern '
  'such as window128+first4'
)
_MOBA = re.compile(r'moba([0-9]+)x([0-9]+)(\+first)?')


def sees(name: str, attention: AttentionConfig) -> AttentionConfig:
  """Attention with the same parameters that sees some keys: a sparse pattern, or chosen blocks.

  Raises ValueError if it is neither.
  """
  found = _MOBA.fullmatch(name)
  if found is not None:
    dense = dataclasses.replace(attention, window=None, sparse=None)
    block, top_k, first = found.groups()
    return MobaConfig.of(dense, block=int(block), top_k=int(top_k), first=bool(first))
  return dataclasses.replace(attention, window=None, sparse=patterns.parse(name))


def make(name: str, attention: AttentionConfig) -> MixerConfig:
  """The mixer of this name in the place of attention.

  Raises ValueError if there is none.
  """
  if name in NAMED:
    return NAMED[name](attention)
  try:
    return sees(name, attention)
  except ValueError as error:
    raise ValueError(
      f'there is no mixer {name!r}: it is none of {", ".join(NAMED)}, nor chosen blocks such as '
      f'moba64x4 (blocks of 64, 4 besides the own one); {error}'
    ) from None


def replaced(config: ModelConfig, name: str, attention_every: int = 0) -> ModelConfig:
  """The model with mixers of this name, but for every so many-th layer; 0: in all layers.

  Raises ValueError if the layers of a model of attention are to be kept, or all layers are.
  """
  if name == ATTENTION:
    if attention_every:
      raise ValueError(
        f'attention_every = {attention_every} keeps the attention of some layers, but all have it; '
        f'choose another mixer: {", ".join(NAMED)}'
      )
    return config
  if attention_every == 1 or attention_every < 0:
    raise ValueError(
      f'attention_every = {attention_every} leaves no layer for {name}; choose 2 or more, or 0 for '
      'no attention'
    )
  stays = lambda l: attention_every and (l + 1) % attention_every == 0
  layers = tuple(
    layer if stays(l) else dataclasses.replace(layer, mixer=make(name, layer.mixer))
    for l, layer in enumerate(config.layers)
  )
  return config.replace(layers=layers)
