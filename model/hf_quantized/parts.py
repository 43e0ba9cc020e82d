"""The tensors that one quantized matrix consists of on disk."""

from collections.abc import Collection, Mapping

import numpy as np

from model.safetensors_io import DTYPES, Tensor

WORDS = (DTYPES['I32'], DTYPES['U32'])
SCALES = (DTYPES['F16'], DTYPES['BF16'], DTYPES['F32'])


def modules(stored: Mapping[str, Tensor], leaf: str) -> list[str]:
  """The names X of modules that store a tensor X.leaf."""
  end = f'.{leaf}'
  return [name.removesuffix(end) for name in stored if name.endswith(end)]


def take(
  stored: dict[str, Tensor],
  module: str,
  leaf: str,
  dtypes: Collection[np.dtype] | str,
  rank: int | None = None,
) -> Tensor:
  """Removes X.leaf from `stored` and returns it.

  `dtypes` are those that it may have. Raises ValueError if it is absent, or of another dtype or
  number of axes.
  """
  name = f'{module}.{leaf}'
  if name not in stored:
    raise ValueError(f'{name} is missing, but other parts of {module} are there')
  tensor = stored.pop(name)
  if tensor.dtype not in dtypes:
    raise ValueError(f'{name} is {tensor.dtype}, not {" or ".join(map(str, dtypes))}')
  if rank is not None and len(tensor.shape) != rank:
    raise ValueError(f'{name} has the shape {tensor.shape}, not {rank} axes')
  return tensor


def put(stored: dict[str, Tensor], name: str, tensor: Tensor) -> None:
  """Adds a tensor under a name. Raises ValueError if there is one already."""
  if name in stored:
    raise ValueError(f'{name} is stored twice, as a matrix of numbers and as one of codes')
  stored[name] = tensor


def require(tensor: Tensor, name: str, shape: tuple[int, ...]) -> None:
  """Raises ValueError if a tensor has another shape."""
  if tensor.shape != shape:
    raise ValueError(f'{name} has the shape {tensor.shape}; its matrix needs {shape}')


def unpack(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
  """The unsigned integers of so many bits in words along an axis, the lowest bits first: uint8.

  The words are one stream of bits, so that an integer may reach into the next word.
  """
  rows = np.ascontiguousarray(np.moveaxis(words, axis, -1))
  octets = rows.astype(rows.dtype.newbyteorder('<'), copy=False).view(np.uint8)
  if 8 % bits == 0:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = (octets[..., None] >> shifts) & np.uint8(2**bits - 1)
  else:
    stream = np.unpackbits(octets, axis=-1, bitorder='little')
    whole = stream[..., : stream.shape[-1] // bits * bits].reshape(*stream.shape[:-1], -1, bits)
    values = np.packbits(whole, axis=-1, bitorder='little')
  return np.moveaxis(values.reshape(*octets.shape[:-1], -1), -1, axis)
