"""Orthogonal matching pursuit against a loop that solves each step by least squares."""

import numpy as np
import pytest

from ops.solvers import omp


def _oracle(target, atoms, count):
  taken = []
  for _ in range(count):
    fit = np.linalg.lstsq(atoms[taken].T, target, rcond=None)[0] if taken else np.zeros(0)
    left = target - atoms[taken].T @ fit
    scores = np.abs(atoms @ left) / np.linalg.norm(atoms, axis=1)
    scores[taken] = -1
    taken.append(int(scores.argmax()))
  return taken, np.linalg.lstsq(atoms[taken].T, target, rcond=None)[0]


@pytest.mark.parametrize('count', [1, 5])
def test_it_takes_what_the_loop_takes(count):
  random = np.random.default_rng(0)
  atoms = random.normal(size=(40, 12)) * random.uniform(0.2, 5, (40, 1))
  targets = random.normal(size=(6, 12))
  taken, parts = map(np.asarray, omp.pursue(targets, atoms, count=count))
  for i, target in enumerate(targets):
    wanted, fit = _oracle(target, atoms, count)
    assert taken[i].tolist() == wanted
    np.testing.assert_allclose(parts[i], fit, rtol=2e-4, atol=2e-5)


def test_a_sum_of_few_atoms_is_found_again_and_nothing_is_added():
  # Directions at right angles, the case in which the pursuit is exact.
  atoms = np.diag([2.0, 0.5, 1.0, 3.0, 1.0, 1.0])
  target = 0.25 * atoms[1] - 2 * atoms[3]
  taken, parts = map(np.asarray, omp.pursue(target[None], atoms, count=4))
  assert taken[0, :2].tolist() == [3, 1]
  np.testing.assert_allclose(parts[0], [-2, 0.25, 0, 0], atol=1e-6)


def test_atoms_that_are_alike_and_atoms_of_zeros_do_no_harm():
  atoms = np.array([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 0], [0, 1.0, 0]])
  taken, parts = map(np.asarray, omp.pursue(np.array([[3.0, 2.0, 1.0]]), atoms, count=3))
  np.testing.assert_allclose((parts[0][:, None] * atoms[taken[0]]).sum(0), [3, 2, 0], atol=1e-6)
  assert np.isfinite(parts).all()


def test_a_count_that_does_not_fit_is_named():
  with pytest.raises(ValueError, match='4 atoms are to be taken of 9 in 3 dimensions'):
    omp.pursue(np.ones((1, 3)), np.ones((9, 3)), count=4)
