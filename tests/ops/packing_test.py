"""The byte layout against literal pictures and numpy's own bit packing, and round trips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops import packing

pack = jax.jit(packing.pack, static_argnums=1)
unpack = jax.jit(packing.unpack, static_argnums=(1, 2))


def test_the_earliest_row_has_the_low_bits():
  codes_IO = jnp.asarray([[0x1, 0xA], [0x2, 0xB], [0x3, 0xC]])
  assert packing.pack(codes_IO, 4).tolist() == [[0x21, 0xBA], [0x03, 0x0C]]
  two_bits = jnp.asarray([[0], [1], [2], [3], [1]])
  assert packing.pack(two_bits, 2).tolist() == [[0b11_10_01_00], [0b01]]
  one_bit = jnp.asarray([[1], [0], [0], [0], [0], [0], [1], [0], [1]])
  assert packing.pack(one_bit, 1).tolist() == [[0b0100_0001], [1]]
  assert packing.pack(jnp.asarray([[255, 7]]), 8).tolist() == [[255, 7]]


@settings(max_examples=40, deadline=None)
@given(
  bits=st.sampled_from([1, 2, 4, 8]),
  rows=st.sampled_from([1, 2, 3, 8, 9]),
  seed=st.integers(0, 2**32 - 1),
)
def test_unpack_gives_back_what_was_packed(bits, rows, seed):
  codes_IO = np.random.default_rng(seed).integers(0, 2**bits, (rows, 3))
  packed = pack(jnp.asarray(codes_IO), bits)
  assert packed.shape == (-(-rows * bits // 8), 3) and packed.dtype == jnp.uint8
  unpacked = unpack(packed, bits, rows)
  assert unpacked.dtype == jnp.uint8
  np.testing.assert_array_equal(unpacked, codes_IO)


def test_single_bits_are_numpys_little_endian_bits(rng):
  bits_IO = rng.integers(0, 2, (19, 3))
  expected = np.packbits(bits_IO.astype(np.uint8), axis=0, bitorder='little')
  np.testing.assert_array_equal(packing.pack(jnp.asarray(bits_IO), 1), expected)


def test_leading_axes_are_mapped_over(rng):
  codes_EIO = rng.integers(0, 16, (3, 5, 2))
  packed = jax.vmap(lambda c: packing.pack(c, 4))(jnp.asarray(codes_EIO))
  unpacked = jax.vmap(lambda p: packing.unpack(p, 4, 5))(packed)
  np.testing.assert_array_equal(unpacked, codes_EIO)


@pytest.mark.parametrize('bits', [0, 3, 5, 16])
def test_widths_that_do_not_fill_a_byte_are_refused(bits):
  with pytest.raises(ValueError, match=f'codes of {bits} bits'):
    packing.pack(jnp.zeros((4, 1), jnp.uint8), bits)
  with pytest.raises(ValueError, match='use 1, 2, 4 or 8'):
    packing.unpack(jnp.zeros((4, 1), jnp.uint8), bits, 4)
