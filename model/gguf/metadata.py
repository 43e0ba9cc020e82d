"""The config of a model from the metadata of its GGUF file, and the metadata from the config.

The metadata is turned into what config.json would say, because the family's own mapping knows the
rest; `model.gguf.keys` has the tables. What is written is read again, and compared with the config:
a model that a file cannot describe is refused.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model import hf_names
from model.config import ModelConfig
from model.gguf import architectures, keys, rope, vocabulary
from model.gguf.container import Container
from model.gguf.fields import Fields
from model.safetensors_io import Tensor
from ops.rope import frequencies

EMBEDDING, HEAD = 'token_embd.weight', 'output.weight'
FREQUENCY_TOLERANCE = 1e-5  # of parameters that are worked out again from float32 factors


def to_config(file: Container) -> ModelConfig:
  """Raises ValueError where the file describes something unsupported, naming the key."""
  try:
    return _to_config(file)
  except ValueError as error:
    raise ValueError(f'{file.path}: {error}') from error


def _to_config(file):
  name = file.metadata.get('general.architecture')
  family = architectures.find(name).model_type
  fields, table = Fields(name, file.metadata, file.tensors), keys.ARCHITECTURES[name]
  own = {key.name for key in table.keys}
  for key, harmless in {**keys.REFUSED, **table.refused}.items():
    if key not in own:
      fields.refuse(key, harmless)
  if EMBEDDING not in file.tensors:
    raise ValueError(f'the tensor {EMBEDDING} is missing')
  hf = {
    'model_type': family,
    'vocab_size': file.tensors[EMBEDDING].shape[0],
    'tie_word_embeddings': HEAD not in file.tensors,
    **vocabulary.special_ids(file),
  }
  for key in table.keys:
    key.read(fields, hf)
  if keys.ROPE_BASE in own:
    theta = fields.number(keys.ROPE_BASE, _base(table).default)
    hf['rope_scaling'] = rope.scaling(fields, theta, hf['max_position_embeddings'])
  return hf_names.config_from_hf({**hf, **table.derived(fields, hf)})


def _base(table):
  return next(key for key in table.keys if key.name == keys.ROPE_BASE)


def describe(
  config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The metadata of a model whose tensors have these names and shapes, and tensors that it needs.

  Raises ValueError if a file cannot describe the model: its layers differ, its family has no
  architecture, or it computes what llama.cpp does not.
  """
  name = architectures.name_of(config.family)
  hf = hf_names.config_to_hf(config)
  table = keys.ARCHITECTURES[name]
  found = {key.name: key.write(hf) for key in table.keys}
  extra = {}
  if config.rope is not None:
    scaling, factors = rope.describe(config.rope, config.layers[0].mixer.rotated)
    found |= scaling
    extra = {} if factors is None else {rope.FACTORS: factors.astype(np.float32)}
  metadata = {'general.architecture': name}
  metadata |= {f'{name}.{key}': value for key, value in found.items() if value is not None}
  tensors = {key: Tensor(shape, np.dtype(np.float32), None) for key, shape in shapes.items()}
  tensors |= {key: Tensor(a.shape, a.dtype, lambda a=a: a) for key, a in extra.items()}
  _check(config, to_config(Container(Path('the new file'), metadata, tensors)))
  return metadata | {f'{name}.vocab_size': config.vocab_size}, extra


def _check(config: ModelConfig, written: ModelConfig) -> None:
  """Raises ValueError where the file would be read as another model than `config`."""
  ours, theirs = map(_as_float32, (config, written))
  # Special tokens belong to the vocabulary. A family may be read as the one that it is a case of.
  same = {key: getattr(ours, key) for key in ('family', 'bos_id', 'eos_ids', 'pad_id')}
  if _same_angles(config, written):
    same['rope'] = ours.rope
  problems = hf_names.differences(ours, theirs.replace(**same))
  if problems:
    raise ValueError(
      f'a GGUF file of {architectures.name_of(config.family)} cannot describe this model: '
      f'{"; ".join(problems[:20])}'
    )


def _same_angles(config, written) -> bool:
  if config.rope is None or written.rope is None:
    return False
  width = config.layers[0].mixer.rotated
  (ours, factor), (theirs, other) = (
    frequencies(c.rope, width, config.max_positions) for c in (config, written)
  )
  return factor == other and np.allclose(ours, theirs, rtol=FREQUENCY_TOLERANCE, atol=0)


def _as_float32(value):
  """The same config with all numbers as a file holds them."""
  if isinstance(value, float):
    return float(str(np.float32(value)))
  if isinstance(value, tuple):
    return tuple(map(_as_float32, value))
  if dataclasses.is_dataclass(value):
    fields = [field.name for field in dataclasses.fields(value)]
    return dataclasses.replace(value, **{f: _as_float32(getattr(value, f)) for f in fields})
  return value
