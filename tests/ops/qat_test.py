"""Weights that learn to be quantized: stored bits, and gradients against numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import linear, qat, quantized

FLOAT32 = 1e-5
FORMS = {
  'int8': {'format': 'int8'},
  'int4': {'format': 'int4', 'group_size': 16},
  'int4 asymmetric': {'format': 'int4', 'group_size': 16, 'symmetric': False},
  'int3': {'format': 'int3', 'group_size': 32},
  'int2': {'format': 'int2', 'group_size': 16},
  'nf4': {'format': 'nf4', 'group_size': 16},
  'fp8': {'format': 'fp8_e4m3'},
}
BLOCKS = {'mxfp4': {'format': 'mxfp4'}, 'mxfp8': {'format': 'mxfp8'}, 'nvfp4': {'format': 'nvfp4'}}
ALL = FORMS | BLOCKS
forms = pytest.mark.parametrize('form', ALL)
cases = pytest.mark.parametrize(
  'form, held',
  [*((form, held) for form in FORMS for held in (False, True)), *((f, False) for f in BLOCKS)],
)


def _problem(rng):
  w_IO = jnp.asarray(rng.normal(size=(32, 6)), jnp.float32)
  x = jnp.asarray(rng.normal(size=(5, 32)), jnp.float32)
  return x, w_IO, jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _learn(w_IO, form, held):
  return qat.learn(w_IO, **ALL[form], held=held)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(w_IO, form):
  return quantized.quantize(w_IO, **ALL[form])


matmul, dense = jax.jit(linear.matmul), jax.jit(linear.dense)
stored_form = jax.jit(lambda w: w.stored())


@cases
def test_it_multiplies_as_what_is_stored_bit_for_bit(rng, form, held):
  x, w_IO, _ = _problem(rng)
  w = _learn(w_IO, form, held)
  stored = stored_form(w)
  assert isinstance(stored, quantized.QuantizedTensor)
  for dtype in (jnp.float32, jnp.bfloat16):
    learned, final = (matmul(x.astype(dtype), each) for each in (w, stored))
    assert np.asarray(learned).tobytes() == np.asarray(final).tobytes()
  np.testing.assert_array_equal(dense(w), dense(stored))


@forms
def test_with_scales_that_follow_it_is_rounding_to_nearest(rng, form):
  _, w_IO, _ = _problem(rng)
  stored, expected = stored_form(_learn(w_IO, form, False)), _quantize(w_IO, form)
  for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)


@cases
@pytest.mark.quick(form=('int8', 'int4 asymmetric', 'int2', 'nf4', 'nvfp4'))
def test_gradients_pass_straight_through_the_rounding(rng, form, held):
  x, w_IO, y_bar = _problem(rng)
  w = _learn(w_IO, form, held)
  loss = lambda x, values: jnp.sum(linear.matmul(x, w.map_values(lambda _: values)) * y_bar)
  x_bar, values_bar = jax.jit(jax.grad(loss, (0, 1)))(x, w_IO)
  rounded = np.asarray(dense(stored_form(w)), np.float64)
  np.testing.assert_allclose(x_bar, np.asarray(y_bar) @ rounded.T, atol=FLOAT32)
  expected = np.asarray(x, np.float64).T @ np.asarray(y_bar, np.float64)
  moved = np.abs(np.asarray(values_bar) - expected) > FLOAT32
  # Held scales span the range that they were found for, up to the half step past the highest code.
  assert moved.mean() < (0.2 if held else 1e-9)
  np.testing.assert_array_equal(np.asarray(values_bar)[moved], 0)


@pytest.mark.parametrize('sign', [1, -1])
def test_held_scales_cut_gradients_off_and_have_that_of_lsq(rng, sign):
  x, w_IO, y_bar = _problem(rng)
  w = qat.learn(0.3 * w_IO, 'int4', group_size=16, held=True)
  # Many values are beyond the grid now.
  w = dataclasses.replace(w, values=w_IO, scales=sign * w.scales)

  def loss(values, scales):
    own = dataclasses.replace(w, values=values, scales=scales)
    return jnp.sum(linear.matmul(x, own) * y_bar)

  values_bar, scales_bar = jax.jit(jax.grad(loss, (0, 1)))(w_IO, w.scales)
  g_IO = np.asarray(x, np.float64).T @ np.asarray(y_bar, np.float64)
  scale = np.repeat(np.asarray(w.stored().scales, np.float64), 16, axis=0)
  ratio = np.asarray(w_IO, np.float64) / scale
  inside = (ratio >= -8) & (ratio <= 7)
  assert 0.2 < inside.mean() < 0.9
  np.testing.assert_allclose(values_bar, np.where(inside, g_IO, 0), atol=FLOAT32)
  slope = np.where(inside, np.round(ratio) - ratio, np.clip(np.round(ratio), -8, 7))
  expected = (g_IO * slope).reshape(2, 16, 6).sum(1)
  np.testing.assert_allclose(scales_bar, expected, atol=1e-4)


def test_zero_points_get_no_gradient(rng):
  x, w_IO, y_bar = _problem(rng)
  w = qat.learn(w_IO, 'int4', group_size=16, symmetric=False, held=True)
  loss = lambda w: jnp.sum(linear.matmul(x, w) * y_bar)
  gradient = jax.jit(jax.grad(loss, allow_int=True))(w)
  assert gradient.zeros.dtype == jax.dtypes.float0
  assert gradient.values.shape == w.shape and gradient.scales.shape == (2, 6)


def test_learning_finds_better_codes_than_rounding(rng):
  x, w_IO, _ = _problem(rng)
  target = x @ w_IO
  w = qat.learn(w_IO, 'int2', group_size=32)
  error = lambda values: jnp.mean((linear.matmul(x, w.map_values(lambda _: values)) - target) ** 2)
  step = jax.jit(lambda values: values - 0.2 * jax.grad(error)(values))
  values = w_IO
  best = first = float(error(values))
  for _ in range(200):
    values = step(values)
    best = min(best, float(error(values)))
  assert best < 0.7 * first


def test_what_does_not_fit_is_named(rng):
  _, w_IO, _ = _problem(rng)
  with pytest.raises(ValueError, match='group size of 7 does not divide 32'):
    qat.learn(w_IO, 'int4', group_size=7)
  with pytest.raises(ValueError, match='nf4 has no asymmetric form'):
    qat.learn(w_IO, 'nf4', symmetric=False)
  with pytest.raises(ValueError, match='mxfp4 defines its scales by the values'):
    qat.learn(w_IO, 'mxfp4', held=True)
  w = qat.learn(w_IO, 'int8', held=True)
  with pytest.raises(ValueError, match=r'of the shape \(1, 6\), not \(2, 6\)|the shape \(1, 6\)'):
    dataclasses.replace(w, scales=jnp.ones((2, 6)))
  with pytest.raises(ValueError, match='floating, not int8'):
    dataclasses.replace(w, values=jnp.zeros((32, 6), jnp.int8))
