"""The blocks of GGUF's types, from codes and scales: bytes as llama.cpp lays them out.

  Q4_0, Q5_0, Q8_0  w = d * code             32 weights, signed codes, d in float16
  Q4_1, Q5_1        w = d * code + m         32 weights, codes from 0 on, d and m in float16
  Q4_K              w = d * s * code - dmin * t
                    8 parts of 32 weights, with s and t in 6 bits
  Q6_K              w = d * s * code         16 parts of 16 weights, with s in int8

Codes of one block that share a byte are half of a block apart (ggml/src/ggml-common.h). The `gguf`
package undoes all of these, and so tests them.
"""

import dataclasses

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
  """The levels of a type that has one scale (and minimum) a block: low ... high times the scale."""

  low: int
  high: int
  minimum: bool = False


GRIDS = {
  Kind.Q4_0: Grid(low=-8, high=7),
  Kind.Q5_0: Grid(low=-16, high=15),
  Kind.Q8_0: Grid(low=-128, high=127),
  Kind.Q4_1: Grid(low=0, high=15, minimum=True),
  Kind.Q5_1: Grid(low=0, high=31, minimum=True),
}
BLOCK = 32  # weights of a block of these types


def pack(
  kind: Kind, codes: np.ndarray, scales: np.ndarray, minima: np.ndarray | None = None
) -> np.ndarray:
  """Packs integer codes [rows, inputs] with float16 scales (and minima) [rows, inputs / 32].

  Codes lie within `GRIDS[kind]`. Returns the bytes of each row, uint8 [rows, bytes].
  """
  grid, rows = GRIDS[kind], len(codes)
  blocks = codes.reshape(-1, BLOCK)
  parts = [_bytes(scales)] + ([_bytes(minima)] if grid.minimum else [])
  if kind == Kind.Q8_0:
    parts.append(blocks.astype(np.int8).view(np.uint8))
  else:
    blocks = (blocks.astype(np.int16) - grid.low).astype(np.uint8)
    if grid.high - grid.low > 15:
      parts.append(np.packbits(blocks >> 4, axis=-1, bitorder='little'))
    low, high = np.split(blocks & 15, 2, axis=-1)
    parts.append(low | high << 4)
  return np.concatenate(parts, axis=-1).reshape(rows, -1)


def pack_q4_k(codes, d, dmin, scales, minima) -> np.ndarray:
  """Packs codes 0 ... 15 [blocks, 8, 32], float16 d and dmin [blocks], and 6-bit [blocks, 8]."""
  s, t = scales.astype(np.uint8), minima.astype(np.uint8)
  first = np.concatenate([s[:, :4] | (s[:, 4:] >> 4) << 6, t[:, :4] | (t[:, 4:] >> 4) << 6], 1)
  last = (s[:, 4:] & 15) | (t[:, 4:] & 15) << 4
  pairs = codes.astype(np.uint8).reshape(len(codes), 4, 2, 32)
  low_high = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1)
  return np.concatenate([_bytes(d), _bytes(dmin), first, last, low_high], axis=1)


def pack_q6_k(codes, d, scales) -> np.ndarray:
  """Packs codes -32 ... 31 [blocks, 16, 16], float16 d [blocks] and int8 scales [blocks, 16]."""
  count = len(codes)
  halves = (codes.astype(np.int16) + 32).astype(np.uint8).reshape(count, 2, 4, 32)
  low = halves & 15
  low = np.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
  high = halves >> 4
  high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
  parts = [low.reshape(count, -1), high.reshape(count, -1), scales.astype(np.int8).view(np.uint8)]
  return np.concatenate([*parts, _bytes(d)], axis=1)


def _bytes(values: np.ndarray) -> np.ndarray:
  """Numbers as float16, two bytes each: uint8 [numbers, 2]."""
  return np.ascontiguousarray(values, np.dtype('<f2')).reshape(-1, 1).view(np.uint8)


def row_bytes(kind: Kind, inputs: int) -> int:
  """Bytes of one row of a matrix. Raises ValueError if blocks do not divide it."""
  size, stored = GGML_QUANT_SIZES[kind]
  if inputs % size:
    raise ValueError(f'{kind.name} has blocks of {size}, which do not divide {inputs} inputs')
  return inputs // size * stored
