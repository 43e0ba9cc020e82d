"""GGUF files: metadata at once, tensors when they are asked for.

A file holds a header, typed key/value pairs, the names, shapes, types and offsets of the tensors,
and their data, aligned. Everything is little-endian, and shapes have their innermost axis first.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The header is parsed here, because the reader of the `gguf` package takes seconds for the
vocabularies of current models and does not notice a file that was cut off. How blocks of weights
become numbers is left to the tables of that package.
"""

import dataclasses
import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from model.safetensors_io import Tensor

EXTENSION = '.gguf'
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# The types whose values are known to come out as llama.cpp reads them.
KINDS = (
  *(Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1),
  *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
)
# Codes of the types of values, as `struct` calls them.
_SCALARS = dict(enumerate('BbHhIif?')) | {10: 'Q', 11: 'q', 12: 'd'}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_MAX_DIMENSIONS = 4


@dataclasses.dataclass(frozen=True)
class Container:
  """An opened file. Arrays in the metadata are lists; float32 values the shortest decimals."""

  path: Path
  metadata: dict[str, Any]
  tensors: dict[str, Tensor]


def find_file(path: str | Path) -> Path | None:
  """The GGUF file that `path` means: itself, or the only one in a folder without config.json.

  Raises ValueError where there is no such file, or a folder has several and no config.json.
  """
  path = Path(path)
  if path.suffix.lower() == EXTENSION and not path.is_dir():
    if not path.is_file():
      raise ValueError(f'there is no file {path}')
    return path
  if not path.is_dir() or (path / 'config.json').is_file():
    return None
  files = sorted(path.glob(f'*{EXTENSION}'))
  if len(files) > 1:
    names = ', '.join(file.name for file in files[:20])
    raise ValueError(f'{path} has {len(files)} GGUF files; name one of them: {names}')
  return files[0] if files else None


def read(path: str | Path) -> Container:
  """Opens a file and checks that all of its tensors are in it.

  Raises ValueError, naming the file, where it is truncated, damaged, in several parts, of another
  version or byte order, or holds tensors of a type that is not read.
  """
  path = Path(path)
  try:
    with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      metadata, tensors = _parse(_Cursor(data), path)
  except (OSError, ValueError) as error:
    raise ValueError(f'{path} is no GGUF file that can be read: {error}') from None
  return Container(path, metadata, tensors)


