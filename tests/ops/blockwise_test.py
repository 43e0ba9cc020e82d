"""Tests 8-bit block-wise codes against bitsandbytes' tables and against brute force in numpy."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ops import blockwise

# SHA-256 of the float32 values of bitsandbytes 0.50.2's `create_dynamic_map(signed)`.
BITSANDBYTES = {
  True: 'e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c',
  False: '305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398',
}
quantize = jax.jit(blockwise.quantize, static_argnames='signed')
SIGNED = pytest.mark.parametrize('signed', [True, False])


def _value(code: int, signed: bool) -> float:
  """What the bits of a code mean: a sign, zeros that count decades, a one, and the fraction."""
  bits = f'{code:08b}'
  sign, bits = (-1.0 if bits[0] == '1' else 1.0, bits[1:]) if signed else (1.0, bits)
  decades, _, fraction = bits.partition('1')
  if not signed:
    decades = decades[1:] if bits[0] == '0' else None
  count = 2 ** len(fraction)
  middle = 0.1 + 0.9 * (int(fraction or '0', 2) + 0.5) / count
  return sign * middle * 10.0 ** -len(decades)


@SIGNED
def test_tables_are_those_of_bitsandbytes(signed):
  values = blockwise.table(signed)
  assert values.dtype == np.float32 and np.all(np.diff(values) > 0)
  assert hashlib.sha256(values.tobytes()).hexdigest() == BITSANDBYTES[signed]


def test_values_are_those_of_the_bits():
  # With a sign, seven bits are left. Their highest one ends the decades and begins the fraction.
  codes = [code for code in range(256) if code & 0x7F]
  want = sorted([*(_value(code, signed=True) for code in codes), 0.0, 1.0])
  np.testing.assert_allclose(blockwise.table(True), want, rtol=1e-6)


def _inputs(rng, signed):
  """Uniform and small numbers, all values and bounds of the table, and their neighbours."""
  values = blockwise.table(signed)
  bounds = (values[:-1] + values[1:]) / np.float32(2)
  small = np.exp(rng.uniform(-20, 0, 20_000)) * (rng.choice([-1, 1], 20_000) if signed else 1)
  near = [np.nextafter(bounds, np.float32(to)) for to in (-2, 2)]
  parts = [rng.uniform(-1, 1, 20_000), small, values, bounds, *near, [0.0, -0.0, 1.0, -1.0]]
  return np.clip(np.concatenate(parts), -1 if signed else 0, 1).astype(np.float32)


@SIGNED
def test_codes_are_the_nearest(rng, signed):
  x, values = _inputs(rng, signed), blockwise.table(signed).astype(np.float64)
  x = x[(x == 0) | (np.abs(x) > values[values > 0][0])]  # smaller ones: the next test
  got = values[np.asarray(_alone(x, signed).codes)[:, 0]]
  best = np.min(np.abs(values[None, :] - x[:, None].astype(np.float64)), axis=1)
  # A bound is rounded to float32, so a number next to one may go either way.
  np.testing.assert_allclose(np.abs(got - x), best, rtol=1e-4, atol=1e-9)


def _alone(x, signed):
  """Codes of numbers that each share a block with 1, so that their scale is 1."""
  rows = jnp.stack([jnp.asarray(x), jnp.ones(len(x))], axis=1)
  return quantize(rows, signed=signed)


@SIGNED
def test_codes_are_those_of_a_binary_search(rng, signed):
  x, values = _inputs(rng, signed), blockwise.table(signed)
  bounds = (values[:-1] + values[1:]) / np.float32(2)
  want = np.searchsorted(bounds, x, side='left')
  if not signed:
    want[(x > 0) & (want == 0)] = 1
  np.testing.assert_array_equal(_alone(x, signed).codes[:, 0], want)


@SIGNED
@pytest.mark.parametrize('shape', [(3, 700), (512,), (2, 3, 256), (5, 1)])
def test_blocks_have_their_own_scales(rng, shape, signed):
  x = rng.normal(size=shape) * np.exp(rng.uniform(-12, 12, shape))
  x = (x if signed else x**2).astype(np.float32)
  q = quantize(jnp.asarray(x), signed=signed)
  assert q.codes.shape == shape and q.codes.dtype == jnp.uint8
  assert q.scales.shape == (*shape[:-1], -(-shape[-1] // 256)) and q.scales.dtype == jnp.float32
  gap = float(np.max(np.diff(blockwise.table(signed))))
  dense = np.asarray(q.dense())
  for start in range(0, shape[-1], 256):
    part = x[..., start : start + 256]
    largest = np.abs(part).max(axis=-1)
    np.testing.assert_array_equal(q.scales[..., start // 256], largest)
    error = np.abs(dense[..., start : start + 256] - part).max(axis=-1)
    assert np.all(error <= 0.51 * gap * largest)


def test_zeros_stay_zero_and_small_squares_do_not_become_it():
  x = jnp.asarray([[0.0, 1e-20, 1e-9, 1.0], [0.0, 0.0, 0.0, 0.0]])
  np.testing.assert_array_equal(quantize(x, signed=False).codes[0, :3], [0, 1, 1])
  for signed in (True, False):
    dense = quantize(x, signed=signed).dense()
    np.testing.assert_array_equal(dense[:, 0], [0, 0])
    np.testing.assert_array_equal(dense[1], np.zeros(4))


@SIGNED
@pytest.mark.parametrize('width', [2048, 1200])  # whole blocks in each shard, and parts of blocks
def test_sharded_arrays_have_the_same_codes(rng, width, signed):
  x = jnp.asarray(np.abs(rng.normal(size=(4, width))), jnp.float32)
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, 'x')))
  one, many = quantize(x, signed=signed), quantize(placed, signed=signed)
  np.testing.assert_array_equal(one.codes, many.codes)
  np.testing.assert_array_equal(one.scales, many.scales)
  np.testing.assert_array_equal(one.dense(), many.dense())
