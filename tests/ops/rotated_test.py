"""Rotations against Kronecker products in float64, and the weight that rotates its inputs."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from ops import quantized, rotated
from ops.linear import core, matmul, with_core

WIDTHS = [1, 2, 3, 8, 9, 12, 48, 64, 80, 128, 192, 576]


def _matrix(width):
  return functools.reduce(np.kron, rotated.factors(width), np.ones((1, 1)))


@pytest.mark.parametrize('width', WIDTHS)
def test_the_transform_is_the_kronecker_product(rng, width):
  matrix = _matrix(width)
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-12)
  x = rng.normal(size=(3, 5, width))
  np.testing.assert_allclose(rotated.rotate(x), x @ matrix, atol=1e-12)
  np.testing.assert_allclose(rotated.rotate(x, inverse=True), x @ matrix.T, atol=1e-12)


def test_powers_of_two_are_hadamards():
  matrix = _matrix(256)
  assert set(np.round(np.unique(matrix * 16), 12)) == {-1.0, 1.0}
  assert max(len(f) for f in rotated.factors(2**13)) <= rotated.LARGEST_FACTOR


def test_blocks_and_strides(rng):
  x = rng.normal(size=(4, 24))
  blocks = np.kron(np.eye(3), _matrix(8))
  np.testing.assert_allclose(rotated.rotate(x, 8), x @ blocks, atol=1e-12)
  across = np.kron(_matrix(6), np.eye(4))
  np.testing.assert_allclose(rotated.rotate(x, inner=4), x @ across, atol=1e-12)
  np.testing.assert_allclose(rotated.rotate(x, inner=4, inverse=True), x @ across.T, atol=1e-12)
  both = np.kron(np.eye(2), np.kron(_matrix(3), np.eye(4)))
  np.testing.assert_allclose(rotated.rotate(x, 3, inner=4), x @ both, atol=1e-12)
  with pytest.raises(ValueError, match='24 entries do not divide into blocks of 7 x 2'):
    rotated.rotate(x, 7, inner=2)


@pytest.mark.parametrize('inner', [1, 8])
def test_the_weight_multiplies_like_the_one_it_was_made_of(rng, inner):
  w_IO = jnp.asarray(rng.normal(size=(48, 10)), jnp.float32)
  x_TI = jnp.asarray(rng.normal(size=(5, 48)), jnp.float32)
  w = rotated.rotated(w_IO, inner)
  np.testing.assert_allclose(w.dense(), w_IO, atol=1e-5)
  np.testing.assert_allclose(matmul(x_TI, w), x_TI @ w_IO, atol=1e-4)
  assert np.abs(np.asarray(w.weight) - w_IO).max() > 0.1
  assert w.nbytes == w_IO.nbytes and w.shape == (48, 10)


def test_outliers_of_the_inputs_are_spread(rng):
  x = rng.normal(size=(100, 256))
  x[:, 7] *= 100
  kurtosis = lambda a: (a**4).mean() / (a**2).mean() ** 2
  assert kurtosis(x) > 50 and kurtosis(rotated.rotate(x)) < 5


def test_the_core_is_what_is_compressed(rng):
  w = rotated.rotated(jnp.asarray(rng.normal(size=(64, 16)), jnp.float32))
  coarse = with_core(w, quantized.quantize(core(w), 'int8'))
  assert isinstance(coarse, rotated.RotatedTensor)
  assert isinstance(core(coarse), quantized.QuantizedTensor)
  np.testing.assert_allclose(coarse.dense(), w.dense(), atol=0.05)
  plain = jnp.ones((2, 2))
  assert core(plain) is plain and with_core(plain, 3) == 3
