"""Small integers, several to a byte, along the first axis of a matrix, earliest in the low bits.

Two consecutive rows share a byte at 4 bits, four at 2 bits.
"""

import jax
import jax.numpy as jnp


def pack(codes_IO: jax.Array, bits: int) -> jax.Array:
  """Packs codes in [0, 2**bits) into uint8 [ceil(I * bits / 8), O]; short bytes are filled with 0.

  `bits` divides 8. Raises ValueError if it does not.
  """
  per_byte = _per_byte(bits)
  rows = -codes_IO.shape[0] % per_byte
  codes = jnp.pad(codes_IO.astype(jnp.uint8), ((0, rows), (0, 0)))
  parts = codes.reshape(-1, per_byte, codes.shape[1])
  packed = parts[:, 0]
  for i in range(1, per_byte):
    packed |= parts[:, i] << (i * bits)
  return packed


def unpack(packed: jax.Array, bits: int, rows: int) -> jax.Array:
  """Gives back the first `rows` rows of codes as uint8 [rows, O]."""
  per_byte = _per_byte(bits)
  parts = [(packed >> (i * bits)) & (2**bits - 1) for i in range(per_byte)]
  return jnp.stack(parts, axis=1).reshape(-1, packed.shape[-1])[:rows]


def _per_byte(bits: int) -> int:
  if bits not in (1, 2, 4, 8):
    raise ValueError(f'codes of {bits} bits do not fill a byte evenly; use 1, 2, 4 or 8')
  return 8 // bits
