"""Tables that are stored as the transpose of a weight: lookups and the product of a tied head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import linear, lora, quantized, rotated, sparse
from ops.kernels import cpu, fused
from ops.kernels.cpu import layout
from ops.transposed import TransposedTensor, as_table, as_transposed

VOCABULARY, WIDTH = 45, 32  # the last tile of 32 tokens is not full
NEAR = 1e-5  # sums of 32 products in float32
# Activations of the native products are rounded to 2^-14 of the largest.
NEAR_PACKED = 2e-3
FORMATS = {
  'int8': lambda w: quantized.quantize(w, 'int8'),
  'int8 groups': lambda w: quantized.quantize(w, 'int8', group_size=16),
  'int4 asymmetric': lambda w: quantized.quantize(w, 'int4', group_size=16, symmetric=False),
  'int3': lambda w: quantized.quantize(w, 'int3', group_size=16),
  'nf4 double': lambda w: quantized.quantize(w, 'nf4', group_size=16, double=True),
  'fp8': lambda w: quantized.quantize(w, 'fp8_e4m3'),
  'mxfp4': lambda w: quantized.quantize(w, 'mxfp4'),
  '2:4': lambda w: sparse.compress(w, sparse.n_of_m_mask(jnp.abs(w), 2, 4), 2, 4),
  'bfloat16': lambda w: w.astype(jnp.bfloat16),
}
PACKED = ('int8', 'int8 groups', 'int4 asymmetric', 'int3', 'fp8', 'mxfp4', 'bfloat16')
TOKENS = np.array([[0, 44, 7], [31, 32, 44]])


@pytest.fixture(scope='module')
def table_VD():
  return np.random.default_rng(0).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)


@pytest.fixture(scope='module')
def x_BTD():
  return np.random.default_rng(1).normal(size=(2, 3, WIDTH)).astype(np.float32)


def _stored(name, table_VD) -> TransposedTensor:
  return jax.jit(lambda table_VD: TransposedTensor(FORMATS[name](table_VD.T)))(table_VD)


@jax.jit
def looked_up_and_multiplied(table, x_BTD):
  return linear.rows(table, TOKENS), linear.matmul_transposed(x_BTD, table)


def _by_hand(w: quantized.QuantizedTensor) -> np.ndarray:
  """The table of a quantized matrix, token by token: (code - zero) * scale of its group."""
  inputs, outputs = w.shape
  codes, zeros = np.asarray(w.codes()).astype(np.float64), w.zeros
  scales = np.asarray(linear.dense(w.scales), np.float64)
  table = np.zeros((outputs, inputs))
  for v in range(outputs):
    for d in range(inputs):
      group = d // w.group_size
      zero = 0 if zeros is None else float(zeros[group, v])
      table[v, d] = (codes[d, v] - zero) * scales[group, v]
  return table


@pytest.mark.parametrize('name', ['int8', 'int4 asymmetric', 'nf4 double'])
def test_rows_and_products_are_those_of_the_numbers_by_hand(name, table_VD, x_BTD):
  w = _stored(name, table_VD)
  expected_VD = _by_hand(w.weight)
  assert w.shape == (VOCABULARY, WIDTH) and w.nbytes == w.weight.nbytes
  rows, logits = looked_up_and_multiplied(w, x_BTD)
  np.testing.assert_allclose(rows, expected_VD[TOKENS], atol=NEAR)
  np.testing.assert_allclose(logits, x_BTD @ expected_VD.T, atol=10 * NEAR)


def test_of_two_values_in_four_the_others_are_zero(table_VD, x_BTD):
  grouped = table_VD.reshape(VOCABULARY, -1, 4)
  order = np.argsort(-np.abs(grouped), axis=-1)
  expected_VD = grouped.copy()
  np.put_along_axis(expected_VD, order[..., 2:], 0, axis=-1)
  expected_VD = expected_VD.reshape(table_VD.shape)
  rows, logits = looked_up_and_multiplied(_stored('2:4', table_VD), x_BTD)
  np.testing.assert_array_equal(rows, expected_VD[TOKENS])
  np.testing.assert_allclose(logits, x_BTD @ expected_VD.T, atol=10 * NEAR)


def test_an_array_is_a_table_too(table_VD, x_BTD):
  table = jnp.asarray(table_VD)
  rows, logits = looked_up_and_multiplied(table, x_BTD)
  np.testing.assert_array_equal(rows, table_VD[TOKENS])
  np.testing.assert_allclose(logits, x_BTD @ table_VD.T, atol=10 * NEAR)
  np.testing.assert_array_equal(as_table(as_transposed(table)), table_VD)


@pytest.mark.parametrize('name', PACKED)
def test_packed_for_the_cpu_it_looks_the_same_numbers_up(name, table_VD, x_BTD):
  w = _stored(name, table_VD)
  rows, logits = looked_up_and_multiplied(TransposedTensor(layout.encode(w.weight)), x_BTD)
  dense_VD = np.asarray(jax.jit(lambda w: w.dense())(w), np.float32)
  np.testing.assert_array_equal(rows.astype(np.float32), dense_VD[TOKENS])
  expected = x_BTD @ dense_VD.T
  np.testing.assert_allclose(logits, expected, atol=NEAR_PACKED * np.abs(expected).max())
  if cpu.available():
    assert isinstance(layout.pack(w).weight, layout.PackedTensor)
    assert 'native' in layout.pack(w).kernel('cpu')


def test_of_pairs_the_packed_places_go_along(table_VD):
  @jax.jit
  def looked_up(table_VD):
    w = FORMATS['2:4'](table_VD.T.astype(jnp.bfloat16))
    return [linear.rows(TransposedTensor(one), TOKENS) for one in (w, layout.encode(w))]

  np.testing.assert_array_equal(*looked_up(table_VD))


def test_packed_for_an_accelerator_it_looks_the_same_numbers_up(table_VD):
  w = TransposedTensor(quantized.quantize(jnp.asarray(table_VD).T, 'int4', group_size=32))
  for platform in ('tpu', 'gpu'):
    packed = fused.pack(w, platform)
    assert isinstance(packed.weight, fused.FusedTensor)
    np.testing.assert_array_equal(linear.rows(packed, TOKENS), linear.rows(w, TOKENS))


def test_a_lookup_widens_no_more_than_its_rows(table_VD):
  w = _stored('int4 asymmetric', table_VD)
  jaxpr = jax.make_jaxpr(lambda w: linear.rows(w, jnp.asarray([3, 4])))(w)
  sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
  assert max(sizes) <= 2 * WIDTH * 8 < VOCABULARY * WIDTH  # bits of packed codes, at most


def test_gradients_pass_to_what_can_be_trained(table_VD, x_BTD):
  base, key = FORMATS['int8'](jnp.asarray(table_VD).T), jax.random.key(0)
  a_IR, b_RO = jax.random.normal(key, (WIDTH, 2)), jax.random.normal(key, (2, VOCABULARY))
  weights_BT = np.random.default_rng(2).normal(size=TOKENS.shape).astype(np.float32)

  def loss(sides, dense: bool):
    w = TransposedTensor(lora.LoraTensor(base, *sides, 0.5))
    table = w.dense() if dense else w
    looked_up = (linear.rows(table, TOKENS) * x_BTD).sum(-1)
    logits = linear.matmul_transposed(jnp.asarray(x_BTD), table)
    return jnp.sum(weights_BT * (looked_up + jnp.tanh(logits).sum(-1)))

  gradients = jax.jit(jax.grad(loss), static_argnums=1)
  found, expected = (gradients((a_IR, b_RO), dense) for dense in (False, True))
  for ours, theirs in zip(found, expected):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_rotated_weight_is_looked_up_by_what_it_stands_for(table_VD):
  inner = rotated.rotated(jnp.asarray(table_VD).T)
  w = TransposedTensor(inner.map_values(FORMATS['int8']))
  np.testing.assert_allclose(linear.rows(w, TOKENS), w.dense()[TOKENS], atol=NEAR)
  np.testing.assert_allclose(w.dense(), table_VD, atol=0.1)
