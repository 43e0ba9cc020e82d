"""Model families in the format of Hugging Face: a table of names and a config mapping for each."""

import dataclasses
import difflib

from model.config import LayerConfig, ModelConfig
from model.hf_names import fields
from model.hf_names.family import Entry, Family, entries
from model.hf_names.gemma2 import GEMMA2
from model.hf_names.gpt2 import GPT2
from model.hf_names.gpt_neox import GPT_NEOX
from model.hf_names.llama import LLAMA, MISTRAL
from model.hf_names.phi3 import PHI3
from model.hf_names.qwen2 import QWEN2
from model.hf_names.qwen3 import QWEN3

__all__ = ['FAMILIES', 'Entry', 'Family', 'config_from_hf', 'config_to_hf', 'entries', 'find']

FAMILIES = {
  family.model_type: family
  for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, PHI3, GPT2, GPT_NEOX)
}


def find(model_type: str) -> Family:
  """The family of that name; ValueError with the nearest names where there is none."""
  if model_type in FAMILIES:
    return FAMILIES[model_type]
  near = difflib.get_close_matches(str(model_type), FAMILIES, cutoff=0.4)
  hint = f'; did you mean {" or ".join(near)}?' if near else ''
  raise ValueError(
    f'model_type {model_type!r} is not supported; supported: {", ".join(sorted(FAMILIES))}{hint}'
  )


def config_from_hf(hf: dict) -> ModelConfig:
  """Reads the contents of a config.json.

  Raises ValueError where it describes something that is not computed here, naming the key.
  """
  if 'model_type' not in hf:
    raise ValueError(f'config.json has no model_type; supported: {", ".join(sorted(FAMILIES))}')
  family = find(hf['model_type'])
  if hf.get('quantization_config'):
    method = hf['quantization_config'].get('quant_method', 'unknown')
    raise ValueError(
      f'quantization_config ({method}) in config.json: the checkpoint is already quantized; '
      'load the original, or dequantize it first'
    )
  return family.config_from_hf(hf)


def config_to_hf(config: ModelConfig) -> dict:
  """Writes the contents of a config.json that transformers 4 and 5 read.

  Raises ValueError where the family's config.json cannot say what `config` says, for one where
  layers have different widths; the message names the fields and layers.
  """
  family = find(config.family)
  hf = {
    'architectures': [family.architecture],
    'model_type': family.model_type,
    **family.config_to_hf(config),
    **fields.tokens_to_hf(config.bos_id, config.eos_ids),
    'pad_token_id': config.pad_id,
  }
  problems = _differences(_normal(config), _normal(family.config_from_hf(hf)))
  if problems:
    raise ValueError(
      f'config.json of the family {config.family} cannot say all of this model: '
      f'{"; ".join(problems[:20])}'
    )
  return hf


def _differences(config, written):
  problems = [
    f'{field.name} = {ours!r} (it would be {theirs!r})'
    for field in dataclasses.fields(ModelConfig)
    if field.name != 'layers'
    and (ours := getattr(config, field.name)) != (theirs := getattr(written, field.name))
  ]
  for field in dataclasses.fields(LayerConfig):
    pairs = [
      (getattr(a, field.name), getattr(b, field.name))
      for a, b in zip(config.layers, written.layers)
    ]
    wrong = [l for l, (ours, theirs) in enumerate(pairs) if ours != theirs]
    if wrong:
      ours, theirs = pairs[wrong[0]]
      layers = ', '.join(map(str, wrong[:20])) + (', ...' if len(wrong) > 20 else '')
      problems.append(f'layers {layers}: {field.name} = {ours!r} (it would be {theirs!r})')
  return problems


def _normal(config: ModelConfig) -> ModelConfig:
  """The same model with each value that equals its default written as the default."""
  return config.replace(layers=tuple(map(_normal_layer, config.layers)))


def _normal_layer(layer):
  if layer.query_scale == layer.head_width**-0.5:
    layer = dataclasses.replace(layer, query_scale=None)
  if layer.rotary_width == layer.head_width:
    layer = dataclasses.replace(layer, rotary_width=None)
  return layer
