"""Rounded inputs against numpy: codes, integer sums, saturation, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import activations, linear, quantized
from ops.activations import ActivationQuantized, quantize_activations

INPUTS, OUTPUTS = 64, 24
ULPS = 4 * 2.0**-24  # two products and a division in float32, of sums that are exact

WEIGHTS = {
  'int8': {'format': 'int8'},
  'int4': {'format': 'int4', 'group_size': -1},
  'int3': {'format': 'int3', 'group_size': -1},
}
FLOATING = {
  'groups': {'format': 'int8', 'group_size': 16},
  'asymmetric': {'format': 'int8', 'symmetric': False},
  'nf4': {'format': 'nf4'},
}
quantize = jax.jit(quantized.quantize, static_argnames=('format', 'group_size', 'symmetric'))
matmul, to_dense = jax.jit(linear.matmul), jax.jit(linear.dense)
bits = pytest.mark.parametrize('bits', [8, 4])


def _codes(x, top, absmax=None):
  """Codes and scales, computed in float64 from the same float32 scale."""
  absmax = np.abs(x).max(-1, keepdims=True) if absmax is None else np.float32(absmax)
  scale = np.where(absmax == 0, np.float32(1), absmax / np.float32(top)).astype(np.float32)
  return np.clip(np.round(x / scale), -top, top).astype(np.int64), scale.astype(np.float64)


def _example(rng, **options):
  w_IO = jnp.asarray(rng.standard_normal((INPUTS, OUTPUTS)), jnp.float32)
  x = rng.standard_normal((3, 5, INPUTS)).astype(np.float32) * 10.0 ** rng.integers(
    -3, 4, (3, 5, 1)
  )
  return x.astype(np.float32), quantize(w_IO, **options)


@bits
@pytest.mark.parametrize('static', [False, True])
@pytest.mark.parametrize('name', WEIGHTS)
def test_the_integer_product_is_that_of_numpy(rng, name, bits, static):
  x, w = _example(rng, **WEIGHTS[name])
  absmax = 50.0 if static else None  # larger inputs saturate
  wrapped = quantize_activations(w, bits, absmax=None if absmax is None else jnp.float32(absmax))
  codes, scale = _codes(x, 2 ** (bits - 1) - 1, absmax)
  sums = codes @ np.asarray(w.codes(), np.int64)
  expected = sums * scale * np.asarray(w.scales, np.float64)
  actual = np.asarray(matmul(jnp.asarray(x), wrapped))
  np.testing.assert_allclose(actual, expected, rtol=ULPS)


def test_the_sum_is_of_integers_in_the_compiled_program(rng):
  x, w = _example(rng, format='int8')
  text = jax.jit(linear.matmul).lower(jnp.asarray(x), quantize_activations(w)).as_text()
  assert 'xi8>' in text and 'xi32>' in text
  assert not [l for l in text.splitlines() if 'dot_general' in l and 'xf32>) ->' in l]


def test_sums_that_float32_could_not_hold_are_exact():
  inputs = 2**12
  w_IO = jnp.full((inputs, 1), 127.5).at[0].set(100)  # codes 127 and 100
  x = jnp.full((1, inputs), 127.0).at[0, 1].set(1)
  w = quantized.quantize(w_IO, 'int8')
  expected = 127 * 127 * (inputs - 2) + 127 * 100 + 127
  assert expected > 2**24 and int(w.codes()[0, 0]) == 100
  y = linear.matmul(x, quantize_activations(w))
  assert float(y[0, 0]) == np.float32(expected) * np.float32(w.scales[0, 0])


@bits
@pytest.mark.parametrize('name', FLOATING)
def test_other_weights_multiply_the_rounded_inputs(rng, name, bits):
  x, w = _example(rng, **FLOATING[name])
  codes, scale = _codes(x, 2 ** (bits - 1) - 1)
  expected = (codes @ np.asarray(to_dense(w), np.float64)) * scale
  actual = matmul(jnp.asarray(x), quantize_activations(w, bits))
  # 64 products in float32, relative to the largest of them.
  np.testing.assert_allclose(
    actual / scale, expected / scale, atol=1e-3 * (1 if bits == 8 else 0.1)
  )


@bits
def test_rounding_moves_products_by_no_more_than_half_steps(rng, bits):
  x, w = _example(rng, format='int8')
  y = np.asarray(matmul(jnp.asarray(x), quantize_activations(w, bits)), np.float64)
  w_IO = np.asarray(to_dense(w), np.float64)
  half_step = np.abs(x).max(-1, keepdims=True) / (2 ** (bits - 1) - 1) / 2
  assert (np.abs(y - x @ w_IO) <= 1.0001 * half_step * np.abs(w_IO).sum(0)).all()
  assert np.abs(y - x @ w_IO).max() > 0


def test_half_precision_overflows_no_sooner_than_the_result(rng):
  w_IO = jnp.asarray(rng.uniform(0, 30, (INPUTS, OUTPUTS)), jnp.float16)
  x = jnp.full((1, INPUTS), 1.0, jnp.float16)
  y = linear.matmul(x, quantize_activations(w_IO))
  assert y.dtype == jnp.float16
  np.testing.assert_allclose(y[0], np.asarray(w_IO, np.float64).sum(0), rtol=2**-10)


def test_zeros_tiny_values_and_nans():
  w = quantize_activations(quantized.quantize(jnp.ones((4, 2)), 'int8'))
  x = jnp.array([[0.0, 0, 0, 0], [1e-38, 0, 0, 0], [jnp.nan, 1, 1, 1]])
  y = np.asarray(linear.matmul(x, w))
  assert (y[:1] == 0).all() and np.abs(y[1]).max() < 1e-37 and np.isnan(y[2]).all()


def test_gradients_pass_through_but_not_to_saturated_inputs(rng):
  _, w = _example(rng, format='int8')
  x = jnp.asarray(rng.standard_normal((4, INPUTS)), jnp.float32)
  y_bar = rng.standard_normal((4, OUTPUTS))
  loss = lambda x, w: jnp.sum(linear.matmul(x, w) * jnp.asarray(y_bar, jnp.float32))
  through = y_bar @ np.asarray(to_dense(w), np.float64).T
  found = jax.grad(loss)(x, quantize_activations(w))
  np.testing.assert_allclose(found, through, atol=1e-4)
  found = jax.grad(loss)(x, quantize_activations(w, absmax=jnp.float32(1)))
  np.testing.assert_allclose(found, through * (np.abs(x) <= 1), atol=1e-4)


def test_gradients_of_the_weight_are_those_at_the_rounded_inputs(rng):
  w_IO = jnp.asarray(rng.standard_normal((INPUTS, OUTPUTS)), jnp.float32)
  x = jnp.asarray(rng.standard_normal((4, INPUTS)), jnp.float32)
  y_bar = rng.standard_normal((4, OUTPUTS))
  loss = lambda w: jnp.sum(linear.matmul(x, w) * jnp.asarray(y_bar, jnp.float32))
  found = jax.grad(loss)(quantize_activations(w_IO, 4, absmax=jnp.float32(2)))
  codes, scale = _codes(np.asarray(x), 7, 2.0)
  np.testing.assert_allclose(found.values, (codes * scale).T @ y_bar, atol=1e-5)
  assert found.scale == 0


def test_bytes_count_the_static_scale(rng):
  _, w = _example(rng, format='int8')
  assert quantize_activations(w).nbytes == w.nbytes
  assert quantize_activations(w, absmax=jnp.float32(1)).nbytes == w.nbytes + 4


def test_only_the_integer_product_has_a_kernel(rng):
  _, w = _example(rng, format='int8')
  assert linear.kernel(quantize_activations(w), 'gpu').startswith('XLA, int8 by int8; ')
  assert linear.kernel(quantize_activations(w), 'cpu') is None
  assert linear.kernel(quantize_activations(w.dense()), 'gpu') is None


def test_what_makes_no_sense_is_refused(rng):
  _, w = _example(rng, format='int8')
  with pytest.raises(ValueError, match='8 or 4 bits, not 6'):
    quantize_activations(w, 6)
  with pytest.raises(ValueError, match='quantized already, to 8 bits'):
    quantize_activations(quantize_activations(w))
  with pytest.raises(ValueError, match='already quantized'):
    quantize_activations(w).map_values(lambda values: values)
  plain = quantize_activations(w.dense()).map_values(lambda v: quantized.quantize(v, 'int8'))
  assert isinstance(plain, ActivationQuantized)
  assert activations.highest_code(4) == 7
