"""Scores and selections of units, against numpy in float64 and brute force."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from ops import structure

# Float32 sums of some hundred products of order 1.
TOLERANCE = 1e-4


def _case(rng, inputs=12, outputs=7, tokens=40):
  mixing_II = rng.normal(size=(inputs, inputs))
  x_TI = rng.normal(size=(tokens, inputs)) @ mixing_II
  return x_TI, rng.normal(size=(inputs, outputs)), x_TI.T @ x_TI / tokens


@pytest.mark.parametrize('axis, run', [(0, 1), (0, 3), (1, 1), (1, 4)])
def test_energy_is_the_sum_of_squares_of_each_unit(rng, axis, run):
  w = rng.normal(size=(6, 8)).astype(np.float32)
  units = np.split(w.astype(np.float64), w.shape[axis] // run, axis)
  expected = [np.square(unit).sum() for unit in units]
  np.testing.assert_allclose(structure.energy(w, axis, run), expected, rtol=1e-5)


def test_energy_of_a_vector(rng):
  w = rng.normal(size=6).astype(np.float32)
  np.testing.assert_allclose(
    structure.energy(w, 0, 2), np.square(w).reshape(3, 2).sum(1), rtol=1e-5
  )


@pytest.mark.parametrize('run', [1, 3])
def test_the_removal_error_is_that_of_setting_the_inputs_to_zero(rng, run):
  x_TI, w_IO, covariance_II = _case(rng)
  found = structure.removal_error(jnp.float32(covariance_II), jnp.float32(w_IO), run)
  for unit in range(12 // run):
    without_TI = x_TI.copy()
    without_TI[:, unit * run : (unit + 1) * run] = 0
    expected = np.square(x_TI @ w_IO - without_TI @ w_IO).sum(1).mean()
    assert float(found[unit]) == pytest.approx(expected, rel=TOLERANCE)


def test_the_removal_error_of_single_inputs_is_the_product_of_two_norms(rng):
  x_TI, w_IO, covariance_II = _case(rng)
  found = structure.removal_error(jnp.float32(covariance_II), jnp.float32(w_IO))
  expected = np.square(x_TI).mean(0) * np.square(w_IO).sum(1)
  np.testing.assert_allclose(found, expected, rtol=TOLERANCE)


def test_best_are_in_order_and_ties_keep_the_earlier():
  assert structure.best(np.array([3.0, 1, 3, 2, 3]), 2).tolist() == [0, 2]
  assert structure.best(np.array([1.0, 4, 0, 2]), 3).tolist() == [0, 1, 3]


def test_scores_that_are_not_finite_are_refused():
  with pytest.raises(ValueError, match='NaN or infinite'):
    structure.best(np.array([1.0, np.nan]), 1)
  with pytest.raises(ValueError, match='NaN or infinite'):
    structure.allocate([np.ones(4), np.array([1.0, np.inf, 1, 1])], 4, 1)


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('multiple', [1, 2])
def test_the_allocation_keeps_the_highest_sum_of_scores(seed, multiple):
  """Among all allocations of the same total, by brute force."""
  rng = np.random.default_rng(seed)
  scores = [rng.exponential(size=6) * scale for scale in (1, 2, 0.5)]
  total = 10
  found = structure.allocate(scores, total, multiple)
  assert sum(found) == total and all(n % multiple == 0 and n >= multiple for n in found)
  worth = lambda counts: sum(np.sort(s)[::-1][:n].sum() for s, n in zip(scores, counts))
  choices = itertools.product(range(multiple, 7, multiple), repeat=3)
  best = max(worth(counts) for counts in choices if sum(counts) == total)
  assert worth(found) == pytest.approx(best)


def test_an_allocation_that_cannot_be_is_refused():
  with pytest.raises(ValueError, match='4 units are too few for 3 layers that keep at least 2'):
    structure.allocate([np.ones(6)] * 3, 4, 2)
  with pytest.raises(ValueError, match='too few'):
    structure.allocate([np.ones(3), np.ones(8)], 8, 4)


def test_the_distance_is_one_minus_the_cosine(rng):
  x, y = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
  cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
  np.testing.assert_allclose(structure.distance(x, y), 1 - cosine, atol=1e-6)
  assert float(structure.distance(jnp.zeros(4), jnp.ones(4))) == 1
  np.testing.assert_allclose(structure.distance(x, 3 * x), 0, atol=1e-6)


def test_refit_is_least_squares(rng):
  x_TI, w_IO, covariance_II = _case(rng)
  kept = np.array([0, 2, 3, 5, 8, 9, 11])
  found = structure.refit(jnp.float32(covariance_II), jnp.float32(w_IO), jnp.array(kept), 0.0)
  expected = np.linalg.lstsq(x_TI[:, kept], x_TI @ w_IO, rcond=None)[0]
  np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)
  error = lambda rows: np.square(x_TI @ w_IO - x_TI[:, kept] @ rows).sum()
  assert error(np.asarray(found)) <= 1.001 * error(expected) < error(w_IO[kept])


def test_damping_keeps_rows_and_uncorrelated_inputs_change_nothing(rng):
  _, w_IO, covariance_II = _case(rng)
  kept = jnp.arange(8)
  far = structure.refit(jnp.float32(covariance_II), jnp.float32(w_IO), kept, 1e9)
  np.testing.assert_allclose(far, w_IO[:8], atol=1e-5)
  diagonal_II = jnp.diag(jnp.arange(1.0, 13))
  same = structure.refit(diagonal_II, jnp.float32(w_IO), kept, 0.01)
  np.testing.assert_array_equal(same, w_IO[:8].astype(np.float32))
  singular = structure.refit(jnp.ones((12, 12)), jnp.float32(w_IO), kept, 0.01)
  assert np.isfinite(singular).all()


def test_principal_axes_diagonalize_in_falling_order(rng):
  _, _, covariance_II = _case(rng)
  axes_II, values_I = structure.principal_axes(covariance_II)
  np.testing.assert_allclose(axes_II.T @ axes_II, np.eye(12), atol=1e-12)
  np.testing.assert_allclose(axes_II.T @ covariance_II @ axes_II, np.diag(values_I), atol=1e-9)
  assert (np.diff(values_I) <= 0).all()
  assert (axes_II[np.abs(axes_II).argmax(0), np.arange(12)] > 0).all()
