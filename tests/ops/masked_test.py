"""Zeros that stay, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import linear, masked, quantized

FLOAT32 = 1e-5


def _problem(rng):
  w_IO = rng.normal(size=(20, 6)).astype(np.float32)
  return jnp.asarray(np.where(rng.random((20, 6)) < 0.5, w_IO, 0)), rng.normal(size=(3, 20))


def test_the_mask_is_that_of_the_exact_zeros_and_takes_a_bit_an_entry(rng):
  w_IO, _ = _problem(rng)
  w = masked.masked(w_IO)
  np.testing.assert_array_equal(w.kept(), np.asarray(w_IO) != 0)
  np.testing.assert_array_equal(w.dense(), w_IO)
  assert w.nbytes == w_IO.nbytes + 3 * 6  # 20 inputs are 3 bytes
  np.testing.assert_array_equal(masked.bare(w), w_IO)


def test_gradients_reach_the_kept_entries_alone(rng):
  w_IO, x = _problem(rng)
  x = jnp.asarray(x, jnp.float32)
  w = masked.masked(w_IO)
  gradient = jax.grad(lambda values: linear.matmul(x, w.map_values(lambda _: values)).sum())(w_IO)
  expected = np.where(np.asarray(w_IO) != 0, np.asarray(x).sum(0)[:, None], 0)
  np.testing.assert_allclose(gradient, expected, atol=FLOAT32)
  moved = w.map_values(lambda values: values + 1)  # what an optimizer with momentum might do
  np.testing.assert_array_equal(moved.dense() == 0, np.asarray(w_IO) == 0)


def test_a_given_mask_sets_zeros(rng):
  w_IO, _ = _problem(rng)
  mask_IO = rng.random(w_IO.shape) < 0.3
  np.testing.assert_array_equal(
    masked.masked(w_IO, jnp.asarray(mask_IO)).dense(), np.where(mask_IO, w_IO, 0)
  )
  with pytest.raises(ValueError, match='axis'):
    masked.masked(w_IO, jnp.ones((20, 5), bool))


def test_codes_are_not_bared(rng):
  w = masked.masked(_problem(rng)[0]).map_values(lambda v: quantized.quantize(v, 'int8'))
  with pytest.raises(ValueError, match='already quantized'):
    masked.bare(w)