def _parse(cursor, path):
  if cursor.bytes(4) != b'GGUF':
    raise ValueError('it does not begin with the letters GGUF')
  version = cursor.scalar('I')
  if version not in VERSIONS:
    swapped = int.from_bytes(version.to_bytes(4, 'little'), 'big') in VERSIONS
    found = 'big-endian' if swapped else f'version {version}'
    raise ValueError(f'it is {found}; only little-endian versions 2 and 3 are read')
  tensor_count, pair_count = cursor.scalar('Q'), cursor.scalar('Q')
  metadata = {}
  for _ in range(pair_count):
    key = cursor.string('a key')
    metadata[key] = cursor.value(cursor.scalar('I'), key)
  if metadata.get('split.count', 1) > 1:
    raise ValueError(
      f'it is one of {metadata["split.count"]} parts; join them first: llama-gguf-split --merge'
    )
  headers = [_Header.read(cursor) for _ in range(tensor_count)]
  alignment = metadata.get('general.alignment', DEFAULT_ALIGNMENT)
  if not isinstance(alignment, int) or alignment < 1:
    raise ValueError(f'general.alignment must be at least 1, not {alignment!r}')
  start = -(-cursor.position // alignment) * alignment
  return metadata, dict(_tensors(path, headers, start, len(cursor.data)))


@dataclasses.dataclass(frozen=True)
class _Header:
  """What the file says of a tensor; the offset counts from the beginning of the data."""

  name: str
  shape: tuple[int, ...]
  kind: int
  offset: int

  @classmethod
  def read(cls, cursor) -> '_Header':
    name, rank = cursor.string('the name of a tensor'), cursor.scalar('I')
    if rank > _MAX_DIMENSIONS:
      raise ValueError(f'the tensor {name} has {rank} dimensions; at most {_MAX_DIMENSIONS} exist')
    shape = tuple(cursor.scalar('Q') for _ in range(rank))[::-1]
    return cls(name, shape, cursor.scalar('I'), cursor.scalar('Q'))


def _tensors(path, headers: list[_Header], start: int, size: int) -> Iterator[tuple[str, Tensor]]:
  _check_kinds(headers)
  seen, outside = set(), []
  for header in headers:
    block, block_bytes = gguf.GGML_QUANT_SIZES[Kind(header.kind)]
    if not header.shape or header.shape[-1] % block:
      raise ValueError(
        f'the tensor {header.name} {header.shape} does not consist of blocks of {block}'
      )
    stored_bytes = math.prod(header.shape) // block * block_bytes
    if start + header.offset + stored_bytes > size:
      outside.append(header.name)
    if header.name in seen:
      raise ValueError(f'the tensor {header.name} is there twice')
    seen.add(header.name)
    yield header.name, _tensor(path, header, start + header.offset, stored_bytes)
  if outside:
    raise ValueError(
      f'it is truncated: {len(outside)} of {len(headers)} tensors lie beyond its end '
      f'({", ".join(outside[:20])}); fetch it again'
    )


def _check_kinds(headers):
  known = {int(kind) for kind in KINDS}
  names = {int(kind): kind.name for kind in Kind}
  wrong = [f'{h.name}: {names.get(h.kind, h.kind)}' for h in headers if h.kind not in known]
  if wrong:
    raise ValueError(
      f'{len(wrong)} tensors have types that are not read ({", ".join(wrong[:20])}); '
      f'read are {", ".join(kind.name for kind in KINDS)}'
    )


def _tensor(path, header, start, stored_bytes):
  def read():
    if not stored_bytes:  # nothing to map
      return np.zeros(header.shape, np.float32)
    data = np.memmap(path, np.uint8, 'r', start, (stored_bytes,))
    rows = np.asarray(data).reshape(*header.shape[:-1], -1)
    values = gguf.quants.dequantize(rows, Kind(header.kind))
    return values.reshape(header.shape).astype(np.float32, copy=False)

  return Tensor(header.shape, np.dtype(np.float32), read)


class _Cursor:
  """Reads little-endian values one after another, and never beyond the end."""

  def __init__(self, data):
    self.data, self.position = data, 0

  def bytes(self, count: int):
    end = self.position + count
    if end > len(self.data):
      raise ValueError('it is truncated within its header; fetch it again')
    found, self.position = self.data[self.position : end], end
    return found

  def scalar(self, code: str):
    return self.scalars(code, 1)[0]

  def scalars(self, code: str, count: int) -> tuple:
    return struct.unpack(f'<{count}{code}', self.bytes(count * struct.calcsize(f'<{code}')))

  def string(self, what: str) -> str:
    text = self.bytes(self.scalar('Q'))
    try:
      return text.decode()
    except UnicodeDecodeError:
      raise ValueError(f'{what} is no UTF-8: {text[:40]!r}') from None

  def value(self, kind: int, key: str):
    if kind != _ARRAY:
      return self._values(kind, 1, key)[0]
    kind, count = self.scalar('I'), self.scalar('Q')
    return self._values(kind, count, key)

  def _values(self, kind, count, key):
    if kind == _STRING:
      return [self.string(key) for _ in range(count)]
    if kind not in _SCALARS:
      raise ValueError(f'{key} has the unknown type {kind}')
    values = self.scalars(_SCALARS[kind], count)
    if kind == _FLOAT32:
      return [float(str(value)) for value in np.asarray(values, np.float32)]
    return list(values)
