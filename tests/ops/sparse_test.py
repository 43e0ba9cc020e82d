"""Masks against every choice that there is and against numpy's sorting, and storage round trips."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import quantized, sparse

PATTERNS = [(1, 4), (2, 4), (4, 8), (8, 16), (2, 3)]


n_of_m_mask = jax.jit(sparse.n_of_m_mask, static_argnums=(1, 2))
compress = jax.jit(sparse.compress, static_argnums=(2, 3))
dense = jax.jit(lambda w: w.dense())


def _drawn(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(('n', 'm'), [(1, 4), (2, 4), (4, 8), (2, 3)])
def test_n_of_m_keeps_the_best_of_all_choices(rng, n, m):
  score_IO = np.abs(rng.normal(size=(3 * m, 4)))
  mask_IO = np.asarray(n_of_m_mask(jnp.asarray(score_IO), n, m))
  choices = np.asarray([np.isin(np.arange(m), c) for c in itertools.combinations(range(m), n)])
  for group, kept in zip(score_IO.reshape(-1, m, 4), mask_IO.reshape(-1, m, 4)):
    sums = choices @ group
    np.testing.assert_array_equal(kept, choices[sums.argmax(0)].T)


@pytest.mark.parametrize(('n', 'm'), PATTERNS)
def test_n_of_m_keeps_exactly_n_whatever_the_values(rng, n, m):
  for score_IO in (
    rng.normal(size=(2 * m, 3)),  # of any sign
    rng.integers(0, 2, (2 * m, 3)),  # with many ties
    np.full((2 * m, 3), np.inf),
    np.where(rng.random((2 * m, 3)) < 0.5, -0.0, 0.0),
  ):
    mask_IO = np.asarray(n_of_m_mask(jnp.asarray(score_IO, jnp.float32), n, m))
    assert (mask_IO.reshape(2, m, 3).sum(1) == n).all()


def test_ties_go_to_the_earlier_input():
  score_IO = jnp.asarray([[1.0], [2.0], [1.0], [1.0], [0.0], [0.0], [0.0], [0.0]])
  assert n_of_m_mask(score_IO, 2, 4)[:, 0].tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
  per_output = sparse.unstructured_mask(score_IO, 0.5, per_output=True)
  assert per_output[:, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
  for whole in (False, True):
    equal = sparse.unstructured_mask(jnp.ones((4, 2)), 0.5, per_output=whole)
    assert equal.tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize('sparsity', [0.0, 0.1, 0.5, 0.625, 0.99])
@pytest.mark.parametrize('per_output', [True, False])
def test_unstructured_masks_drop_the_lowest_by_numpys_sorting(rng, sparsity, per_output):
  score_IO = rng.permutation(16 * 6).reshape(16, 6).astype(np.float32)
  mask_IO = np.asarray(
    sparse.unstructured_mask(jnp.asarray(score_IO), sparsity, per_output=per_output)
  )
  if per_output:
    expected = score_IO >= np.sort(score_IO, 0)[min(round(sparsity * 16), 15)]
    if round(sparsity * 16) == 16:
      expected[:] = False
    assert (mask_IO.sum(0) == 16 - round(sparsity * 16)).all()
  else:
    expected = score_IO >= round(sparsity * 96)  # a permutation: a score is its own rank
    assert mask_IO.sum() == 96 - round(sparsity * 96)
  np.testing.assert_array_equal(mask_IO, expected)


@pytest.mark.parametrize('per_output', [True, False])
def test_scores_may_have_any_sign_and_ties(rng, per_output):
  score_IO = rng.integers(-3, 4, (40, 6)).astype(np.float32) * rng.choice([-0.0, 1.0], (40, 6))
  mask_IO = sparse.unstructured_mask(jnp.asarray(score_IO), 0.4, per_output=per_output)
  pool = score_IO if per_output else score_IO.reshape(-1, 1)
  highest_first = np.argsort(-pool, 0, kind='stable')
  expected = np.zeros(pool.shape, bool)
  np.put_along_axis(expected, highest_first[: len(pool) - round(0.4 * len(pool))], True, 0)
  np.testing.assert_array_equal(mask_IO, expected.reshape(score_IO.shape))


def test_the_number_kept_does_not_depend_on_ties():
  for per_output in (True, False):
    mask_IO = sparse.unstructured_mask(jnp.zeros((10, 3)), 0.3, per_output=per_output)
    assert int(mask_IO.sum()) == 21


def test_scores_are_magnitudes_and_wandas(rng):
  w_IO, norm_I = _drawn(rng, 8, 3).astype(jnp.bfloat16), np.abs(rng.normal(size=8))
  magnitude = np.abs(np.asarray(w_IO, np.float64))
  np.testing.assert_array_equal(sparse.magnitude_score(w_IO), magnitude)
  score = sparse.wanda_score(w_IO, jnp.asarray(norm_I, jnp.float32))
  assert score.dtype == jnp.float32
  np.testing.assert_allclose(score, magnitude * norm_I[:, None], rtol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(('n', 'm'), PATTERNS)
def test_what_is_compressed_comes_back(rng, n, m, dtype):
  w_IO = _drawn(rng, 4 * m, 5).astype(dtype)
  mask_IO = n_of_m_mask(sparse.magnitude_score(w_IO), n, m)
  w = compress(w_IO, mask_IO, n, m)
  assert w.shape == (4 * m, 5) and w.dtype == dtype and w.values.shape == (4 * n, 5)
  np.testing.assert_array_equal(dense(w), np.where(mask_IO, w_IO, 0))


@pytest.mark.parametrize(('n', 'm'), PATTERNS)
def test_groups_that_keep_fewer_than_n_come_back(rng, n, m):
  w_IO = _drawn(rng, 8 * m, 3)
  mask_IO = np.asarray(n_of_m_mask(jnp.abs(w_IO), n, m)) & (rng.random(w_IO.shape) < 0.6)
  mask_IO[:m] = False
  w = compress(w_IO, jnp.asarray(mask_IO), n, m)
  np.testing.assert_array_equal(dense(w), np.where(mask_IO, w_IO, 0))
  assert not np.any(w.values[:n])


def test_values_and_indices_are_stored_in_order():
  w_IO = jnp.asarray([[0.0], [5.0], [0.0], [7.0], [1.0], [2.0], [0.0], [0.0]])
  w = compress(w_IO, w_IO != 0, 2, 4)
  assert w.values[:, 0].tolist() == [5, 7, 1, 2]
  assert w.indices.tolist() == [[0b01_00_11_01]]  # 1, 3, then 0, 1; the earliest in the low bits
  wide = jnp.zeros((16, 1)).at[jnp.asarray([3, 14]), 0].set(1.0)
  assert compress(wide, wide != 0, 2, 16).indices.tolist() == [[0xE3]]
  three = jnp.asarray([[0.0], [1.0], [2.0]])
  assert compress(three, three != 0, 2, 3).indices.tolist() == [[0b10_01]]


def _bytes(w):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(w))


def test_bytes_are_as_few_as_promised(rng):
  w_IO = _drawn(rng, 256, 256).astype(jnp.bfloat16)
  plain = jax.eval_shape(lambda w: sparse.compress(w, w > 0, 2, 4), w_IO)
  small = jax.eval_shape(lambda w: w.map_values(lambda v: quantized.quantize(v, 'int8')), plain)
  assert _bytes(plain) / w_IO.nbytes <= 0.63
  assert _bytes(small) / w_IO.nbytes <= 0.38


def test_values_can_be_quantized_in_place(rng):
  w_IO = _drawn(rng, 32, 4)
  mask_IO = n_of_m_mask(jnp.abs(w_IO), 2, 4)
  plain = compress(w_IO, mask_IO, 2, 4)
  small = plain.map_values(lambda v: quantized.quantize(v, 'int8'))
  assert isinstance(small.values, quantized.QuantizedTensor) and small.shape == (32, 4)
  # Half a step of 255 over the range of each column, and what rounding its scale adds.
  step = np.abs(w_IO).max(0, keepdims=True) / 127.5
  error = np.abs(dense(small) - jnp.where(mask_IO, w_IO, 0))
  assert (error <= step * 1.01).all() and error.max() > 0
  assert not np.any(np.asarray(dense(small))[~np.asarray(mask_IO)])


def test_masks_and_storage_trace_with_leading_axes(rng):
  w_EIO = _drawn(rng, 2, 8, 3)

  @jax.jit
  def run(w_EIO):
    prune = lambda w: compress(w, n_of_m_mask(jnp.abs(w), 2, 4), 2, 4)
    return jax.vmap(prune)(w_EIO)

  stacked = run(w_EIO)
  assert stacked.shape == (2, 8, 3)
  for e in range(2):
    one = compress(w_EIO[e], n_of_m_mask(jnp.abs(w_EIO[e]), 2, 4), 2, 4)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a, e=e: a[e], stacked), one)


def test_bad_patterns_are_named():
  score_IO = jnp.ones((8, 2))
  for n, m in [(0, 4), (4, 4), (5, 4), (2, 32)]:
    with pytest.raises(ValueError, match=f'not {n}:{m}'):
      sparse.n_of_m_mask(score_IO, n, m)
  with pytest.raises(ValueError, match='8 inputs do not divide into groups of 3 for 2:3'):
    sparse.compress(score_IO, score_IO > 0, 2, 3)
  for sparsity in (-0.1, 1.0, float('nan')):
    with pytest.raises(ValueError, match='at least 0 and below 1'):
      sparse.unstructured_mask(score_IO, sparsity, per_output=True)
  with pytest.raises(ValueError, match='axis I'):
    sparse.wanda_score(score_IO, jnp.ones(7))
  with pytest.raises(ValueError, match='axis O'):
    sparse.compress(score_IO, jnp.ones((8, 1), bool), 2, 4)
