"""Typed reading of the metadata that belongs to an architecture."""

import dataclasses
from typing import Any

from model.safetensors_io import Tensor

REQUIRED = object()  # the default of a key that must be there


@dataclasses.dataclass(frozen=True)
class Fields:
  """The metadata under `name` (the keys begin with it), and the tensors of the file.

  Each method returns the default where the key is absent, and raises ValueError where there is no
  default or the value is of another kind. Arrays with a value a layer count as that value where all
  layers have the same.
  """

  name: str
  metadata: dict[str, Any]
  tensors: dict[str, Tensor]

  def key(self, key: str) -> str:
    return f'{self.name}.{key}'

  def size(self, key: str, default: Any = REQUIRED) -> int:
    """An integer of at least 1."""
    return self._read(key, default, lambda v: type(v) is int and v >= 1, 'an integer of at least 1')

  def count(self, key: str, default: Any = REQUIRED) -> int:
    """An integer of at least 0."""
    return self._read(key, default, lambda v: type(v) is int and v >= 0, 'an integer of at least 0')

  def number(self, key: str, default: Any = REQUIRED) -> float:
    return self._read(key, default, lambda v: type(v) in (int, float), 'a number')

  def flag(self, key: str, default: bool) -> bool:
    return self._read(key, default, lambda v: type(v) is bool, 'true or false')

  def text(self, key: str, default: str) -> str:
    return self._read(key, default, lambda v: type(v) is str, 'a string')

  def refuse(self, key: str, harmless: Any) -> None:
    """Raises ValueError where a key asks for something that is not computed here."""
    value = self.metadata.get(self.key(key), harmless)
    if value != harmless:
      raise ValueError(f'{self.key(key)} = {value!r} is not supported; supported: {harmless!r}')

  def _read(self, key, default, fits, what):
    value = self.metadata.get(self.key(key), default)
    if value is REQUIRED:
      raise ValueError(f'{self.key(key)} is missing')
    if isinstance(value, list) and value:
      if any(v != value[0] for v in value):
        raise ValueError(f'{self.key(key)} differs from layer to layer, which is not supported')
      value = value[0]
    if value is not default and not fits(value):
      raise ValueError(f'{self.key(key)} must be {what}, not {value!r}')
    return value
