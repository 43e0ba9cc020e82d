"""Native grouped products: each group gets what it gets alone, and no other expert is read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import adapter_starts, experts, linear, quantized, sparse
from ops.kernels import cpu
from ops.kernels.cpu import layout, packed

native = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or 'available')
instruction_sets = pytest.mark.parametrize('name', cpu.instruction_sets() or [None])

INPUTS, OUTPUTS = 128, 70
SIZES = [2, 0, 17, 1, 0]
ROWS = sum(SIZES) + 2  # the last two belong to no expert


def _quantize(format, **options):
  return lambda w_IO: quantized.quantize(w_IO, format, **options)


def _two_of_four(then):
  def compress(w_IO):
    mask_IO = sparse.n_of_m_mask(sparse.magnitude_score(w_IO), 2, 4)
    return sparse.compress(w_IO, mask_IO, 2, 4).map_values(then)

  return compress


FORMATS = {
  'bf16': lambda w_IO: w_IO.astype(jnp.bfloat16),
  'f16': lambda w_IO: w_IO.astype(jnp.float16),
  'int8': _quantize('int8'),
  'int8 asymmetric': _quantize('int8', group_size=64, symmetric=False),
  'int4': _quantize('int4', group_size=32),
  'int3 asymmetric': _quantize('int3', group_size=64, symmetric=False),
  'nf4 double': _quantize('nf4', group_size=64, double=True),
  'fp8': _quantize('fp8_e4m3'),
  'mxfp4': _quantize('mxfp4'),
  'nvfp4': _quantize('nvfp4'),
  '2:4 bf16': _two_of_four(lambda w_IO: w_IO.astype(jnp.bfloat16)),
  '2:4 int8': _two_of_four(_quantize('int8')),
  '2:4 int4': _two_of_four(_quantize('int4', group_size=32)),
}
formats = pytest.mark.parametrize('format', FORMATS)


pack = jax.jit(layout.pack)


@functools.cache
def _experts(format):
  draw = np.random.default_rng(0).normal(size=(len(SIZES), INPUTS, OUTPUTS))
  return jax.jit(jax.vmap(FORMATS[format]))(jnp.asarray(draw, jnp.float32))


@functools.cache
def _packed(format):
  return pack(_experts(format))


def _rows(dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, INPUTS)), dtype)


def _one_by_one(x_MI, w, **options):
  """The product of each group with its own expert, by a call for each."""
  y_MO = np.zeros((len(x_MI), OUTPUTS), np.float32)
  ends = np.cumsum(SIZES)
  for e, (start, end) in enumerate(zip(ends - SIZES, ends)):
    if start < end:
      y_MO[start:end] = packed.product(x_MI[start:end], experts.take(w, e), **options)
  return y_MO


def _float32(a):
  return np.asarray(a.astype(jnp.float32))


@native
@formats
def test_experts_are_packed_one_after_the_other(format):
  w, p = _experts(format), _packed(format)
  assert isinstance(p, packed.PackedTensor) and p.shape == w.shape
  for e in range(len(SIZES)):
    alone, own = pack(experts.take(w, e)), experts.take(p, e)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(own), strict=True):
      np.testing.assert_array_equal(_float32(a), _float32(b))


@native
@pytest.mark.parametrize(
  'format, dtype',
  [
    *((f, jnp.float32) for f in FORMATS),
    *((f, jnp.bfloat16) for f in ('bf16', 'int8', 'nf4 double')),
  ],
)
def test_each_group_gets_the_bits_that_it_gets_alone(format, dtype):
  p, x_MI, sizes_E = _packed(format), _rows(dtype), jnp.asarray(SIZES)
  y_MO = jax.jit(linear.grouped_matmul)(x_MI, p, sizes_E)
  assert y_MO.dtype == dtype and not np.any(_float32(y_MO[sum(SIZES) :]))
  np.testing.assert_array_equal(_float32(y_MO), _one_by_one(x_MI, p))


@native
@instruction_sets
def test_every_instruction_set_and_number_of_threads(name):
  x_MI = _rows(jnp.bfloat16)
  for format in ('bf16', 'int8 asymmetric', '2:4 int4'):
    p = _packed(format)
    expected = _one_by_one(x_MI, p, instruction_set=name)
    for threads in (1, 2, 3):
      options = {'instruction_set': name, 'threads': threads}
      y_MO = packed.grouped_product(x_MI, p, jnp.asarray(SIZES), **options)
      np.testing.assert_array_equal(_float32(y_MO), expected)


@native
def test_large_groups_are_shared_among_threads(rng):
  w_EIO = jnp.asarray(rng.normal(size=(3, INPUTS, 1000)), jnp.float32)
  p = layout.pack(jax.jit(jax.vmap(FORMATS['int4']))(w_EIO))
  x_MI = jnp.asarray(rng.normal(size=(203, INPUTS)), jnp.float32)
  for sizes in ([200, 1, 2], [0, 203, 0], [70, 70, 63]):
    alone = packed.grouped_product(x_MI, p, jnp.asarray(sizes), threads=1)
    for threads in (2, 3, 8):
      y_MO = packed.grouped_product(x_MI, p, jnp.asarray(sizes), threads=threads)
      np.testing.assert_array_equal(y_MO, alone)
    ends = np.cumsum(sizes)
    for e, (start, end) in enumerate(zip(ends - sizes, ends)):
      if start < end:
        np.testing.assert_array_equal(
          alone[start:end], packed.product(x_MI[start:end], experts.take(p, e))
        )


@native
@pytest.mark.parametrize('format', ['bf16', 'int8', 'nf4 double', 'fp8', '2:4 int8'])
def test_experts_without_rows_are_not_read(format):
  p, x_MI, sizes_E = _packed(format), _rows(), jnp.asarray(SIZES)
  idle = jnp.asarray(np.equal(SIZES, 0))

  def poisoned(a):
    nothing = jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else 255
    return jnp.where(idle.reshape(-1, *[1] * (a.ndim - 1)), jnp.asarray(nothing, a.dtype), a)

  y_MO = packed.grouped_product(x_MI, jax.tree.map(poisoned, p), sizes_E)
  assert np.isfinite(y_MO).all()
  np.testing.assert_array_equal(y_MO, packed.grouped_product(x_MI, p, sizes_E))
  moved = packed.grouped_product(x_MI, jax.tree.map(poisoned, p), sizes_E[::-1])
  assert np.isnan(moved).any()  # the poison is one


@native
def test_sizes_that_do_not_add_up_stay_within_the_rows():
  p, x_MI = _packed('int8'), _rows()
  y_MO = packed.grouped_product(x_MI, p, jnp.asarray([5, -3, 10**9, 4, 2]))
  expected = packed.grouped_product(x_MI, p, jnp.asarray([5, 0, ROWS - 5, 0, 0]))
  np.testing.assert_array_equal(y_MO, expected)
  assert packed.grouped_product(x_MI[:0], p, jnp.asarray(SIZES)).shape == (0, OUTPUTS)


@native
def test_gradients_of_the_rows_go_through():
  w, x_MI, sizes_E = _experts('int8'), _rows(), jnp.asarray(SIZES)
  slope = jax.jit(jax.grad(lambda x, w: linear.grouped_matmul(x, w, sizes_E).sum()))
  expected = slope(x_MI, linear.dense(w))
  np.testing.assert_allclose(slope(x_MI, layout.pack(w)), expected, rtol=1e-5, atol=1e-4)


@native
def test_a_correction_of_packed_experts():
  start = lambda w_IO: adapter_starts.zero(
    FORMATS['int4'](w_IO), 2, scale=0.5, key=jax.random.key(0)
  )
  w = jax.jit(jax.vmap(start))(jax.jit(linear.dense)(_experts('int4')))
  w = dataclasses.replace(w, b_RO=jnp.ones_like(w.b_RO))
  fast, x_MI, sizes_E = layout.pack(w), _rows(), jnp.asarray(SIZES)
  assert isinstance(fast.base, packed.PackedTensor)
  assert linear.kernel(fast, 'cpu').startswith('native')
  program = jax.jit(linear.grouped_matmul).lower(x_MI, fast, sizes_E)
  assert program.as_text().count(f'@{cpu.GROUPED_PRODUCT}(') == 1
  y_MO = program.compile()(x_MI, fast, sizes_E)
  expected_MO = jax.jit(linear.grouped_matmul)(x_MI, w, sizes_E)
  np.testing.assert_allclose(y_MO, expected_MO, atol=0.02)


@native
def test_experts_are_widened_to_half_precision():
  w = jax.jit(jax.vmap(FORMATS['int4']))(jnp.ones((2, INPUTS, 8), jnp.bfloat16))
  wide = layout.pack_widened(w)
  assert isinstance(wide, packed.PackedTensor) and wide.format == 'bfloat16'
  np.testing.assert_array_equal(linear.dense(wide), linear.dense(w))
