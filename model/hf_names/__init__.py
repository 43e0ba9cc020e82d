"""Model families in the format of Hugging Face: a table of names and a config mapping for each."""

import dataclasses
import difflib
from collections.abc import Collection
from typing import Any

from model.config import ModelConfig
from model.hf_names import fields
from model.hf_names.deepseek_v2 import DEEPSEEK_V2
from model.hf_names.deepseek_v3 import DEEPSEEK_V3
from model.hf_names.family import Entry, Family, Layout, entries
from model.hf_names.gemma2 import GEMMA2
from model.hf_names.gemma3 import GEMMA3
from model.hf_names.gpt2 import GPT2
from model.hf_names.gpt_neox import GPT_NEOX
from model.hf_names.gpt_oss import GPT_OSS
from model.hf_names.granite import GRANITE
from model.hf_names.granitemoe import GRANITE_MOE, GRANITE_MOE_SHARED
from model.hf_names.llama import LLAMA, MISTRAL
from model.hf_names.mixtral import MIXTRAL
from model.hf_names.olmo2 import OLMO2
from model.hf_names.olmoe import OLMOE
from model.hf_names.phi3 import PHI3
from model.hf_names.qwen2 import QWEN2
from model.hf_names.qwen2_moe import QWEN2_MOE
from model.hf_names.qwen3 import QWEN3
from model.hf_names.qwen3_moe import QWEN3_MOE
from model.hf_names.qwen3_next import QWEN3_NEXT
from model.hf_names.smollm3 import SMOLLM3
from model.hf_names.stored import FLOATS, select_tensors
from model.layers.block import LayerConfig
from model.layers.mixers.attention import AttentionConfig

__all__ = [
  'FAMILIES',
  'FLOATS',
  'Entry',
  'Family',
  'Layout',
  'config_from_hf',
  'config_to_hf',
  'differences',
  'entries',
  'find',
  'layout_of',
  'shared_to_hf',
  'select_tensors',
]

FAMILIES = {
  family.model_type: family
  for family in (
    *(LLAMA, MISTRAL, SMOLLM3, QWEN2, QWEN3, GEMMA2, GEMMA3, OLMO2, GRANITE, PHI3),
    *(GPT2, GPT_NEOX),
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, QWEN3_NEXT, OLMOE, GRANITE_MOE, GRANITE_MOE_SHARED, GPT_OSS),
    *(DEEPSEEK_V2, DEEPSEEK_V3),
  )
}


def find(model_type: str) -> Family:
  """The family of that name. Raises ValueError with the nearest names if there is none."""
  if model_type in FAMILIES:
    return FAMILIES[model_type]
  near = difflib.get_close_matches(str(model_type), FAMILIES, cutoff=0.4)
  hint = f'; did you mean {" or ".join(near)}?' if near else ''
  raise ValueError(
    f'model_type {model_type!r} is not supported; supported: {", ".join(sorted(FAMILIES))}{hint}'
  )


def layout_of(family: Family, stored: Collection[str]) -> Layout:
  """The layout that most of the names of a checkpoint belong to."""
  return max(family.layouts, key=lambda layout: layout.count(stored))


def config_from_hf(hf: dict, methods: Collection[str] = ()) -> ModelConfig:
  """Reads the contents of a config.json.

  `methods` are the quantization methods that the caller decodes. Raises ValueError, naming the key,
  if it describes something that is not supported.
  """
  if 'model_type' not in hf:
    raise ValueError(f'config.json has no model_type; supported: {", ".join(sorted(FAMILIES))}')
  family = find(hf['model_type'])
  method = (hf.get('quantization_config') or {'quant_method': None}).get('quant_method', 'unknown')
  known = [*(layout.format for layout in family.layouts), *methods]
  if method not in known:
    supported = ', '.join(sorted(filter(None, known)))
    raise ValueError(
      f'quantization_config ({method}) in config.json: the checkpoint is already quantized in a '
      f'way that is not read (supported: {supported or "none"}); load the original, or '
      'dequantize it first'
    )
  return family.config_from_hf(hf)


def config_to_hf(config: ModelConfig) -> dict:
  """Writes the contents of a config.json that transformers 4 and 5 read.

  Raises ValueError if the family's config.json cannot describe the model, for example because its
  layers have different widths; the message names the fields and layers.
  """
  family = find(config.family)
  for l, layer in enumerate(config.layers):
    for part in layer.sublayers.values():
      if not isinstance(part, family.kinds):
        raise ValueError(
          f'config.json of the family {config.family} cannot describe the {type(part).__name__} of '
          f'layer {l}'
        )
  hf = {**family.config_to_hf(config), **shared_to_hf(config)}
  problems = differences(config, family.config_from_hf(hf))
  if problems:
    raise ValueError(
      f'config.json of the family {config.family} cannot describe this model: '
      f'{"; ".join(problems[:20])}'
    )
  return hf


def shared_to_hf(config: ModelConfig) -> dict:
  """The keys of a config.json that every family has."""
  family = find(config.family)
  return {
    'architectures': [family.architecture],
    'model_type': family.model_type,
    'vocab_size': config.vocab_size,
    **fields.tokens_to_hf(config),
  }


def differences(config: ModelConfig, written: ModelConfig) -> list[str]:
  """Where two configs describe different models: fields and layers, with both values."""
  config, written = _normal(config), _normal(written)
  problems = [
    f'{field.name} = {ours!r} (it would be {theirs!r})'
    for field in dataclasses.fields(ModelConfig)
    if field.name != 'layers'
    and (ours := getattr(config, field.name)) != (theirs := getattr(written, field.name))
  ]
  pairs = [(_traits(a), _traits(b)) for a, b in zip(config.layers, written.layers)]
  for name in dict.fromkeys(name for ours, theirs in pairs for name in ours | theirs):
    wrong = [l for l, (a, b) in enumerate(pairs) if a.get(name) != b.get(name)]
    if wrong:
      ours, theirs = (traits.get(name) for traits in pairs[wrong[0]])
      layers = ', '.join(map(str, wrong[:20])) + (', ...' if len(wrong) > 20 else '')
      problems.append(f'layers {layers}: {name} = {ours!r} (it would be {theirs!r})')
  return problems


def _traits(layer: LayerConfig) -> dict[str, Any]:
  """The fields of a layer and of its sub-layers by name, such as 'mixer.window'."""
  found = {}
  for field in dataclasses.fields(layer):
    value = getattr(layer, field.name)
    if field.name in ('mixer', 'ffn'):
      found[field.name] = type(value).__name__
      found |= {f'{field.name}.{name}': inner for name, inner in vars(value).items()}
    else:
      found[field.name] = value
  return found


def _normal(config: ModelConfig) -> ModelConfig:
  """The same model, with None for each value that None stands for."""
  return config.replace(layers=tuple(_normal_layer(layer, config) for layer in config.layers))


def _normal_layer(layer, config):
  if not isinstance(layer.mixer, AttentionConfig):
    return layer
  if layer.mixer.rope == config.rope:
    layer = layer.with_mixer(rope=None)
  if layer.mixer.query_scale == layer.mixer.head_width**-0.5:
    layer = layer.with_mixer(query_scale=None)
  heads = layer.mixer
  if isinstance(heads, AttentionConfig) and heads.rotary_width == heads.head_width:
    layer = layer.with_mixer(rotary_width=None)
  return layer
