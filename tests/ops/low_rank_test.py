"""Products of two narrow matrices: what the contract of all weight types does not ask."""

import jax.numpy as jnp
import numpy as np
import pytest

from ops import linear, low_rank, transposed


def _matrix(inputs=12, outputs=9):
  return np.random.default_rng(0).normal(size=(inputs, outputs)).astype(np.float32)


@pytest.mark.parametrize('shape', [(12, 9), (9, 12)])
def test_it_has_the_error_of_the_singular_values_that_are_left_out(shape):
  w_IO = _matrix(*shape)
  w = low_rank.factorise(jnp.asarray(w_IO), 4)
  left, sizes, right = np.linalg.svd(w_IO, full_matrices=False)
  np.testing.assert_allclose(w.dense(), (left[:, :4] * sizes[:4]) @ right[:4], atol=1e-5)
  assert w.rank == 4 and w.nbytes == 4 * 4 * (12 + 9)


def test_rows_and_the_transposed_product():
  w, x = low_rank.factorise(jnp.asarray(_matrix()), 4), _matrix(3, 9)
  index = jnp.asarray([[3, 0], [11, 3]])
  np.testing.assert_allclose(linear.rows(w, index), w.dense()[index], atol=1e-5)
  np.testing.assert_allclose(
    linear.matmul_transposed(jnp.asarray(x), w), x @ w.dense().T, atol=1e-5
  )
  table = transposed.TransposedTensor(w)  # 9 tokens of width 12
  np.testing.assert_allclose(linear.rows(table, index % 9), w.dense().T[index % 9], atol=1e-5)
  np.testing.assert_allclose(
    linear.matmul_transposed(jnp.asarray(_matrix(3, 12)), table),
    _matrix(3, 12) @ w.dense(),
    atol=1e-5,
  )


def test_bad_factors_are_refused():
  with pytest.raises(ValueError, match='from 1 to 9, not 10'):
    low_rank.factorise(jnp.asarray(_matrix()), 10)
  with pytest.raises(ValueError, match='R'):
    low_rank.LowRankTensor(jnp.ones((4, 3)), jnp.ones((2, 5)))
  with pytest.raises(ValueError, match='floating'):
    low_rank.LowRankTensor(jnp.ones((4, 3), jnp.int8), jnp.ones((3, 5)))
