"""Checkpoints in the format of Hugging Face, in and out.

  model, tokenizer = hf.load_pretrained('path/or/hub-id')
  hf.save_pretrained(model, tokenizer, 'folder')

A folder holds config.json, model.safetensors (or shards and their index) and the tokenizer's files.
Names and config keys of each family are in `model.hf_names`. A checkpoint is compared with what its
config.json promises before any tensor is read, and tensors are read and written one at a time.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from model import hf_names, native, safetensors_io, transformer
from model.config import ModelConfig
from model.files import atomic_folder, check_replaceable
from model.hf_names import Entry, Family
from model.safetensors_io import Tensor
from model.tokenizer import Tokenizer
from model.tokenizer import check as check_tokenizer
from model.transformer import Transformer
from ops.linear import Weight

CONFIG = 'config.json'
GENERATION = 'generation_config.json'
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
MAX_LISTED = 20
# What a download takes along: weights, configs and tokenizers of the top folder. Some repositories
# keep a second copy of their weights in consolidated*.safetensors.
_WANTED = ('*.json', '*.safetensors', '*.jinja', '*.txt', '*.model')
_UNWANTED = ('*/*', 'consolidated*')


def load_pretrained(path_or_hub_id: str | Path, dtype=None) -> tuple[Transformer, Tokenizer | None]:
  """Loads a model, and its tokenizer where the folder has one.

  `dtype` is that of the activations, to which the parameters are cast too; None keeps parameters as
  stored and computes in float32.

  Raises:
    ValueError: there is no such folder or hub repository; config.json is absent or describes
      something unsupported; tensors are missing, unexpected, misshapen, not finite or of a dtype
      that is not float32, float16 or bfloat16; a file is damaged; the tokenizer has more tokens
      than the model.
  """
  folder = find_folder(path_or_hub_id)
  config = load_config(folder)
  tokenizer = Tokenizer.load(folder)
  if tokenizer is not None:
    check_tokenizer(tokenizer, config.vocab_size)
  if native.is_native(folder):
    return native.read(folder, dtype), tokenizer
  return load_tensors(config, safetensors_io.read_folder(folder), dtype), tokenizer


def find_folder(path_or_hub_id: str | Path) -> Path:
  """The local folder itself, or the one that the hub's files were downloaded into."""
  folder = Path(path_or_hub_id)
  if folder.is_dir():
    return folder
  name = str(path_or_hub_id)
  if folder.exists() or not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name) or name.startswith('.'):
    raise ValueError(f'{name!r} is no folder, nor the name of a Hugging Face repository')
  import huggingface_hub  # seconds to import, and local folders do without

  try:
    found = huggingface_hub.snapshot_download(
      name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
    )
  except (OSError, huggingface_hub.errors.HfHubHTTPError, ValueError) as error:
    raise ValueError(
      f'{name!r} is no local folder, and it could not be fetched from the Hugging Face hub: {error}'
    ) from error
  return Path(found)


def load_config(folder: str | Path) -> ModelConfig:
  """Reads config.json, and the stop tokens of generation_config.json, which chat models extend."""
  folder = Path(folder)
  if native.is_native(folder):
    return native.read_config(folder)
  if not (folder / CONFIG).is_file():
    raise ValueError(f'{folder} has no {CONFIG}, so it is no checkpoint of Hugging Face')
  hf = _read_json(folder / CONFIG)
  if (folder / GENERATION).is_file() and (folder / GENERATION).read_bytes().strip():
    eos = _read_json(folder / GENERATION).get('eos_token_id')
    hf |= {} if eos is None else {'eos_token_id': eos}
  try:
    return hf_names.config_from_hf(hf)
  except ValueError as error:
    raise ValueError(f'{folder / CONFIG}: {error}') from error


def _read_json(path):
  try:
    data = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is no JSON: {error}') from None
  if not isinstance(data, dict):
    raise ValueError(f'{path} must hold one JSON object, not {type(data).__name__}')
  return data


def load_tensors(config: ModelConfig, stored: Mapping[str, Tensor], dtype=None) -> Transformer:
  """Builds the model from the tensors of a checkpoint; see `load_pretrained`."""
  family = hf_names.find(config.family)
  model = transformer.abstract(config, jnp.float32 if dtype is None else dtype)
  parameters = transformer.parameters(model)
  shapes = {path: tuple(param.get_value().shape) for path, param in parameters.items()}
  entries = hf_names.entries(family, config, shapes)
  stored = _cleaned(family, config, stored)
  _check_tensors(entries, stored)
  bad = []
  for entry in entries:
    values = stored[entry.theirs].read()
    if not np.isfinite(values).all():
      bad.append(f'{entry.theirs} {values.shape}')
    for path, part in zip(entry.ours, entry.split(values)):
      # A copy: an array that shares the mapped file would change or die with it.
      parameters[path].set_value(jnp.array(part, dtype, copy=True))
  _raise_listed('the checkpoint has NaN or infinity in', bad)
  return model


