"""Products with plain arrays against float64 numpy, and the dispatch to weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import adapter_starts, linear, quantized

# Sums of 16 terms of order 1.
FLOAT32 = 1e-5
BFLOAT16 = 2**-6  # of the largest term: 8 bits of mantissa for x, w and the result


def _exact(x, w):
  return np.asarray(x, np.float64) @ np.asarray(w, np.float64)


@pytest.mark.parametrize('shape', [(16,), (3, 16), (2, 3, 16)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_products_keep_leading_axes_and_the_dtype_of_x(rng, shape, dtype):
  x, w_IO = jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(rng.normal(size=(16, 6)))
  y = linear.matmul(x, w_IO)
  assert y.shape == (*shape[:-1], 6) and y.dtype == dtype
  expected = _exact(x, w_IO)
  tolerance = FLOAT32 if dtype == jnp.float32 else BFLOAT16 * np.abs(expected).max()
  np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=FLOAT32, atol=tolerance)


def test_inputs_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match='x has 5 inputs, but the weight takes 4'):
    linear.matmul(jnp.zeros((2, 5)), jnp.zeros((4, 3)))
  with pytest.raises(ValueError, match='x has 5 inputs, but the weight takes 4'):
    linear.matmul(jnp.zeros((2, 5)), quantized.quantize(jnp.ones((4, 3)), 'int8'))


def test_each_group_of_rows_meets_its_own_expert(rng):
  sizes_E = [2, 0, 3, 1]
  x_TI, w_EIO = rng.normal(size=(8, 5)), rng.normal(size=(4, 5, 3))
  y_TO = linear.grouped_matmul(
    jnp.asarray(x_TI, jnp.float32), jnp.asarray(w_EIO, jnp.float32), jnp.asarray(sizes_E)
  )
  expected, start = np.zeros((8, 3)), 0
  for w_IO, size in zip(w_EIO, sizes_E):
    expected[start : start + size] = x_TI[start : start + size] @ w_IO
    start += size
  np.testing.assert_allclose(y_TO, expected, atol=FLOAT32)
  assert not np.any(y_TO[6:])  # rows past the last group


def test_map_values_and_dense_pass_plain_arrays(rng):
  w_IO = jnp.asarray(rng.normal(size=(4, 3)))
  assert linear.dense(w_IO) is w_IO
  np.testing.assert_array_equal(linear.map_values(lambda w: 2 * w, w_IO), 2 * w_IO)


def test_kernels_are_named_for_what_is_fast():
  assert linear.kernel(jnp.zeros((2, 2)), 'cpu') == 'XLA, float32'
  assert linear.kernel(jnp.zeros((2, 2), jnp.bfloat16), 'cpu') is None
  assert linear.kernel(jnp.zeros((2, 2), jnp.bfloat16), 'gpu') == 'XLA, bfloat16'
  w_IO = jnp.ones((32, 2))
  for group_size in (None, 16):
    w = quantized.quantize(w_IO, 'int8', group_size=group_size)
    assert 'int8 converted inside the product' in linear.kernel(w, 'gpu')
  assert linear.kernel(quantized.quantize(w_IO, 'int4'), 'gpu') is None
  assert linear.kernel(quantized.quantize(w_IO, 'int8'), 'cpu') is None


def test_registering_a_type_makes_its_arrays_leaves(monkeypatch):
  monkeypatch.setattr(linear, 'WEIGHT_TYPES', {})

  @linear.weight_type
  @dataclasses.dataclass(frozen=True)
  class Scaled(linear.Weight):
    """factor * values."""

    values: jax.Array = linear.array('IO')
    factor: float

    @property
    def shape(self):
      return self.values.shape

    @property
    def dtype(self):
      return self.values.dtype

    def dense(self):
      return self.factor * self.values

    def map_values(self, fn):
      return dataclasses.replace(self, values=fn(self.values))

  w = Scaled(jnp.ones((4, 3)), 2.0)
  assert list(linear.WEIGHT_TYPES.values()) == [Scaled]
  assert [leaf.shape for leaf in jax.tree.leaves(w)] == [(4, 3)] and w.nbytes == 48
  # The product that a type does not define is that of its dense form.
  np.testing.assert_allclose(linear.matmul(jnp.ones((1, 4)), w), np.full((1, 3), 8.0))


def test_products_of_one_input_are_those_of_each(rng):
  x, shapes = jnp.asarray(rng.normal(size=(2, 16)), jnp.float32), [(16, 6), (16, 4)]
  arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
  codes = [quantized.quantize(w_IO, 'int8') for w_IO in arrays]
  adapted = [adapter_starts.zero(w, 2, scale=1.0, key=jax.random.key(0)) for w in codes]
  adapted = [dataclasses.replace(w, b_RO=w.b_RO + 1) for w in adapted]
  for weights in (arrays, codes, adapted, [arrays[0], codes[1]], [adapted[0], arrays[1]]):
    found, dense = jax.jit(lambda ws: (linear.matmuls(x, ws), [*map(linear.dense, ws)]))(weights)
    for w_IO, y in zip(dense, found, strict=True):
      np.testing.assert_allclose(y, _exact(x, w_IO), atol=FLOAT32)
  with pytest.raises(ValueError, match='x has 16 inputs, but the weight takes 4'):
    linear.matmuls(x, [codes[0], quantized.quantize(jnp.ones((4, 3)), 'int8')])


@pytest.mark.parametrize('platform, rows', [('cuda', 8), ('tpu', 8), ('cpu', 3)])
def test_few_rows_are_filled_up_to_eight_on_an_accelerator(platform, rows):
  traced = jax.jit(linear.matmul).trace(jnp.ones((3, 16)), jnp.ones((16, 5)))
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  (product,) = [line for line in text.splitlines() if 'dot_general' in line]
  assert f'(tensor<{rows}x16xf32>' in product


@pytest.mark.parametrize('shape', [(12, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_gradients_of_a_product(rng, shape, dtype):
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  x, w, y_bar = draw(*shape), draw(5, 7), draw(*shape[:-1], 7)
  found = jax.vjp(linear.matmul, x, w)[1](y_bar)
  x64, w64, y64 = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, w, y_bar))
  for a, expected in zip(found, ((y64 @ w64.T).reshape(shape), x64.T @ y64)):
    assert a.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-7 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(a, np.float64), expected, atol=tolerance)


def test_the_gradient_of_a_matrix_needs_no_transposed_copy_of_the_results():
  x, w = jnp.zeros((64, 16)), jnp.zeros((16, 256))
  text = jax.jit(jax.grad(lambda w: jnp.sum(linear.matmul(x, w) ** 2))).lower(w).as_text()
  assert '256x64' not in text and '256x16' not in text
