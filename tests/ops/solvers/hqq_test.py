"""Half-quadratic quantization against a float64 numpy form of it, and what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import linear, quantized
from ops.solvers import hqq

FORMATS = ['int8', 'int4', 'int3', 'int2']
INPUTS, OUTPUTS, GROUP = 128, 24, 64
NORM = 0.7
# Sums of 64 powers of differences in float32; errors are down to 1e-3 of the weights.
FLOAT32 = 1e-3

fit = jax.jit(hqq.fit, static_argnames=('format', 'group_size', 'iterations'))
encode = jax.jit(quantized.encode, static_argnums=3)
to_dense = jax.jit(linear.dense)
nearest = jax.jit(quantized.quantize, static_argnames=('format', 'group_size', 'symmetric'))


@pytest.fixture
def heavy_IO(rng):
  """Weights with heavy tails, of the size that trained ones have."""
  return jnp.asarray(0.02 * rng.standard_t(3, size=(INPUTS, OUTPUTS)), jnp.float32)


def _quantize(w_IO, format, **options):
  return encode(w_IO, *fit(w_IO, format, group_size=GROUP, **options), format)


def _error(q, w_IO, norm=NORM):
  """The sum of |w - q|**p of each group, float64 [J, O]."""
  moved = np.abs(np.asarray(to_dense(q), np.float64) - np.asarray(w_IO, np.float64))
  return (moved.reshape(-1, GROUP, OUTPUTS) ** norm).sum(1)


def _oracle(w, bits, iterations):
  """Scale and zero point of one group, step by step as the method is written down."""
  low, high = min(w.min(), 0.0), max(w.max(), 0.0)
  stored = np.float32 if bits == 8 else np.float16
  scale = float(stored((high - low) / (2**bits - 1)))
  zero, beta, found = np.clip(np.rint(-low / scale), 0, 2**bits - 1), 10.0, []
  for _ in range(iterations + 1):
    codes = np.clip(np.rint(w / scale + zero), 0, 2**bits - 1)
    error = w / scale - (codes - zero)
    found.append(((np.abs(error) ** NORM).sum(), zero))
    outliers = np.zeros_like(error)
    for i, e in enumerate(error):
      if e != 0:
        outliers[i] = np.sign(e) * max(abs(e) - abs(e) ** (NORM - 1) / beta, 0)
    zero = float(np.float16((codes - (w / scale - outliers)).mean()))
    beta *= 1.01
  return scale, min(found, key=lambda f: f[0])


@pytest.mark.parametrize('iterations', [1, 20])
@pytest.mark.parametrize('format', FORMATS)
def test_zero_points_are_those_of_numpy(heavy_IO, format, iterations):
  bits = quantized.FORMATS[format].bits
  scales_JO, zeros_JO = fit(heavy_IO, format, group_size=GROUP, iterations=iterations)
  actual = _error(encode(heavy_IO, scales_JO, zeros_JO, format), heavy_IO)
  w_JgO = np.asarray(heavy_IO, np.float64).reshape(-1, GROUP, OUTPUTS)
  same = 0
  for j, o in np.ndindex(actual.shape):
    scale, (error, zero) = _oracle(w_JgO[j, :, o], bits, iterations)
    assert scale == pytest.approx(float(scales_JO[j, o]), rel=1e-6)
    same += zero == float(zeros_JO[j, o])
    # A code that is rounded the other way at a tie leads to another zero point, about as good.
    assert actual[j, o] <= error * scale**NORM * 1.02
  assert same >= 0.8 * actual.size


@pytest.mark.parametrize('format', FORMATS)
def test_no_group_is_worse_than_rounded_to_nearest(rng, heavy_IO, format):
  gaussian_IO = jnp.asarray(rng.normal(size=(INPUTS, OUTPUTS)), jnp.float32)
  for w_IO in (heavy_IO, gaussian_IO, jnp.abs(gaussian_IO)):
    before = _error(nearest(w_IO, format, group_size=GROUP, symmetric=False), w_IO)
    after = _error(_quantize(w_IO, format), w_IO)
    assert np.all(after <= before * (1 + FLOAT32))
    if w_IO is heavy_IO:
      assert after.sum() < (0.98 if format != 'int8' else 1) * before.sum()


def test_more_iterations_lose_no_more(heavy_IO):
  errors = [_error(_quantize(heavy_IO, 'int3', iterations=n), heavy_IO) for n in (1, 5, 20)]
  assert np.all(errors[1] <= errors[0] * (1 + FLOAT32))
  assert np.all(errors[2] <= errors[1] * (1 + FLOAT32))
  assert errors[2].sum() < errors[0].sum()


def test_only_large_errors_are_outliers_and_zero_is_none():
  x = np.asarray([0.0, 1e-30, 0.01, 0.1, -0.1, 0.5, -0.5, 2.0], np.float32)
  actual = np.asarray(hqq.shrink(jnp.asarray(x), 10.0))
  assert np.isfinite(actual).all()
  np.testing.assert_array_equal(actual[:5], np.zeros(5))
  by_hand = [0.5 - 0.5**-0.3 / 10, -0.5 + 0.5**-0.3 / 10, 2 - 2**-0.3 / 10]
  np.testing.assert_allclose(actual[5:], by_hand, rtol=1e-6)


def test_the_unit_of_the_weights_does_not_matter(heavy_IO):
  one, other = (_quantize(w_IO, 'int4') for w_IO in (heavy_IO, 2.0**10 * heavy_IO))
  np.testing.assert_array_equal(one.values, other.values)
  np.testing.assert_array_equal(one.zeros, other.zeros)


@pytest.mark.parametrize('format', ['int4', 'int2'])
def test_nothing_becomes_nan(rng, format):
  w_IO = rng.normal(size=(INPUTS, OUTPUTS)) * 10.0 ** rng.uniform(-20, 20, OUTPUTS)
  w_IO[:, 0], w_IO[:64, 1], w_IO[:, 2], w_IO[3, 3] = 0, 0, 7, 1e30
  q = _quantize(jnp.asarray(w_IO, jnp.float32), format)
  dense_IO = np.asarray(to_dense(q))
  assert np.isfinite(dense_IO).all() and np.isfinite(np.asarray(q.zeros)).all()
  assert not np.any(dense_IO[:, 0]) and not np.any(dense_IO[:64, 1])
  np.testing.assert_allclose(dense_IO[:, 2], 7, rtol=2**-7)


def test_half_precision_weights_have_the_codes_of_their_float32_values(heavy_IO):
  half, full = (
    _quantize(w_IO, 'int4')
    for w_IO in (heavy_IO.astype(jnp.bfloat16), heavy_IO.astype(jnp.bfloat16).astype(jnp.float32))
  )
  np.testing.assert_array_equal(half.values, full.values)
  assert half.dtype == jnp.bfloat16 and half.zeros.dtype == jnp.float16


def test_what_it_cannot_do_is_said():
  for format in ('nf4', 'fp8_e4m3'):
    with pytest.raises(ValueError, match=f'{format} has no asymmetric form'):
      hqq.fit(jnp.ones((64, 2)), format)
  with pytest.raises(ValueError, match='group size of 48 does not divide 64'):
    hqq.fit(jnp.ones((64, 2)), 'int4', group_size=48)
