"""Grouped products in blocks of rows, against a product for each group in float64 numpy."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import grouped, linear, lora, moe, quantized

# Relative to the sum of the sizes of the terms.
FLOAT32 = 1e-6  # sums of some hundred terms, in another order
BFLOAT16 = 2**-8  # of a rounded result; sums are float32
INPUTS, OUTPUTS = 24, 10

SIZES = {
  'even': [16, 16, 16, 16],
  'no block is full': [3, 5, 1, 7],
  'some without rows': [0, 37, 0, 0, 20, 0],
  'all rows in the first': [40, 0, 0],
  'all rows in the last': [0, 0, 40],
  'one expert': [19],
  'a row each': [1, 1, 1, 1, 1],
  'rows that belong to none': [4, 9, -6],  # minus: so many rows past the last group
  'none at all': [0, 0, -5],
}
cases = pytest.mark.parametrize('name', SIZES)


def _case(name, dtype=np.float32):
  rng = np.random.default_rng(0)
  sizes_E = np.maximum(SIZES[name], 0)
  rows = int(np.abs(SIZES[name]).sum())
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  return draw(rows, INPUTS), draw(len(sizes_E), INPUTS, OUTPUTS), sizes_E


FORMS = {
  'in a loop': linear.grouped_matmul,
  'at once': functools.partial(grouped.at_once, linear.matmul),
  'at once, in blocks of 8': functools.partial(grouped.at_once, linear.matmul, size=8),
}


@functools.partial(jax.jit, static_argnums=0)
def _run(form, x_MI, w_EIO, sizes_E, bar_MO):
  """The product, and the gradients of both sides."""
  y_MO, pull = jax.vjp(lambda x, w: FORMS[form](x, w, sizes_E), x_MI, w_EIO)
  return y_MO, *pull(bar_MO)


def _float64(a):
  return np.asarray(jnp.asarray(a, jnp.float32), np.float64)


def _by_hand(x_MI, w_EIO, sizes_E):
  """The product of each group, in float64."""
  y_MO = np.zeros((len(x_MI), w_EIO.shape[2]))
  ends = np.cumsum(sizes_E)
  for w_IO, start, end in zip(w_EIO, ends - sizes_E, ends):
    y_MO[start:end] = x_MI[start:end] @ w_IO
  return y_MO


def _by_hand_of_weights(x_MI, bar_MO, sizes_E):
  """The gradients of the experts, in float64."""
  ends = np.cumsum(sizes_E)
  return np.stack([x_MI[b - n : b].T @ bar_MO[b - n : b] for n, b in zip(sizes_E, ends)])


@pytest.mark.parametrize('form', FORMS)
@cases
@pytest.mark.quick(form=('in a loop', 'at once, in blocks of 8'))
def test_products_and_gradients_are_those_of_each_group(name, form):
  x_MI, w_EIO, sizes_E = _case(name)
  bar_MO = np.float32(np.random.default_rng(1).standard_normal((len(x_MI), OUTPUTS)))
  y_MO, x_bar, w_bar = _run(form, x_MI, w_EIO, sizes_E, bar_MO)
  x, w, bar = _float64(x_MI), _float64(w_EIO), _float64(bar_MO)
  for found, by_hand, a, b in (
    (y_MO, _by_hand, x, w),
    (x_bar, _by_hand, bar, w.swapaxes(1, 2)),
    (w_bar, _by_hand_of_weights, x, bar),
  ):
    assert found.dtype == jnp.float32
    bound = FLOAT32 * by_hand(np.abs(a), np.abs(b), sizes_E)
    assert (np.abs(found - by_hand(a, b, sizes_E)) <= bound).all()  # exact zeros without rows


@pytest.mark.parametrize('size', [1, 16])
def test_blocks_of_any_size_give_the_same(size):
  x_MI, w_EIO, sizes_E = _case('some without rows')
  run = jax.jit(lambda *a: grouped.product(linear.matmul, *a, size))
  expected = _by_hand(_float64(x_MI), _float64(w_EIO), sizes_E)
  np.testing.assert_allclose(run(x_MI, w_EIO, jnp.asarray(sizes_E)), expected, atol=1e-5)


def test_products_and_gradients_in_bfloat16():
  x_MI, w_EIO, sizes_E = _case('some without rows', jnp.bfloat16)
  ones = jnp.ones((len(x_MI), OUTPUTS), jnp.bfloat16)
  y_MO, x_bar, w_bar = _run('in a loop', x_MI, w_EIO, sizes_E, ones)
  x, w, bar = _float64(x_MI), _float64(w_EIO), _float64(ones)
  for found, exact, rounded in (
    (y_MO, _by_hand(x, w, sizes_E), 1),
    (x_bar, _by_hand(bar, w.swapaxes(1, 2), sizes_E), 1),
    # The part of each block is rounded to bfloat16, but not their sum.
    (w_bar, _by_hand_of_weights(x, bar, sizes_E), _by_hand_of_weights(np.abs(x), bar, sizes_E)),
  ):
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_less(
      np.abs(_float64(found) - exact), BFLOAT16 * np.maximum(np.abs(exact), rounded) + 1e-5
    )


def test_what_other_groups_hold_reaches_no_result():
  x_MI, w_EIO, sizes_E = _case('no block is full')
  x_MI = x_MI.at[3:8].set(np.nan)  # the rows of expert 1
  y_MO, x_bar, w_bar = _run('in a loop', x_MI, w_EIO, sizes_E, jnp.ones((len(x_MI), OUTPUTS)))
  assert np.isnan(y_MO[3:8]).all() and np.isfinite(np.delete(y_MO, np.arange(3, 8), 0)).all()
  assert np.isfinite(x_bar).all()
  assert np.isnan(w_bar[1]).all() and np.isfinite(np.delete(w_bar, 1, 0)).all()


def test_experts_without_rows_are_not_read():
  x_MI, w_EIO, sizes_E = _case('some without rows')
  poisoned = jnp.where(jnp.asarray(sizes_E > 0)[:, None, None], w_EIO, np.nan)
  ones = jnp.ones((len(x_MI), OUTPUTS))
  for a, b in zip(
    _run('in a loop', x_MI, poisoned, sizes_E, ones), _run('in a loop', x_MI, w_EIO, sizes_E, ones)
  ):
    np.testing.assert_array_equal(a, b)


def test_blocks_cover_each_row_once_and_in_order(rng):
  blocks = jax.jit(grouped.blocks, static_argnums=(1, 2))
  for count, size in ((1, 8), (3, 128), (16, 8)):
    sizes_E = rng.multinomial(200, rng.dirichlet(np.full(count, 0.3)))
    found = blocks(jnp.asarray(sizes_E, jnp.int32), 200, size)
    spans = [range(int(a), int(b)) for a, b in zip(found.start, found.end)]
    assert all(len(span) <= size for span in spans)
    assert [row for span in spans for row in span] == list(range(200))
    owners = np.repeat(np.asarray(found.expert), [len(span) for span in spans])
    np.testing.assert_array_equal(owners, np.repeat(np.arange(count), sizes_E))


def _multiplications(text):
  """The scalar multiplications of all products in a compiled program, loops included."""
  trips = dict(re.findall(r'body=%([\w.\-]+).*?"known_trip_count":\{"n":"(\d+)"', text))
  sizes = lambda numbers: [int(n) for n in numbers.split(',') if n]
  shapes = {name: sizes(axes) for name, axes in re.findall(r'%([\w.\-]+) = \w+\[([\d,]*)\]', text)}
  callers, found, name = {}, {}, None
  for line in text.splitlines():
    if line and not line[0].isspace() and '{' in line:
      name = line.removeprefix('ENTRY ').lstrip('%').split()[0]
    called = re.findall(r'(?:calls|to_apply|body)=%([\w.\-]+)', line)
    for branches in re.findall(r'branch_computations=\{([^}]*)\}', line):
      called += [branch.strip(' %') for branch in branches.split(',')]
    called += re.findall(r'(?:true|false)_computation=%([\w.\-]+)', line)
    callers |= dict.fromkeys(called, name)
    product = re.search(
      r'%([\w.\-]+) = .* dot\(%([\w.\-]+), .*lhs_contracting_dims=\{([\d,]*)\}', line
    )
    if product:
      result, left, contracted = product.groups()
      summed = [shapes[left][axis] for axis in sizes(contracted)]
      found[name] = found.get(name, 0) + math.prod(shapes[result] + summed)
  total = 0
  for name, own in found.items():
    while name is not None:
      own, name = own * int(trips.get(name, 1)), callers.get(name)
    total += own
  return total


def test_the_program_multiplies_few_rows_and_holds_none_of_each_expert():
  tokens, choices, count, width = 96, 2, 16, 32
  experts_TX = jax.ShapeDtypeStruct((tokens, choices), jnp.int32)
  x_TD = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
  w_EIO = jax.ShapeDtypeStruct((count, width, 64), jnp.float32)

  def run(x_TD, experts_TX, w_EIO, product):
    plan = moe.dispatch(experts_TX, count)
    return product(moe.to_experts(x_TD, plan), w_EIO, plan.sizes_E)

  def compiled(product):
    return jax.jit(lambda *a: run(*a, product)).lower(x_TD, experts_TX, w_EIO).compile()

  rows = tokens * choices
  ours, theirs = compiled(linear.grouped_matmul), compiled(jax.lax.ragged_dot)
  least, most = rows, rows + count * grouped.block_rows(rows, count)
  assert least <= _multiplications(ours.as_text()) / (width * 64) <= most
  assert _multiplications(theirs.as_text()) / (width * 64) == count * rows
  dense = re.compile(rf'\[{count},({rows}|{tokens}),\d+\]|\[({rows}|{tokens}),{count},\d+\]')
  dense_bytes = count * rows * width * 4
  assert not dense.search(ours.as_text())
  assert ours.memory_analysis().temp_size_in_bytes < dense_bytes / 2
  assert theirs.memory_analysis().temp_size_in_bytes >= dense_bytes


def test_training_a_correction_holds_no_gradient_of_all_experts():
  count, inputs, outputs = 16, 64, 128
  shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
  quantize = jax.vmap(lambda w_IO: quantized.quantize(w_IO, 'int4', group_size=32))
  base = jax.eval_shape(quantize, shape(count, inputs, outputs))
  sides = shape(count, inputs, 2), shape(count, 2, outputs)
  one_layer = count * inputs * outputs * 4

  def value(sides, base, x, sizes):
    w = lora.LoraTensor(base, *sides, 1.0)
    return jnp.sum(linear.grouped_matmul(jnp.tanh(x), w, sizes) ** 2)

  arguments = sides, base, shape(64, inputs), jax.ShapeDtypeStruct((count,), jnp.int32)
  program = jax.jit(jax.grad(value)).lower(*arguments).compile()
  assert program.memory_analysis().temp_size_in_bytes < one_layer
