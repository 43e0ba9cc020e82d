"""Packs integers of 1 to 8 bits into a stream of bits along the first axis of a matrix.

Each column is one stream. Code i occupies the bits [i * bits, (i + 1) * bits) of the stream, and
byte k holds the bits [8 * k, 8 * k + 8), the first of them lowest. At 4 bits, two consecutive rows
share a byte; at 3 bits, eight rows share three bytes, and a code may straddle two bytes.

The pattern repeats every `codes` rows and `size` bytes. Each code costs one shift, and one more if
it straddles two bytes.
"""

import functools
import math

import jax
import jax.numpy as jnp


def pack(codes_IO: jax.Array, bits: int) -> jax.Array:
  """Packs codes in [0, 2**bits) into uint8 [ceil(I * bits / 8), O]; unused bits are 0.

  Raises ValueError unless `bits` is 1 to 8.
  """
  codes, size = _pattern(bits)
  inputs, outputs = codes_IO.shape
  filled = jnp.pad(codes_IO.astype(jnp.uint8), ((0, -inputs % codes), (0, 0)))
  parts = filled.reshape(-1, codes, outputs)
  packed = [
    _union(_shifted(parts[:, i], i * bits - 8 * k) for i in range(codes) if _meets(i, bits, k))
    for k in range(size)
  ]
  return jnp.stack(packed, axis=1).reshape(-1, outputs)[: -(-inputs * bits // 8)]


def unpack(packed: jax.Array, bits: int, rows: int) -> jax.Array:
  """Unpacks the first `rows` rows of codes: uint8 [rows, O]. Raises ValueError as `pack` does."""
  codes, size = _pattern(bits)
  stored, outputs = packed.shape
  if size == 1:  # no code crosses a byte, and XLA fuses this into what reads it
    starts = bits * jnp.arange(codes, dtype=jnp.uint8).reshape(1, codes, 1)
    return ((packed[:, None] >> starts) & jnp.uint8(2**bits - 1)).reshape(-1, outputs)[:rows]
  parts = jnp.pad(packed, ((0, -stored % size), (0, 0))).reshape(-1, size, outputs)
  unpacked = [
    _union(_shifted(parts[:, k], 8 * k - i * bits) for k in range(size) if _meets(i, bits, k))
    & jnp.uint8(2**bits - 1)
    for i in range(codes)
  ]
  return jnp.stack(unpacked, axis=1).reshape(-1, outputs)[:rows]


def _pattern(bits: int) -> tuple[int, int]:
  """Returns the numbers of codes and bytes after which the layout repeats."""
  if bits not in range(1, 9):
    raise ValueError(f'codes of {bits} bits do not fit a byte; use 1 to 8')
  common = math.gcd(bits, 8)
  return 8 // common, bits // common


def _meets(code: int, bits: int, byte: int) -> bool:
  return code * bits < 8 * byte + 8 and 8 * byte < (code + 1) * bits


def _shifted(values, left: int):
  # uint8 drops the bits that are shifted out at either end.
  return values << left if left >= 0 else values >> -left


def _union(parts):
  return functools.reduce(jnp.bitwise_or, parts)
