"""Products of integers in training, against AQT, numpy and what rounding should be on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import int8_training
from ops.int8_training import Int8Products

DRAWS = 4096


def _problem(rng):
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return draw(5, 32), draw(32, 6), draw(5, 6)


def _rounded(a, axis):
  """What AQT's grid makes of an array, in float64."""
  a = np.asarray(a, np.float64)
  scale = np.abs(a).max(axis, keepdims=True) / 127.5
  return np.clip(np.round(a / scale), -127, 127) * scale


def _product(x, values, backward, engine='own'):
  return Int8Products(values, backward, engine).matmul(x)


def _pulled(x, values, y_bar, backward, engine='own'):
  return jax.vjp(lambda x, v: _product(x, v, backward, engine), x, values)[1](y_bar)


def test_the_product_is_that_of_rounded_numbers_and_aqt_s_to_the_bit(rng):
  x, values, _ = _problem(rng)
  y = jax.jit(_product, static_argnums=2)(x, values, 'float')
  np.testing.assert_allclose(y, _rounded(x, 1) @ _rounded(values, 0), atol=1e-5)
  aqt = jax.jit(lambda x, v: _product(x, v, 'inputs', 'aqt'))(x, values)
  np.testing.assert_array_equal(y, aqt)


@pytest.mark.parametrize('backward', ['float', 'inputs', 'all'])
def test_float_gradients_are_exact_and_the_others_near(rng, backward):
  x, values, y_bar = _problem(rng)
  x_bar, values_bar = _pulled(x, values, y_bar, backward)
  exact = np.asarray(y_bar) @ np.asarray(values).T, np.asarray(x).T @ np.asarray(y_bar)
  for found, want, is_int in zip(
    (x_bar, values_bar), exact, (backward != 'float', backward == 'all')
  ):
    off = np.abs(np.asarray(found) - want).max() / np.abs(want).max()
    assert (1e-4 < off < 0.03) if is_int else off < 1e-5


@pytest.mark.parametrize('backward', ['inputs', 'all'])
@pytest.mark.quick(backward=('all',))
def test_both_engines_have_the_same_gradients_on_average(rng, backward):
  x, values, y_bar = _problem(rng)
  for i in (0, 1):
    # Each shift of the inputs by a hair is another draw.
    draws = [
      [
        np.asarray(_pulled(x * (1 + k * 1e-6), values, y_bar * (1 + k * 1e-6), backward, engine)[i])
        for k in range(24)
      ]
      for engine in ('own', 'aqt')
    ]
    own, aqt = (np.mean(each, 0) for each in draws)
    spread = np.std(draws[0], 0) + np.std(draws[1], 0) + 1e-4
    assert (np.abs(own - aqt) < 4 * spread / np.sqrt(24) + 1e-4).mean() > 0.98


def test_stochastic_rounding_is_right_on_average_and_rounding_to_nearest_is_not(rng):
  x = jnp.asarray(np.append(rng.normal(size=31) * 1e-3, 1.0), jnp.float32)[
    None
  ]  # below half a step
  one = lambda key: int8_training.to_codes(x, 1, key=key)
  codes, scale = jax.vmap(one)(jax.random.split(jax.random.key(0), DRAWS))
  draws = np.asarray(codes, np.float64) * np.asarray(scale, np.float64)
  nearest, step = int8_training.to_codes(x, 1)
  np.testing.assert_array_equal(nearest[0, :-1], 0)
  small, want = draws[:, 0, :-1], np.asarray(x, np.float64)[0, :-1]
  error = lambda n: np.abs(small[:n].mean(0) - want).mean()
  standard = float(step[0, 0]) / 2 / np.sqrt(DRAWS)
  assert error(DRAWS) < 2 * standard
  assert error(DRAWS) < error(DRAWS // 64) / 4  # as 1/sqrt(n): 64 times the draws, an eighth
  assert np.abs(want).mean() > 20 * error(DRAWS)  # the bias of rounding to nearest: all of it


def test_the_same_gradient_is_rounded_in_the_same_way(rng):
  x, values, y_bar = _problem(rng)
  first, again = (_pulled(x, values, y_bar, 'all') for _ in range(2))
  assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
  other, _ = _pulled(x, values, y_bar * 1.0001, 'all')
  assert not np.allclose(other, first[0] * 1.0001, rtol=1e-7)


def test_the_program_multiplies_integers(rng):
  x, values, y_bar = _problem(rng)
  text = jax.jit(lambda x, v, g: _pulled(x, v, g, 'all')).lower(x, values, y_bar).as_text()
  dots = [line for line in text.splitlines() if 'dot_general' in line]
  integers = [line for line in dots if 'xi8>' in line and 'xi32>' in line]
  assert len(integers) == len(dots) == 2
  text = jax.jit(lambda x, v: _product(x, v, 'all')).lower(x, values).as_text()
  assert 'xi8>' in next(line for line in text.splitlines() if 'dot_general' in line)


def test_what_is_stored_is_the_values(rng):
  _, values, _ = _problem(rng)
  assert Int8Products(values).stored() is values
  with pytest.raises(ValueError, match="'some' is not one of float, inputs, all"):
    Int8Products(values, 'some')
  with pytest.raises(ValueError, match='floating, not int8'):
    Int8Products(values.astype(jnp.int8))


@pytest.mark.accelerator
@pytest.mark.skipif(jax.default_backend() == 'cpu', reason='needs a GPU or a TPU')
@pytest.mark.parametrize('shape', [(1024, 128, 256), (1024, 256, 128), (8, 64, 192), (37, 70, 50)])
def test_sums_are_exact_on_the_device_itself(rng, shape):
  rows, inputs, outputs = shape
  a_TI = rng.normal(size=(rows, inputs)).astype(np.float32)
  b_IO = rng.normal(size=(inputs, outputs)).astype(np.float32)
  (a_codes, a_scale), (b_codes, b_scale) = (
    [np.asarray(part) for part in int8_training.to_codes(jnp.asarray(x), axis)]
    for x, axis in ((a_TI, 1), (b_IO, 0))
  )
  expected_TO = (a_codes.astype(np.int64) @ b_codes.astype(np.int64)) * a_scale * b_scale
  y_TO = jax.jit(int8_training.int8_matmul)(a_TI, b_IO)
  np.testing.assert_allclose(y_TO, expected_TO, rtol=1e-5, atol=1e-6)
