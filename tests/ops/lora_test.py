"""Adapters against float64 numpy, over plain and quantized bases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import adapter_starts, linear, lora, masked, quantized, sparse
from ops.lora import LoraTensor

FLOAT32 = 1e-5  # sums of 16 terms of order 1
BFLOAT16 = 2**-6  # of the largest value; 8 bits of mantissa
FINITE_DIFFERENCE = 1e-6  # of float64 central differences of a quadratic, relative


def _adapter(rng, base=None, *, scale=0.5):
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return LoraTensor(draw(16, 6) if base is None else base, draw(16, 3), draw(3, 6), scale)


def _exact(w):
  a, b = (np.asarray(m, np.float64) for m in (w.a_IR, w.b_RO))
  return np.asarray(dense(w.base), np.float64) + w.scale * a @ b


BASES = {
  'float32': lambda w: w,
  'nf4': jax.jit(lambda w: quantized.quantize(w, 'nf4', group_size=8, double=True)),
  'int8': jax.jit(lambda w: quantized.quantize(w, 'int8')),
  '2:4': jax.jit(lambda w: sparse.compress(w, sparse.n_of_m_mask(jnp.abs(w), 2, 4), 2, 4)),
}
dense = jax.jit(linear.dense)
matmul = jax.jit(linear.matmul)
merge = jax.jit(lora.merge, static_argnums=1)


@pytest.mark.parametrize('base', BASES)
def test_base_plus_low_rank(rng, base):
  w = _adapter(rng, BASES[base](jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)))
  x = rng.normal(size=(2, 4, 16)).astype(np.float32)
  np.testing.assert_allclose(dense(w), _exact(w), atol=FLOAT32)
  np.testing.assert_allclose(w.delta(), _exact(w) - dense(w.base), atol=FLOAT32)
  np.testing.assert_allclose(matmul(jnp.asarray(x), w), x @ _exact(w), atol=10 * FLOAT32)
  np.testing.assert_allclose(merge(w), _exact(w), atol=FLOAT32)
  assert merge(w).dtype == w.base.dtype == w.dtype


def test_bfloat16_bases_merge_in_float32(rng):
  w = _adapter(rng, jnp.asarray(rng.normal(size=(16, 6)), jnp.bfloat16))
  np.testing.assert_array_equal(lora.merge(w), _exact(w).astype(np.float32).astype(jnp.bfloat16))
  x = jnp.asarray(rng.normal(size=(4, 16)), jnp.bfloat16)
  y = matmul(x, w)
  expected = np.asarray(x, np.float64) @ _exact(w)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    y.astype(jnp.float32), expected, atol=BFLOAT16 * np.abs(expected).max()
  )


@pytest.mark.parametrize('base', BASES)
def test_an_adapter_starts_as_the_function_of_its_base(rng, base):
  base = BASES[base](jnp.asarray(rng.normal(size=(16, 6)), jnp.float32))
  w = adapter_starts.zero(base, 4, scale=2.0, key=jax.random.key(1))
  x = jnp.asarray(rng.normal(size=(5, 16)), jnp.float32)
  np.testing.assert_array_equal(matmul(x, w), matmul(x, base))
  # A sum with zeros, but a compiler may fuse it with the product of code and scale, and the scale's
  # own sum with its product where scales are quantized too.
  np.testing.assert_array_almost_equal_nulp(np.asarray(dense(w)), np.asarray(dense(base)), nulp=2)
  assert w.scale == 2.0 and w.a_IR.shape == (16, 4) and w.b_RO.shape == (4, 6)
  # Uniform in +-1/sqrt(I), as torch's kaiming_uniform_(a=sqrt(5)) draws it.
  assert np.abs(w.a_IR).max() <= 0.25 and np.std(w.a_IR) == pytest.approx(0.25 / 3**0.5, rel=0.2)


def test_the_key_decides_the_draw():
  attach = lambda seed: (
    adapter_starts.zero(jnp.ones((8, 8)), 2, scale=0.5, key=jax.random.key(seed)).a_IR
  )
  np.testing.assert_array_equal(attach(1), attach(1))
  assert np.any(attach(1) != attach(2))


@pytest.mark.parametrize('base', ['float32', 'nf4'])
def test_gradients_of_the_factors_are_finite_differences(rng, base):
  w = _adapter(rng, BASES[base](jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)))
  x, target = rng.normal(size=(4, 16)), rng.normal(size=(4, 6))

  def loss(factors):
    y = matmul(jnp.asarray(x, jnp.float32), LoraTensor(w.base, *factors, w.scale))
    return 0.5 * jnp.sum((y - jnp.asarray(target, jnp.float32)) ** 2)

  base_IO = np.asarray(dense(w.base), np.float64)
  exact_loss = lambda a, b: 0.5 * np.sum((x @ (base_IO + w.scale * a @ b) - target) ** 2)
  a, b = np.asarray(w.a_IR, np.float64), np.asarray(w.b_RO, np.float64)
  gradients = jax.jit(jax.grad(loss))((w.a_IR, w.b_RO))
  for i, actual in enumerate(gradients):
    numeric = np.zeros(actual.shape)
    for index in np.ndindex(actual.shape):
      ends = []
      for step in (1e-4, -1e-4):
        factors = [a.copy(), b.copy()]
        factors[i][index] += step
        ends.append(exact_loss(*factors))
      numeric[index] = (ends[0] - ends[1]) / 2e-4
    scale = np.abs(numeric).max()
    np.testing.assert_allclose(actual, numeric, atol=scale * (FLOAT32 + FINITE_DIFFERENCE))
    assert scale > 0


def test_map_values_changes_the_base_alone(rng):
  w = _adapter(rng)
  small = w.map_values(lambda base: quantized.quantize(base, 'int8'))
  assert isinstance(small.base, quantized.QuantizedTensor)
  assert small.a_IR is w.a_IR and small.b_RO is w.b_RO and small.scale == w.scale
  with pytest.raises(ValueError, match='already quantized'):
    small.map_values(jnp.negative)


def test_bad_ranks_are_named():
  for rank in (0, 7, -1):
    with pytest.raises(ValueError, match=f'between 1 and 6, not {rank}'):
      adapter_starts.zero(jnp.ones((16, 6)), rank, scale=1.0, key=jax.random.key(0))


def test_dora_scales_columns_to_their_lengths(rng):
  adapter = _adapter(rng)
  lengths = rng.uniform(0.5, 2, 6)
  w = lora.DoraTensor(adapter, jnp.asarray(lengths, jnp.float32))
  directions = _exact(adapter) / np.linalg.norm(_exact(adapter), axis=0)
  np.testing.assert_allclose(dense(w), directions * lengths, atol=FLOAT32)
  x = rng.normal(size=(5, 16)).astype(np.float32)
  np.testing.assert_allclose(matmul(jnp.asarray(x), w), x @ (directions * lengths), atol=1e-4)
  fresh = lora.DoraTensor(adapter, lora.column_lengths(adapter))
  np.testing.assert_allclose(dense(fresh), _exact(adapter), atol=FLOAT32)


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize('kind', ['lora', 'dora'])
def test_merged_it_multiplies_as_before(rng, base, kind):
  w = _adapter(rng, BASES[base](jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)))
  w = w if kind == 'lora' else lora.DoraTensor(w, 2 * lora.column_lengths(w))
  x = jnp.asarray(rng.normal(size=(5, 16)), jnp.float32)
  merged = merge(w)
  assert isinstance(merged, jax.Array)
  np.testing.assert_allclose(matmul(x, merged), matmul(x, w), atol=1e-4)
  again = merge(w, 'base')
  inner = w.base if kind == 'lora' else w.values.base
  assert jax.tree.structure(again) == jax.tree.structure(inner)


def _two_of_four(w):
  return sparse.compress(w, sparse.n_of_m_mask(jnp.abs(w), 2, 4), 2, 4)


PRUNED = {
  '2:4': _two_of_four,
  '2:4 of int8': lambda w: _two_of_four(w).map_values(lambda v: quantized.quantize(v, 'int8')),
  'mask': lambda w: masked.masked(w, jnp.abs(w) > 0.5),
}


@pytest.mark.parametrize('base', PRUNED)
def test_adapters_over_pruned_weights_keep_the_zeros(rng, base):
  base = jax.jit(PRUNED[base])(jnp.asarray(rng.normal(size=(16, 6)), jnp.float32))
  adapter = _adapter(rng, base)
  w = lora.keep_zeros(adapter)
  zeros = ~np.asarray(base.kept())
  exact = np.where(zeros, 0, _exact(adapter))
  np.testing.assert_allclose(dense(w), exact, atol=FLOAT32)
  merged = merge(w)
  np.testing.assert_allclose(merged, exact, atol=FLOAT32)
  assert (np.asarray(merged)[zeros] == 0).all() and zeros.mean() > 0.3
  again = merge(w, 'base')
  assert jax.tree.structure(again) == jax.tree.structure(base)
  np.testing.assert_array_equal(np.asarray(dense(again))[zeros], 0)
  # Fewer weights are stored than the mask has bits, so that only int8 rounds.
  np.testing.assert_allclose(dense(again), exact, atol=FLOAT32 if base.nbytes > 300 else 0.05)


def test_pissa_starts_as_the_base_with_the_largest_singular_values(rng):
  w_IO = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
  w = adapter_starts.pissa(w_IO, 2, scale=0.5)
  np.testing.assert_allclose(dense(w), w_IO, atol=FLOAT32)
  u, s, v = np.linalg.svd(np.asarray(w_IO, np.float64), full_matrices=False)
  np.testing.assert_allclose(w.delta(), (u[:, :2] * s[:2]) @ v[:2], atol=1e-4)
  over_codes = adapter_starts.pissa(quantized.quantize(w_IO, 'int8'), 2, scale=0.5)
  assert isinstance(over_codes.base, quantized.QuantizedTensor)
  np.testing.assert_allclose(dense(over_codes), w_IO, atol=0.05)


def test_loftq_is_nearer_to_the_original_than_the_codes_alone(rng):
  w_IO = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
  base = quantized.quantize(w_IO, 'int2', group_size=16)
  error = jax.jit(lambda w: jnp.linalg.norm(linear.dense(w) - w_IO))
  loftq = jax.jit(
    lambda base, n: adapter_starts.loftq(base, w_IO, 8, scale=2.0, iterations=n), static_argnums=1
  )
  once, often = loftq(base, 1), loftq(base, 3)
  assert error(often) <= error(once) < 0.9 * error(base)
  finer = quantized.quantize(w_IO, 'nf4', group_size=16)
  turns = [error(loftq(finer, n)) for n in (1, 3)]
  assert turns[1] < turns[0] < 0.9 * error(finer)
  # One iteration: the best rank-8 correction of what the codes lose (Eckart and Young).
  s = np.linalg.svd(np.asarray(w_IO - linear.dense(base), np.float64), compute_uv=False)
  assert error(once) == pytest.approx(np.sqrt((s[8:] ** 2).sum()), rel=1e-4)
