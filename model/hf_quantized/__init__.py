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
from model.hf_quantized import awq, bitsandbytes, compressed_tensors, fp8, gptq
from model.hf_quantized import files as files
from model.hf_quantized.codes import CodedTensor as CodedTensor
from model.hf_quantized.codes import Codes as Codes
from model.safetensors_io import Tensor

KEY = 'quantization_config'
# Scales of inputs, and of keys and values in a cache.
ACTIVATION_SCALES = (
  *('input_scale', 'activation_scale', 'input_scale_ub', 'q_scale', 'k_scale', 'v_scale'),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """How the files of one quantization method are read.

  read: from the settings (the contents of `quantization_config`) and all tensors of a checkpoint to
    those of the plain model. Nothing is read yet; names, shapes and dtypes are checked, and a
    ValueError names what does not fit.
  file: where older tools wrote the settings, beside a config.json without them.
  unused: last parts of the names of tensors that are left out, because they are about activations,
    which stay floating point here.
  """

  name: str  # `quant_method` in the settings
  read: Callable[[Mapping[str, Any], Mapping[str, Tensor]], dict[str, Tensor]]
  file: str | None = None
  unused: tuple[str, ...] = ()


METHODS = {
  method.name: method
  for method in (
    Method(name='gptq', read=gptq.read, file='quantize_config.json'),
    Method(name='awq', read=awq.read, file='quant_config.json'),
    Method(name='bitsandbytes', read=bitsandbytes.read),
    Method(name='fp8', read=fp8.read, unused=ACTIVATION_SCALES),
    Method(name='fbgemm_fp8', read=fp8.read, unused=ACTIVATION_SCALES),
    Method(name=scheme.METHOD, read=compressed_tensors.read, unused=compressed_tensors.UNUSED),
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
  if 'quant_method' not in found and {'load_in_8bit', 'load_in_4bit'} & found.keys():
    return {'quant_method': 'bitsandbytes', **found}  # its first files do not name it
  return found


def decode(
  found: Mapping[str, Any] | None, stored: Mapping[str, Tensor], say: Callable[[str], None]
) -> dict[str, Tensor]:
  """The tensors of the plain model; those of methods that are not in `METHODS` stay as they are.

  `say` gets a line if tensors are left out. Raises ValueError, naming the tensors, where parts of a
  matrix are missing or do not fit.
  """
  method = METHODS.get(found.get('quant_method')) if found else None
  if method is None:
    return dict(stored)
  used = {name: t for name, t in stored.items() if name.rpartition('.')[2] not in method.unused}
  if len(used) < len(stored):
    say(
      f'activations and caches stay floating point: {len(stored) - len(used)} scales of theirs are '
      'left out'
    )
  return method.read(found, used)
