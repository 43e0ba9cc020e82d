"""Tests the byte layout against literal pictures and numpy's bit packing, and round trips."""

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


def test_a_code_may_straddle_two_bytes():
  codes_IO = jnp.asarray([[0b001], [0b010], [0b110], [0b111]])
  assert packing.pack(codes_IO, 3).tolist() == [[0b10_010_001], [0b0000_111_1]]


@settings(max_examples=40, deadline=None)
@given(
  bits=st.integers(1, 8),
  rows=st.sampled_from([1, 8, 13]),
  seed=st.integers(0, 2**32 - 1),
)
def test_unpack_inverts_pack(bits, rows, seed):
  codes_IO = np.random.default_rng(seed).integers(0, 2**bits, (rows, 3))
  packed = pack(jnp.asarray(codes_IO), bits)
  assert packed.shape == (-(-rows * bits // 8), 3) and packed.dtype == jnp.uint8
  unpacked = unpack(packed, bits, rows)
  assert unpacked.dtype == jnp.uint8
  np.testing.assert_array_equal(unpacked, codes_IO)


@pytest.mark.parametrize('bits', range(1, 9))
def test_the_bits_match_numpys_little_endian_stream(rng, bits):
  codes_IO = rng.integers(0, 2**bits, (19, 3))
  each_bit = (codes_IO[:, None] >> np.arange(bits)[:, None]) & 1
  expected = np.packbits(each_bit.reshape(-1, 3).astype(np.uint8), axis=0, bitorder='little')
  np.testing.assert_array_equal(pack(jnp.asarray(codes_IO), bits), expected)


@pytest.mark.parametrize('bits', [3, 4])
def test_leading_axes_are_mapped_over(rng, bits):
  codes_EIO = rng.integers(0, 2**bits, (3, 5, 2))
  packed = jax.vmap(lambda c: packing.pack(c, bits))(jnp.asarray(codes_EIO))
  unpacked = jax.vmap(lambda p: packing.unpack(p, bits, 5))(packed)
  np.testing.assert_array_equal(unpacked, codes_EIO)


@pytest.mark.parametrize('bits', [0, 9, 16])
def test_widths_that_do_not_fit_a_byte_are_refused(bits):
  with pytest.raises(ValueError, match=f'codes of {bits} bits'):
    packing.pack(jnp.zeros((4, 1), jnp.uint8), bits)
  with pytest.raises(ValueError, match='use 1 to 8'):
    packing.unpack(jnp.zeros((4, 1), jnp.uint8), bits, 4)
