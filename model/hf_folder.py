"""Folders in the format of Hugging Face, written whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model import safetensors_io
from model.config import ModelConfig
from model.files import atomic_folder, check_replaceable
from model.safetensors_io import Tensor
from model.tokenizer import Tokenizer
from model.tokenizer import check as check_tokenizer

CONFIG = 'config.json'
GENERATION = 'generation_config.json'
SHARD_BYTES = 5 * 10**9
_TOKENS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


def check(path: str | Path, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
  """Raises ValueError if the folder holds something else, or the tokenizer has too many tokens."""
  check_replaceable(path)
  if tokenizer is not None:
    check_tokenizer(tokenizer, config.vocab_size)


def write(
  path: str | Path,
  described: Mapping[str, Any],
  tensors: Mapping[str, Tensor],
  tokenizer: Tokenizer | None,
  *,
  others: Mapping[str, Any] | None = None,
  max_shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a folder; an earlier output is replaced.

  `described` are the contents of config.json, `others` those of further JSON files by name.
  """
  tokens = {key: described[key] for key in _TOKENS if described.get(key) is not None}
  files = {CONFIG: described, GENERATION: {'_from_model_config': True, **tokens}, **(others or {})}
  with atomic_folder(path) as folder:
    safetensors_io.write_folder(folder, tensors, max_shard_bytes=max_shard_bytes)
    for name, data in files.items():
      text = json.dumps(data, indent=2, sort_keys=True) + '\n'
      (folder / name).write_text(text, encoding='utf-8')
    if tokenizer is not None:
      tokenizer.save(folder)


def dtypes(dtype: Any) -> dict[str, str]:
  """The keys of config.json for the dtype of the parameters, as transformers 4 and 5 spell them."""
  return {'dtype': str(dtype), 'torch_dtype': str(dtype)}
