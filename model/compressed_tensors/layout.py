"""How compressed-tensors packs codes and masks: numpy arrays in, numpy arrays out.

Matrices are theirs, [O, I]: a row of codes is one stream of bits, of which code i has the bits
[i * bits, (i + 1) * bits), and words are little-endian. Older releases left the last bits of a
word free where `bits` does not divide 32; `unpack_words` reads both forms, which differ in width.

Format: https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized and nvfp4; of
masks, release 0.11, compressors/sparse_compressors.
"""

import numpy as np

WORD = 32  # bits


def words(count: int, bits: int) -> int:
  """How many int32 words `count` codes take."""
  return -(-count * bits // WORD)


def pack_words(codes_OI: np.ndarray, bits: int) -> np.ndarray:
  """Packs unsigned codes of 4 or 8 bits: int32 [O, words]; unused bits are 0."""
  if bits == 4:
    codes_OI = pack_pairs(np.pad(codes_OI, ((0, 0), (0, codes_OI.shape[1] % 2))))
  filled = np.pad(codes_OI.astype(np.uint8), ((0, 0), (0, -codes_OI.shape[1] % 4)))
  return np.ascontiguousarray(filled).view('<i4').astype(np.int32, copy=False)


def unpack_words(words_O_: np.ndarray, bits: int, count: int) -> np.ndarray:
  """Unpacks the first `count` codes of each row of int32 words: uint8 [O, count].

  Raises ValueError where the words are not as many as either form of packing takes.
  """
  rows, found = words_O_.shape
  data = np.ascontiguousarray(words_O_.astype('<i4', copy=False)).view(np.uint8)
  data = data.reshape(rows, -1)
  if found == words(count, bits):
    return _stream(data, bits)[:, :count]
  of_word = WORD // bits
  if found != -(-count // of_word):
    raise ValueError(f'{count} codes of {bits} bits take {words(count, bits)} words, not {found}')
  by_word = _stream(data.reshape(-1, WORD // 8), bits)[:, :of_word]
  return by_word.reshape(rows, -1)[:, :count]


def _stream(data: np.ndarray, bits: int) -> np.ndarray:
  """All whole codes of each row of bytes."""
  if bits == 8:
    return data
  if bits == 4:
    return unpack_pairs(data)
  rows, count = len(data), data.shape[1] * 8 // bits
  flags = np.unpackbits(data, axis=1, bitorder='little')[:, : count * bits]
  powers = (1 << np.arange(bits)).astype(np.uint8)
  return (flags.reshape(rows, count, bits) * powers).sum(-1, dtype=np.uint8)


def pack_pairs(codes_OI: np.ndarray) -> np.ndarray:
  """Packs 4-bit codes two a byte, the first in the low half: uint8 [O, I / 2]."""
  codes_OI = codes_OI.astype(np.uint8)
  return codes_OI[:, ::2] | codes_OI[:, 1::2] << 4


def unpack_pairs(data: np.ndarray) -> np.ndarray:
  """The inverse of `pack_pairs`."""
  return np.stack([data & 15, data >> 4], -1).reshape(len(data), -1)


def pack_mask(mask_OI: np.ndarray) -> np.ndarray:
  """Packs a mask eight a byte, the first lowest: uint8 [O, ceil(I / 8)]."""
  return np.packbits(mask_OI, axis=1, bitorder='little')


def unpack_mask(data: np.ndarray, inputs: int) -> np.ndarray:
  """Unpacks a mask: bool [O, inputs]. Raises ValueError where the bytes are not as many."""
  if data.shape[1] != -(-inputs // 8):
    raise ValueError(f'a mask of {inputs} inputs takes {-(-inputs // 8)} bytes, not {data.shape}')
  return np.unpackbits(data, axis=1, count=inputs, bitorder='little').astype(bool)


def two_of_four(nonzero_OI: np.ndarray) -> np.ndarray | None:
  """A mask of exactly two of every four inputs that holds all nonzero ones, or None.

  Where fewer than two differ from zero, the first of the others fill up.
  """
  rows, inputs = nonzero_OI.shape
  if inputs % 4:
    return None
  groups = nonzero_OI.reshape(rows, -1, 4)
  if (groups.sum(-1) > 2).any():
    return None
  first = np.argsort(~groups, axis=-1, kind='stable')[..., :2]
  mask = np.zeros(groups.shape, bool)
  np.put_along_axis(mask, first, True, -1)
  return mask.reshape(rows, inputs)


def scattered(values: np.ndarray, mask_OI: np.ndarray) -> np.ndarray:
  """Puts flat values where a mask is True, in order of rows; the rest is 0.

  Raises ValueError where the values are not as many.
  """
  if values.size != int(mask_OI.sum()):
    raise ValueError(f'a mask of {int(mask_OI.sum())} weights has {values.size} values')
  dense_OI = np.zeros(mask_OI.shape, values.dtype)
  dense_OI[mask_OI] = values.reshape(-1)
  return dense_OI
