"""Safetensors files, read and written one tensor at a time.

A model is a mapping from names to `Tensor`, which knows its shape and dtype and reads its values on
request. So a checkpoint is checked before any of it is read, and reading and writing hold one
tensor in memory at a time. The library `safetensors` decides whether a file is sound; the bytes are
mapped here, because its numpy reader lacks the 8-bit float types.

Format: https://github.com/huggingface/safetensors (eight bytes of header length, a JSON header,
the data). Sharded folders have `model.safetensors.index.json`, which maps names to files. Where
PyTorch's `save_model` stores a shared tensor once, the metadata maps its other names to the stored
one.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
  'I64': np.dtype(np.int64),
  'U64': np.dtype(np.uint64),
  'I32': np.dtype(np.int32),
  'U32': np.dtype(np.uint32),
  'I16': np.dtype(np.int16),
  'U16': np.dtype(np.uint16),
  'I8': np.dtype(np.int8),
  'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Other files that hold weights. Pickles run code when they are opened.
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor whose values are read, or made, only when `read` is called."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def read_file(path: str | Path) -> dict[str, Tensor]:
  """Opens one file. `Tensor.read` gives read-only views of the mapped file.

  Raises ValueError, naming the file, if it is truncated, corrupt or of an unknown dtype.
  """
  path = Path(path)
  try:
    with safe_open(path, framework='numpy'):
      pass
  except (SafetensorError, OSError) as error:
    raise ValueError(f'{path} is no sound safetensors file (fetch it again?): {error}') from None
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    header = json.loads(file.read(length))
  metadata = header.pop('__metadata__', None) or {}
  tensors = {name: _stored(path, 8 + length, name, entry) for name, entry in header.items()}
  shared = {name: tensors[kept] for name, kept in metadata.items() if kept in tensors}
  return shared | tensors


def _stored(path, data_start, name, entry):
  if entry['dtype'] not in DTYPES:
    raise ValueError(
      f'{path}: {name} has the dtype {entry["dtype"]}; supported: {", ".join(DTYPES)}'
    )
  shape, dtype = tuple(entry['shape']), DTYPES[entry['dtype']]
  start = data_start + entry['data_offsets'][0]

  def read():
    if 0 in shape:  # nothing to map
      return np.zeros(shape, dtype)
    # Mapped as bytes: numpy does not memory-map every ml_dtypes type, and views are free.
    data = np.memmap(path, np.uint8, 'r', start, (math.prod(shape) * dtype.itemsize,))
    return np.asarray(data).view(dtype).reshape(shape)

  return Tensor(shape, dtype, read)


def read_folder(folder: str | Path) -> dict[str, Tensor]:
  """Opens `model.safetensors` of a folder, or all the shards that its index names.

  The tensors are those of the files: the index may name others, which no shard holds.

  Raises ValueError if there is no safetensors file, a shard is missing, or a file is not sound.
  """
  folder = Path(folder)
  if (folder / SINGLE).is_file():
    return read_file(folder / SINGLE)
  if not (folder / INDEX).is_file():
    raise ValueError(_nothing_to_read(folder))
  shards = sorted(set(_read_index(folder / INDEX).values()))
  absent = [shard for shard in shards if not (folder / shard).is_file()]
  if absent:
    raise ValueError(f'{folder} lacks {len(absent)} of {len(shards)} shards: {", ".join(absent)}')
  tensors = {}
  for shard in shards:
    tensors.update(read_file(folder / shard))
  return tensors


def _read_index(path):
  try:
    weight_map = json.loads(path.read_text())['weight_map']
    flat = all(isinstance(v, str) and Path(v).name == v for v in weight_map.values())
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{path} is no index of safetensors shards: {error!r}') from None
  if not flat:
    raise ValueError(f'{path} names shards outside its own folder')
  return weight_map


def _nothing_to_read(folder):
  names = sorted(path.name for path in folder.iterdir())
  pickles = [name for name in names if name.endswith(_PICKLES)]
  if pickles:
    return (
      f'{folder} holds its weights as pickles ({", ".join(pickles[:4])}), which are not read '
      'because opening one runs code from it. Convert it where you trust it: '
      'transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)'
    )
  return (
    f'{folder} has neither {SINGLE} nor {INDEX}; it holds: {", ".join(names[:20]) or "nothing"}'
  )


def write_file(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
  """Writes one file, each tensor made just before it is written.

  Raises ValueError if a tensor's values have another shape or dtype than announced.
  """
  # Wide types first, so that every tensor starts at a multiple of its item size.
  names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
  header, offset = {'__metadata__': {'format': 'pt'}}, 0
  for name in names:
    tensor, end = tensors[name], offset + tensors[name].nbytes
    header[name] = {
      'dtype': NAMES[tensor.dtype],
      'shape': list(tensor.shape),
      'data_offsets': [offset, end],
    }
    offset = end
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with Path(path).open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name in names:
      file.write(_bytes(name, tensors[name]))


def _bytes(name, tensor):
  values = tensor.read()
  if (values.shape, values.dtype) != (tensor.shape, tensor.dtype):
    raise ValueError(
      f'{name} was announced as {tensor.dtype} {tensor.shape}, but is {values.dtype} {values.shape}'
    )
  return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def write_folder(
  folder: str | Path, tensors: Mapping[str, Tensor], *, max_shard_bytes: int = 5 * 10**9
) -> None:
  """Writes `model.safetensors`, or shards of at most `max_shard_bytes` and their index.

  A tensor larger than a shard gets a shard of its own.
  """
  if max_shard_bytes < 1:
    raise ValueError(f'a shard holds at least one byte, not {max_shard_bytes}')
  folder, shards = Path(folder), _shards(tensors, max_shard_bytes)
  if len(shards) == 1:
    write_file(folder / SINGLE, tensors)
    return
  weight_map = {}
  for number, names in enumerate(shards, 1):
    shard = f'model-{number:05}-of-{len(shards):05}.safetensors'
    write_file(folder / shard, {name: tensors[name] for name in names})
    weight_map.update(dict.fromkeys(names, shard))
  total = sum(tensor.nbytes for tensor in tensors.values())
  index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n')


def _shards(tensors, max_shard_bytes):
  shards, room = [[]], max_shard_bytes
  for name, tensor in tensors.items():
    if shards[-1] and tensor.nbytes > room:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(name)
    room -= tensor.nbytes
  return shards
