"""mxfp4, mxfp8 and nvfp4 bit by bit: against numpy, ml_dtypes and compressed-tensors.

The specifications: OCP Microscaling Formats 1.0 (2023), sections 5 and 6; NVIDIA 2025,
https://arxiv.org/abs/2509.25149.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ops import formats, quantized, scales
from ops.quantized import FORMATS, quantize

NAMES = ('mxfp4', 'mxfp8', 'nvfp4')
MX = ('mxfp4', 'mxfp8')
ELEMENTS = {
  'mxfp4': ml_dtypes.float4_e2m1fn,
  'mxfp8': ml_dtypes.float8_e4m3fn,
  'nvfp4': ml_dtypes.float4_e2m1fn,
}
TOP = {'mxfp4': 6.0, 'mxfp8': 448.0, 'nvfp4': 6.0}
EMAX = {'mxfp4': 2, 'mxfp8': 8}  # 4 and 256 are the largest powers of two of the elements
LEAST = -100  # the exponent of scales that XLA can divide by, where numbers below 2**-126 are zero
FLOAT32 = 2.0**-22  # quotients of float32 may be off by a bit
# What compressed-tensors 0.19.0 makes of some weights; "source" names the calls.
THEIRS = json.loads((pathlib.Path(__file__).parent / 'compressed_tensors_fp4.json').read_text())

jitted = jax.jit(quantize, static_argnames='format')
encode = jax.jit(quantized.encode, static_argnums=3)
to_codes = jax.jit(formats.to_codes, static_argnums=3)


def _weights(rng, inputs=128, outputs=40):
  """Heavy tails, and columns of very different sizes."""
  w_IO = rng.standard_t(3, size=(inputs, outputs)) * 2.0 ** rng.integers(-20, 20, outputs)
  w_IO[:32, 0] = 0  # a block of zeros
  w_IO[::3, 1] = 0
  w_IO[32:64, 2] *= 2.0**-30  # a block far below the others
  w_IO[:, 3] = -np.abs(w_IO[:, 3])
  w_IO[:64, 4] = 2.0 ** rng.integers(-9, 9, 64)  # powers of two
  w_IO[64:, 4] = np.nextafter(np.float32(8), np.float32(0))  # just below the next scale
  return w_IO.astype(np.float32)


def _blocks(w_IO, name):
  return w_IO.reshape(-1, FORMATS[name].block, w_IO.shape[1])


def _codes(q):
  """The bits of all codes, uint8 [I, O]."""
  codes = q.stored_codes()
  return np.asarray(codes).view(np.uint8)


def _element_codes(x, name):
  """The bits that ml_dtypes rounds to, after saturating."""
  return np.clip(x, -TOP[name], TOP[name]).astype(ELEMENTS[name]).view(np.uint8)


def _mx_exponents(w_IO, name):
  """floor(log2(amax)) - emax of each block, by the exact exponents of numpy."""
  amax_JO = np.abs(_blocks(w_IO.astype(np.float64), name)).max(1)
  exponents_JO = np.frexp(amax_JO)[1] - 1 - EMAX[name]
  return np.where(amax_JO > 0, np.maximum(exponents_JO, LEAST), LEAST)


@pytest.mark.parametrize('name', MX)
def test_mx_scales_and_codes_are_those_of_the_specification(rng, name):
  w_IO = _weights(rng)
  q = jitted(jnp.asarray(w_IO), name)
  exponents_JO = _mx_exponents(w_IO, name)
  assert q.scales.dtype == jnp.float8_e8m0fnu
  np.testing.assert_array_equal(np.asarray(q.scales).view(np.uint8), exponents_JO + 127)
  scaled_JgO = _blocks(w_IO.astype(np.float64), name) * 2.0 ** -exponents_JO[:, None]
  assert np.abs(scaled_JgO).max() > TOP[name]  # some saturate
  expected_IO = _element_codes(scaled_JgO, name).reshape(w_IO.shape)
  np.testing.assert_array_equal(_codes(q), expected_IO)
  values = expected_IO.view(ELEMENTS[name]).astype(np.float64).reshape(scaled_JgO.shape)
  exact_IO = (values * 2.0 ** exponents_JO[:, None]).reshape(w_IO.shape)
  np.testing.assert_array_equal(np.asarray(q.dense(), np.float64), exact_IO)


def test_nvfp4_scales_and_codes_are_those_of_the_paper(rng):
  w_IO = rng.standard_t(3, size=(256, 24)).astype(np.float32)
  w_IO[:16, 0] = 0
  w_IO[16:32, 0] *= 2.0**-20  # its scale rounds to zero
  q = jitted(jnp.asarray(w_IO), 'nvfp4')
  amax_JO = np.abs(_blocks(w_IO.astype(np.float64), 'nvfp4')).max(1)
  assert isinstance(q.scales, scales.E4m3Scales)
  np.testing.assert_allclose(q.scales.scale, amax_JO.max() / (6 * 448), rtol=FLOAT32)
  scale = np.float64(q.scales.scale)
  exact_JO = amax_JO / 6 / scale
  expected_JO = np.minimum(exact_JO, 448).astype(ml_dtypes.float8_e4m3fn)
  np.testing.assert_array_equal(q.scales.values, expected_JO)
  assert expected_JO[:2, 0].tolist() == [0, 0] and expected_JO.max() == 448
  step_JO = expected_JO.astype(np.float64) * scale
  scaled_JgO = _blocks(w_IO, 'nvfp4') / np.where(step_JO > 0, step_JO, np.inf)[:, None]
  expected_IO = _element_codes(scaled_JgO, 'nvfp4').reshape(w_IO.shape)
  np.testing.assert_array_equal(_codes(q) & 7, expected_IO & 7)
  live_IO = np.repeat(step_JO > 0, 16, axis=0)
  np.testing.assert_array_equal(_codes(q)[live_IO], expected_IO[live_IO])


def _near(values):
  """Float32 numbers: the values, their middles, and the neighbours of both."""
  values = np.asarray(values, np.float32)
  points = np.concatenate([values, (values[1:] + values[:-1]) / 2])
  inf = np.float32(np.inf)
  return np.concatenate([points, np.nextafter(points, inf), np.nextafter(points, -inf)])


@pytest.mark.parametrize('name', MX)
def test_rounding_is_half_to_even_and_saturates(name):
  every = np.arange(256 if FORMATS[name].bits == 8 else 16, dtype=np.uint8)
  values = every.view(ELEMENTS[name]).astype(np.float32)
  x = _near(np.unique(values[np.isfinite(values)]))
  x = np.concatenate([x, [-0.0, 1e9, -1e9, 2.0**-40], np.linspace(-9, 9, 999)]).astype(np.float32)
  codes = to_codes(jnp.asarray(x)[None, :, None], jnp.ones((1, 1)), None, name)
  np.testing.assert_array_equal(
    np.asarray(codes).view(np.uint8).ravel(), _element_codes(x, name), err_msg=name
  )


def test_the_codebook_is_that_of_e2m1():
  values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
  np.testing.assert_array_equal(formats.E2M1_CODEBOOK, values)
  np.testing.assert_array_equal(np.signbit(formats.E2M1_CODEBOOK), np.signbit(values))


def _their_bytes(name, part, shape):
  return np.frombuffer(bytes.fromhex(THEIRS[name][part]), np.uint8).reshape(shape)


def _their_weights():
  shape = THEIRS['shape']
  words = np.frombuffer(bytes.fromhex(THEIRS['weights']), ml_dtypes.bfloat16)
  return words.reshape(shape).T.astype(np.float32)


@pytest.mark.parametrize('name', NAMES)
def test_bytes_are_those_of_compressed_tensors(name):
  w_IO = _their_weights()
  outputs = w_IO.shape[1]
  q = jitted(jnp.asarray(w_IO), name)
  stored = _their_bytes(name, 'scales', (outputs, -1)).T
  if name == 'nvfp4':
    np.testing.assert_array_equal(np.asarray(q.scales.values).view(np.uint8), stored)
    np.testing.assert_allclose(q.scales.scale, 1 / THEIRS[name]['global_scale'], rtol=FLOAT32)
  else:
    # Their scale is twice ours from 7/4 of a power of two on, so they need not saturate.
    amax_JO = np.abs(_blocks(w_IO, name)).max(1)
    doubled_JO = np.frexp(amax_JO)[0] >= 7 / 8
    assert doubled_JO.any() and not doubled_JO.all()
    np.testing.assert_array_equal(np.asarray(q.scales).view(np.uint8) + doubled_JO, stored)
    q = encode(jnp.asarray(w_IO), jnp.asarray(stored.view(ml_dtypes.float8_e8m0fnu)), None, name)
  theirs = _their_bytes(name, 'values', (outputs, -1)).T
  np.testing.assert_array_equal(np.asarray(q.values).view(np.uint8), theirs)


@pytest.mark.parametrize('name', NAMES)
def test_bytes_are_as_few_as_promised(name):
  w = jitted(jnp.ones((256, 64), jnp.bfloat16), name)
  bits = {'mxfp4': 4 + 8 / 32, 'mxfp8': 8 + 8 / 32, 'nvfp4': 4 + 8 / 16}[name]
  assert w.nbytes == 256 * 64 * bits / 8 + 4 * (name == 'nvfp4')


@pytest.mark.parametrize('name', MX)
def test_mx_values_are_stored_as_they_are(rng, name):
  """Rounding does not change the exponent of a block, so what was rounded rounds to itself."""
  q = jitted(jnp.asarray(_weights(rng)), name)
  again = jitted(q.dense(), name)
  np.testing.assert_array_equal(np.asarray(again.scales), np.asarray(q.scales))
  np.testing.assert_array_equal(_codes(again), _codes(q))


@pytest.mark.parametrize('name', NAMES)
def test_twice_the_weights_have_the_same_codes(rng, name):
  w_IO = jnp.asarray(rng.standard_normal((64, 8)), jnp.float32)
  one = jitted(w_IO, name)
  for factor in (2.0, 2.0**-20, 2.0**30):
    other = jitted(w_IO * factor, name)
    np.testing.assert_array_equal(other.values, one.values)
    np.testing.assert_array_equal(other.dense(), one.dense() * factor)


def test_smaller_blocks_and_finer_scales_lose_less(rng):
  w_IO = jnp.asarray(rng.standard_t(4, size=(512, 64)), jnp.float32)
  loss = lambda name: float(jnp.square(jitted(w_IO, name).dense() - w_IO).mean())
  assert 4 * loss('mxfp8') < loss('nvfp4') < 0.8 * loss('mxfp4')


@pytest.mark.parametrize('name', NAMES)
def test_what_the_formats_lack_is_named(name):
  block, w_IO = FORMATS[name].block, jnp.ones((64, 2))
  with pytest.raises(ValueError, match=f'{name} has no asymmetric form'):
    quantize(w_IO, name, symmetric=False)
  with pytest.raises(ValueError, match=f"scales of {name} .* leave the clip 'mse' out"):
    quantize(w_IO, name, clip='mse')
  with pytest.raises(ValueError, match=f'scales of {name} .* leave double quantization out'):
    quantize(w_IO, name, double=True)
  for size in (-1, 64, 8):
    with pytest.raises(ValueError, match=f'{name} has blocks of {block} inputs, not of {size}'):
      quantize(w_IO, name, group_size=size)
  with pytest.raises(ValueError, match=f'blocks of {block}, which do not divide 40'):
    quantize(jnp.ones((40, 2)), name)
