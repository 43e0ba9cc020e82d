"""The file that holds the tensors of a quantized checkpoint.

AutoGPTQ names it after the settings, such as gptq_model-4bit-128g.safetensors, and says so in
`model_file_base_name`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model import safetensors_io
from model.safetensors_io import Tensor

NAME = 'model_file_base_name'


def read(folder: Path, settings: Mapping[str, Any] | None) -> dict[str, Tensor]:
  """Opens the file that the settings name if it is there, else as `safetensors_io.read_folder`.

  Raises ValueError as that does, and if the name is that of a file elsewhere.
  """
  base = settings and settings.get(NAME)
  if not base:
    return safetensors_io.read_folder(folder)
  if not isinstance(base, str) or Path(base).name != base:
    raise ValueError(f'{NAME} must be a name in {folder}, not {base!r}')
  file = folder / f'{base}.safetensors'
  return safetensors_io.read_file(file) if file.is_file() else safetensors_io.read_folder(folder)
