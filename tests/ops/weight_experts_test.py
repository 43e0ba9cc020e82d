"""One contract for the experts of all weight types: a leading axis E, and products by groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import sharding
from ops import experts, linear

INPUTS, OUTPUTS = 64, 32  # of the examples
# One of each type of weight; what is made of two of them is slow.
QUICK = (
  'int4 floating zeros',
  'nf4 double',
  'mxfp4',
  '2:4 of int8',
  'packed',
  'fused',
  'inputs static',
  'masked int8',
  'learned int4',
  'int8 products',
  'rotated',
  'dora',
)
pytestmark = pytest.mark.quick(example=QUICK)
grouped_matmul = jax.jit(linear.grouped_matmul)
to_dense = jax.jit(linear.dense)


def test_experts_are_a_leading_axis(example, inputs_of, assert_near):
  alone, w = example.experts
  x_ETI = inputs_of(3, 2)
  assert tuple(w.shape) == (3, INPUTS, OUTPUTS) and w.dtype == jnp.float32
  assert experts.count(w) == 3 and experts.count(alone[0]) is None
  dense_EIO = example.dense_experts
  assert_near(to_dense(w), dense_EIO)
  assert_near(jax.jit(jax.vmap(linear.matmul))(x_ETI, w), example.seen(x_ETI) @ dense_EIO)


def test_experts_are_stacked_and_taken_bit_by_bit(example, assert_same):
  alone, w = example.experts
  stacked = experts.stack(alone)
  assert jax.tree.structure(stacked) == jax.tree.structure(w)
  assert [a.shape for a in jax.tree.leaves(stacked)] == [a.shape for a in jax.tree.leaves(w)]
  assert stacked.nbytes == sum(one.nbytes for one in alone) > 0
  stacked.check()
  for e, one in enumerate(alone):
    assert_same(experts.take(stacked, e), one)


def test_each_group_of_rows_meets_its_own_expert(example, inputs_of, assert_near):
  alone, w = example.experts
  x_TI, sizes_E = inputs_of(6), [2, 0, 3]
  y_TO = grouped_matmul(x_TI, w, jnp.asarray(sizes_E))
  rows = [
    np.asarray(alone[e].round_inputs(x_I[None]), np.float64)[0] @ example.dense_experts[e]
    for x_I, e in zip(x_TI, np.repeat(np.arange(3), sizes_E))
  ]
  assert_near(y_TO, np.stack([*rows, np.zeros(OUTPUTS)]))  # no expert has the last row


def test_the_gradient_of_a_grouped_product_is_that_of_each_group(example, inputs_of, assert_near):
  if example.only_trained:
    return
  w = example.experts[1]
  x_TI, y_bar = inputs_of(5), np.random.default_rng(2).normal(size=(5, OUTPUTS))
  product = lambda x: linear.grouped_matmul(x, w, jnp.array([2, 0, 3]))
  slope_TI = jax.jit(jax.grad(lambda x: jnp.sum(product(x) * jnp.float32(y_bar))))(x_TI)
  dense_EIO = example.dense_experts
  assert_near(slope_TI, np.concatenate([y_bar[:2] @ dense_EIO[0].T, y_bar[2:] @ dense_EIO[2].T]))


def test_values_of_experts_are_mapped_as_those_of_each(example, assert_near):
  alone, w = example.experts
  double = lambda one: one.map_values(lambda values: 2 * values)
  try:
    expected = [np.asarray(to_dense(jax.jit(double)(one)), np.float64) for one in alone]
  except ValueError:
    return  # test_values_are_mapped_or_the_refusal_says_why has the message
  mapped = jax.jit(lambda w: experts.each(double, w))(w)
  assert type(mapped) is type(w) and mapped.shape == w.shape
  assert_near(to_dense(mapped), np.stack(expected))


def test_sharded_experts_multiply_the_same(example, inputs_of, assert_near):
  w = example.experts[1]
  mesh = sharding.make_mesh(expert=3, model=2)
  places = sharding.weight_shardings(mesh, w, ('E', 'D', 'F'))
  placed = jax.device_put(w, places)
  assert all(a.sharding.spec[0] == 'expert' for a in jax.tree.leaves(placed))
  x_TI, sizes_E = jax.device_put(inputs_of(6), sharding.batch_sharding(mesh)), jnp.array([2, 1, 3])
  expected = grouped_matmul(inputs_of(6), w, sizes_E)
  assert_near(grouped_matmul(x_TI, placed, sizes_E), np.asarray(expected))


def test_experts_that_are_stored_differently_are_not_stacked(example_of):
  for other in ('int4', 'int8 asymmetric groups'):
    with pytest.raises(ValueError, match='expert 1 is not stored as expert 0 is'):
      experts.stack([example_of('int8').weight, example_of(other).weight])


def test_group_sizes_that_do_not_fit_are_refused(example_of, inputs_of):
  _, w = example_of('int8').experts
  for sizes in ([1, 2], [[1, 2, 3]]):
    with pytest.raises(ValueError, match='do not fit experts of shape'):
      linear.grouped_matmul(inputs_of(6), w, jnp.array(sizes))
  with pytest.raises(ValueError, match='do not fit experts of shape'):
    linear.grouped_matmul(inputs_of(6), example_of('int8').weight, jnp.array([6]))