def _cleaned(family: Family, config, stored):
  """Drops buffers and the copy of a tied head, and adds the prefix that bare checkpoints lack."""
  ignored = [re.compile(pattern) for pattern in family.ignored]
  kept = {name: t for name, t in stored.items() if not any(p.search(name) for p in ignored)}
  head, table = family.weight_of('head'), family.weight_of('embedding')
  if not any(name.startswith(family.prefix) for name in kept):
    kept = {name if name == head else family.prefix + name: t for name, t in kept.items()}
  if config.tied and head in kept:
    copy = kept.pop(head)
    if table in kept and not _equal(copy, kept[table]):
      raise ValueError(
        f'config.json ties the head to the embedding, but {head} is stored and differs from '
        f'{table}; set tie_word_embeddings to false if the stored head is the right one'
      )
  return kept


def _equal(a: Tensor, b: Tensor) -> bool:
  return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a.read(), b.read())


def _check_tensors(entries: list[Entry], stored: Mapping[str, Tensor]) -> None:
  expected = {entry.theirs: entry.shape for entry in entries}
  problems = [f'missing: {name} {shape}' for name, shape in expected.items() if name not in stored]
  for name, tensor in stored.items():
    if name not in expected:
      problems.append(f'unexpected: {name} {tensor.shape}')
    elif tensor.shape != expected[name]:
      problems.append(f'misshapen: {name} is {tensor.shape}, not {expected[name]}')
    elif tensor.dtype not in FLOATS:
      problems.append(f'unsupported dtype: {name} is {tensor.dtype}')
  _raise_listed('the tensors are not those that config.json describes', problems)


def _raise_listed(what, problems):
  if problems:
    more = len(problems) - MAX_LISTED
    lines = problems[:MAX_LISTED] + ([f'and {more} more'] if more > 0 else [])
    raise ValueError(f'{what} ({len(problems)}):\n  ' + '\n  '.join(lines))


def save_pretrained(
  model: Transformer,
  tokenizer: Tokenizer | None,
  path: str | Path,
  *,
  recipe: dict | None = None,
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a folder that `load_pretrained` can load, and transformers too if all is plain arrays.

  A model with other weight types is written as `model.native` describes, with the recipe that made
  it. The folder appears whole or not at all; an earlier output is replaced.

  Raises:
    ValueError: the folder holds something else; the tokenizer has more tokens than the model;
      config.json of the family cannot describe the model, for one where its layers have different
      widths.
  """
  check_replaceable(path)
  if tokenizer is not None:
    check_tokenizer(tokenizer, model.config.vocab_size)
  compressed = native.is_compressed(model)
  tensors = native.tensors(model) if compressed else to_tensors(model)
  dtype = str(model.embedding.table.get_value().dtype)
  dtypes = {'dtype': dtype, 'torch_dtype': dtype}  # both spellings: transformers 4 and 5
  dtypes |= native.HF_MARK if compressed else {}
  config = {**hf_names.config_to_hf(model.config), **dtypes}
  tokens = {key: config[key] for key in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
  generation = {key: value for key, value in tokens.items() if value is not None}
  with atomic_folder(path) as folder:
    safetensors_io.write_folder(folder, tensors, max_shard_bytes=max_shard_bytes)
    if compressed:
      _write_json(folder / native.MANIFEST, native.manifest(model, recipe))
    _write_json(folder / CONFIG, config)
    _write_json(folder / GENERATION, {'_from_model_config': True, **generation})
    if tokenizer is not None:
      tokenizer.save(folder)


def to_tensors(model: Transformer) -> dict[str, Tensor]:
  """The model under the names of its family, each tensor made when it is read."""
  parameters = transformer.parameters(model)
  arrays = {path: param.get_value() for path, param in parameters.items()}
  packed = [f'{p}: {type(a).__name__}' for p, a in arrays.items() if isinstance(a, Weight)]
  _raise_listed('config.json has no way to describe these compressed weights', packed)
  shapes = {path: array.shape for path, array in arrays.items()}
  family = hf_names.find(model.config.family)
  entries = hf_names.entries(family, model.config, shapes)
  return {entry.theirs: _joined(entry, arrays) for entry in entries}


def _joined(entry: Entry, arrays: Mapping[str, jax.Array]) -> Tensor:
  parts = [arrays[path] for path in entry.ours]
  dtype = np.dtype(jnp.result_type(*parts))

  def read():
    return entry.join([np.asarray(part).astype(dtype, copy=False) for part in parts])

  return Tensor(entry.shape, dtype, read)


def _write_json(path, data):
  path.write_text(json.dumps(data, indent=2, sort_keys=True) + '\n', encoding='utf-8')
