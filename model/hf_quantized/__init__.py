"""Checkpoints of Hugging Face whose matrices other tools have quantized: one row for each method.

`quantization_config` in config.json names the method, which turns the tensors of a file into those
of the plain model. A matrix stored as codes becomes one `CodedTensor` under its usual name, with
the shape (O, I): read, it gives the numbers; asked for `codes`, what they are stored as.

A method is a function (settings, tensors) -> tensors and a row of `METHODS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model.compressed_tensors import scheme
from model.files import read_json
from model.hf_quantized import compressed_tensors, gptq
from model.hf_quantized.codes import CodedTensor as CodedTensor
from model.hf_quantized.codes import Codes as Codes
from model.safetensors_io import Tensor

KEY = 'quantization_config'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """How the files of one quantization method are read.

  read: from the settings (the contents of `quantization_config`) and all tensors of a checkpoint to
    those of the plain model. Nothing is read yet; names, shapes and dtypes are checked, and a
    ValueError names what does not fit.
  file: where older tools wrote the settings, beside a config.json without them.
  """

  name: str  # `quant_method` in the settings
  read: Callable[[Mapping[str, Any], Mapping[str, Tensor]], dict[str, Tensor]]
  file: str | None = None


METHODS = {
  method.name: method
  for method in (
    Method(name='gptq', read=gptq.read, file='quantize_config.json'),
    Method(name=scheme.METHOD, read=compressed_tensors.read),
  )
}


def settings(folder: Path, hf: Mapping[str, Any]) -> dict[str, Any] | None:
  """How the checkpoint of a folder is quantized, from the contents of its config.json.

  The method may be one that `METHODS` does not have. None: config.json says nothing of it, and no
  other file does. Raises ValueError if it is no JSON object.
  """
  found = hf.get(KEY)
  if not found:
    files = ((m.name, folder / m.file) for m in METHODS.values() if m.file is not None)
    stated = [{'quant_method': name, **read_json(path)} for name, path in files if path.is_file()]
    return stated[0] if stated else None
  if not isinstance(found, dict):
    raise ValueError(f'{KEY} in config.json must be a JSON object, not {found!r}')
  return found


def decode(found: Mapping[str, Any] | None, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """The tensors of the plain model; those of methods that are not in `METHODS` stay as they are.

  Raises ValueError, naming the tensors, where parts of a matrix are missing or do not fit.
  """
  method = METHODS.get(found.get('quant_method')) if found else None
  return dict(stored) if method is None else method.read(found, stored)
