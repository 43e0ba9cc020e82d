"""The solver with Hessians of no use: none gives NaN or zeroes a layer, and each is told of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import quantized, sparse
from ops.solvers import hessian, obs

GRID = obs.Grid(format='int4', group=16)
HALF, TWO_OF_FOUR = obs.Pruning(sparsity=0.5), obs.Pruning(n=2, m=4)

solve = jax.jit(obs.solve, static_argnames=('grid', 'pruning', 'act_order', 'damping'))
root = jax.jit(hessian.factor, static_argnames='damping')


def _example(inputs, outputs):
  """Weights, and the covariance of inputs that are correlated and of very different sizes."""
  rng = np.random.default_rng(0)
  mixed = rng.standard_normal((2000, 12)) @ rng.standard_normal((12, inputs))
  x_TI = (mixed + rng.standard_normal((2000, inputs))) * np.exp(rng.standard_normal(inputs))
  w_IO = rng.standard_normal((inputs, outputs)).astype(np.float32)
  return w_IO, (x_TI.T @ x_TI / 2000).astype(np.float32)


def _hessians():
  rng = np.random.default_rng(3)
  sample_TI = rng.standard_normal((100, 48)).astype(np.float32)
  twins_TI = sample_TI.copy()
  twins_TI[:, 7] = twins_TI[:, 30]
  unused_TI = sample_TI.copy()
  unused_TI[:, [0, 5, 6, 47]] = 0
  unit, other = np.eye(48, dtype=np.float32), 1 - np.eye(48, dtype=np.float32)
  return {
    # name: the covariance, and (raised, singular, starved, deficient)
    'full rank': (sample_TI.T @ sample_TI, (0, 0, 0, 0)),
    'zero': (0 * unit, (0, 0, 1, 0)),
    'one sample': (sample_TI[:1].T @ sample_TI[:1], (0, 0, 0, 1)),
    'fewer samples than inputs': (sample_TI[:30].T @ sample_TI[:30], (0, 0, 0, 1)),
    'two inputs alike': (twins_TI.T @ twins_TI, (0, 0, 0, 1)),
    'unused inputs': (unused_TI.T @ unused_TI, (0, 0, 0, 0)),
    'one input': (np.diag(np.arange(48) == 9).astype(np.float32), (0, 0, 0, 0)),
    'all inputs alike': (np.ones((48, 48), np.float32), (0, 0, 0, 1)),
    'indefinite': (unit + 5 * other, (3, 0, 0, 1)),
    'more indefinite': (unit - 5 * other, (5, 0, 0, 1)),
    'beyond help': (unit - 1e6 * other, (6, 1, 0, 0)),
    'not a number': (unit + np.nan * other, (6, 1, 0, 0)),
  }


HESSIANS = _hessians()
USES = {
  'dynamic': {'grid': GRID},
  'act-order': {'grid': GRID, 'act_order': True},
  'half': {'pruning': HALF},
  'joint': {'pruning': TWO_OF_FOUR, 'grid': GRID},
}


@pytest.mark.parametrize('name', HESSIANS)
@pytest.mark.parametrize('use', USES)
def test_no_hessian_zeroes_a_layer_and_what_happened_is_told(name, use):
  covariance_II, told = HESSIANS[name]
  w_IO = _example(48, 5)[0]
  solution = solve(w_IO, covariance_II, **USES[use])
  factor, result = solution.factor, np.asarray(solution.w_IO)
  assert tuple(map(int, (factor.raised, factor.singular, factor.starved, factor.deficient))) == told
  assert np.isfinite(result).all()
  nearest = quantized.quantize(w_IO, 'int4', group_size=16).dense()
  zeros = np.asarray(solution.kept_IO).size - np.asarray(solution.kept_IO).sum()
  assert zeros == (0 if 'pruning' not in USES[use] else w_IO.size // 2)
  assert np.linalg.norm(result) > 0.5 * np.linalg.norm(w_IO)
  if name in ('zero', 'beyond help', 'not a number'):  # then it is what it is without a Hessian
    if use in ('dynamic', 'act-order'):
      np.testing.assert_array_equal(result, nearest)
    if use == 'half':
      kept_IO = sparse.unstructured_mask(np.abs(w_IO), 0.5, per_output=False)
      np.testing.assert_array_equal(result, np.where(kept_IO, w_IO, 0))
  if name == 'unused inputs' and use == 'act-order':
    np.testing.assert_array_equal(result[[0, 5, 6, 47]], nearest[jnp.array([0, 5, 6, 47])])


@pytest.mark.parametrize('use', USES)
def test_the_scale_of_the_hessian_does_not_matter(use):
  w_IO, covariance_II = _example(48, 5)
  expected_IO = solve(w_IO, covariance_II, **USES[use]).w_IO
  for scale in (2.0**-66, 2.0**66, 2.0**100):  # powers of two, about 1e-20, 1e20 and 1e30
    result_IO = solve(w_IO, covariance_II * np.float32(scale), **USES[use]).w_IO
    np.testing.assert_array_equal(result_IO, expected_IO)


def test_a_factor_reproduces_the_damped_hessian():
  covariance_II = _example(48, 5)[1]
  factor = root(covariance_II, damping=0.1)
  unit_II = np.eye(48)
  root_II = (np.asarray(factor.feedback_II, np.float64).T + unit_II) * np.asarray(
    factor.stiffness_I
  )
  h_II = covariance_II / np.diag(covariance_II).mean() + 0.1 * unit_II
  np.testing.assert_allclose(root_II @ root_II.T, h_II, atol=1e-5)
  assert (np.tril(root_II, -1) == 0).all()


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize('shape', [(1, 1), (3, 40), (100, 33), (257, 96), (50, 600), (9, 2400)])
@pytest.mark.quick(shape=((3, 40), (257, 96), (50, 600)))
def test_the_gram_matrix_has_float32_sums_of_the_inputs_as_they_are(dtype, shape):
  x_TI = np.random.default_rng(5).standard_normal(shape).astype(dtype)
  panels = jax.jit(hessian.gram)(jnp.asarray(x_TI))
  found = hessian.whole(panels)
  wide_TI = x_TI.astype(np.float64)
  expected, size = wide_TI.T @ wide_TI, np.abs(wide_TI).T @ np.abs(wide_TI)
  assert found.dtype == jnp.float32
  assert (np.abs(found - expected) <= 1e-6 * size).all()
  computed = sum(panel.size for panel in panels) / found.size
  assert computed == 1 if shape[1] < 512 else computed < 0.76
