"""The native products against numpy: every format, instruction set, shape and number of rows."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import adapter_starts, linear, quantized, rotated, sparse
from ops.activations import quantize_activations
from ops.kernels import cpu
from ops.kernels.cpu import layout, packed

native = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or 'available')
instruction_sets = pytest.mark.parametrize('name', cpu.instruction_sets() or [None])

# Relative to the sum of the sizes of the terms.
FLOAT32 = 1e-6  # sums of some hundred terms, in another order
BFLOAT16 = 2**-8  # of the result
NF4_WORDS = 0.001  # of a group's largest weight: the words that stand for NF4's values

ROWS = [1, 2, 3, 7, 16, 17, 64, 200]


def _quantize(format, **options):
  return lambda w_IO: quantized.quantize(w_IO, format, **options)


def _cast(dtype):
  return lambda w_IO: w_IO.astype(dtype)


def _two_of_four(then):
  def compress(w_IO):
    mask_IO = sparse.n_of_m_mask(sparse.magnitude_score(w_IO), 2, 4)
    return sparse.compress(w_IO, mask_IO, 2, 4).map_values(then)

  return compress


FORMATS = {
  'int8': _quantize('int8'),
  'int8 g32': _quantize('int8', group_size=32),
  'int8 asymmetric': _quantize('int8', group_size=64, symmetric=False),
  'int4 g16': _quantize('int4', group_size=16),
  'int4 g32': _quantize('int4', group_size=32),
  'int4 g64': _quantize('int4', group_size=64, clip='signed'),  # some scales are negative
  'int4 g192': _quantize('int4', group_size=192),
  'int4 column': _quantize('int4', group_size=-1),
  'int4 asymmetric': _quantize('int4', group_size=64, symmetric=False),
  'int3': _quantize('int3', group_size=64),
  'int3 asymmetric': _quantize('int3', group_size=64, symmetric=False),
  'int2': _quantize('int2', group_size=64),
  'nf4': _quantize('nf4', group_size=64),
  'nf4 double': _quantize('nf4', group_size=64, double=True),
  'fp8': _quantize('fp8_e4m3'),
  'mxfp4': _quantize('mxfp4'),
  'mxfp8': _quantize('mxfp8'),
  'nvfp4': _quantize('nvfp4'),
  'bf16': _cast(jnp.bfloat16),
  'f16': _cast(jnp.float16),
  '2:4 bf16': _two_of_four(_cast(jnp.bfloat16)),
  '2:4 int8': _two_of_four(_quantize('int8')),
  '2:4 int8 g32': _two_of_four(_quantize('int8', group_size=32)),
  '2:4 int4 column': _two_of_four(_quantize('int4', group_size=-1)),
  '2:4 int4 g32': _two_of_four(_quantize('int4', group_size=32, clip='signed')),
  '2:4 int3 g32': _two_of_four(_quantize('int3', group_size=32)),
}
WHOLE_COLUMN = ['int8', 'int4 column', 'fp8', 'bf16', 'f16']  # any number of inputs
TWO_OF_FOUR = ['2:4 bf16', '2:4 int8', '2:4 int4 column']  # any multiple of 4
formats = pytest.mark.parametrize('format', FORMATS)


@functools.cache
def _weight(format, inputs=192, outputs=70, seed=0, dtype=jnp.float32):
  draw = np.random.default_rng([seed, inputs, outputs]).normal(size=(inputs, outputs))
  return jax.jit(FORMATS[format])(jnp.asarray(draw, dtype))


encode = jax.jit(layout.encode, static_argnums=1)
to_dense = jax.jit(linear.dense)


def _forms(w):
  """The packed forms of a weight, by what the activations are rounded to: int16, and not at all."""
  forms = [encode(w, activations) for activations in ('int16', 'float')]
  return forms[1:] if forms[0].activations == 'float' else forms


def _rows(count, inputs=192, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(count).normal(size=(count, inputs)), dtype)


def _float64(a):
  return np.asarray(jnp.asarray(a, jnp.float32), np.float64)


def _check(y, x, w, p):
  """Compares with dense() in float64, within the rounding that the packed weight states."""
  x64, w64 = _float64(x), _float64(to_dense(w))
  bound = FLOAT32 * np.abs(x64) @ np.abs(w64)
  if p.activations == 'int16':
    bound += _activation_steps(x64, p) / 2 @ np.abs(w64)
    if p.format == 'nf4':
      bound += NF4_WORDS * np.abs(x64) @ _largest(w64, p.groups)
  if x.dtype == jnp.bfloat16:
    bound += BFLOAT16 * (np.abs(x64 @ w64) + bound)
  assert y.dtype == x.dtype
  excess = np.abs(_float64(y) - x64 @ w64) - bound
  assert excess.max() <= 0


def _block(p):
  size = 128 if p.groups == 1 else p.inputs // p.groups
  return next(block for block in (128, 64, 32, 16) if size % block == 0)


def _activation_steps(x64, p):
  """The step of each activation: 2^-13 of the power of two below the largest of its block."""
  block = _block(p)
  filled = np.pad(np.abs(x64), ((0, 0), (0, -p.inputs % block)))
  amax = filled.reshape(len(x64), -1, block).max(-1)
  steps = 2.0 ** (np.floor(np.log2(np.maximum(amax, 2.0**-63))) - 13)
  return np.repeat(steps, block, axis=1)[:, : p.inputs]


def _largest(w64, groups):
  grouped = np.abs(w64).reshape(groups, -1, w64.shape[1])
  return np.repeat(grouped.max(1), grouped.shape[1], axis=0)


TILES = ['int8', 'int4 g64', 'nf4', 'bf16', '2:4 int4 g32']  # one for each kind of tile


@pytest.mark.parametrize(
  'format, shape',
  [*((f, (192, 70)) for f in FORMATS), *((f, s) for f in TILES for s in [(192, 32), (384, 1)])],
)
def test_packing_keeps_every_number(format, shape):
  w = _weight(format, *shape)
  for p in _forms(w):
    assert tuple(p.shape) == shape and p.dtype == w.dtype
    # Under jit, second-level scales are multiplied and added in one rounding.
    rtol = 2e-7 if format == 'nf4 double' else 0
    np.testing.assert_allclose(_float64(to_dense(p)), _float64(to_dense(w)), rtol=rtol, atol=rtol)


@native
@instruction_sets
@formats
@pytest.mark.parametrize('rows, dtype', [(1, jnp.bfloat16), (3, jnp.float32)])
def test_products_are_those_of_the_dense_form(format, name, rows, dtype):
  w, x = _weight(format), _rows(rows, dtype=dtype)
  for p in _forms(w):
    _check(packed.product(x, p, instruction_set=name), x, w, p)


@native
@instruction_sets
@pytest.mark.parametrize('format', ['int8', 'int4 asymmetric', 'bf16', '2:4 bf16', '2:4 int4 g32'])
@pytest.mark.parametrize('rows', ROWS)
def test_any_number_of_rows(format, rows, name):
  w = _weight(format)
  p = encode(w)
  x = _rows(rows)
  _check(packed.product(x, p, instruction_set=name), x, w, p)


@native
@instruction_sets
@pytest.mark.parametrize('format', WHOLE_COLUMN)
@pytest.mark.parametrize('shape', [(1, 1), (7, 5), (65, 33), (130, 31), (259, 100)])
@pytest.mark.quick(shape=((1, 1), (7, 5), (130, 31)))
def test_odd_shapes(format, shape, name):
  w = _weight(format, *shape)
  for p, dtype in zip(_forms(w), (jnp.float32, jnp.bfloat16)):
    x = _rows(3, shape[0], dtype)
    _check(packed.product(x, p, instruction_set=name), x, w, p)


@native
@instruction_sets
@pytest.mark.parametrize('format', TWO_OF_FOUR)
@pytest.mark.parametrize('shape', [(4, 1), (12, 33), (132, 31), (260, 100)])
@pytest.mark.quick(shape=((4, 1), (132, 31)))
def test_odd_shapes_of_two_of_four(format, shape, name):
  test_odd_shapes(format, shape, name)


@native
def test_two_of_four_and_dense_weights_share_a_call():
  x = _rows(3, dtype=jnp.bfloat16)
  weights = [_weight(format, seed=i) for i, format in enumerate(['2:4 int8', 'int8', '2:4 bf16'])]
  kept = [encode(w, 'float') for w in weights]
  for y, w, p in zip(packed.joint_product(x, kept), weights, kept):
    _check(y, x, w, p)


@pytest.mark.parametrize(
  'w',
  [
    lambda w: sparse.compress(w, sparse.n_of_m_mask(sparse.magnitude_score(w), 4, 8), 4, 8),
    lambda w: _two_of_four(_cast(jnp.float32))(w),
    lambda w: _two_of_four(_quantize('int4', group_size=32, symmetric=False))(w),
    lambda w: _two_of_four(_quantize('nf4', group_size=32))(w),
  ],
  ids=['4:8', 'float32', 'asymmetric', 'nf4'],
)
def test_other_sparse_weights_stay_as_they_are(w):
  w = jax.jit(w)(jnp.ones((64, 32), jnp.bfloat16))
  assert not layout.can_pack(w) and layout.pack(w) is w


@native
@pytest.mark.parametrize('threads', [1, 2, 3, 8])
@pytest.mark.parametrize('rows', [1, 200])
def test_the_number_of_threads_changes_no_bit(threads, rows):
  x, p = _rows(rows, 576), encode(_weight('int4 g64', 576, 1000))
  alone = packed.product(x, p, threads=1)
  for _ in range(5):
    np.testing.assert_array_equal(packed.product(x, p, threads=threads), alone)


@native
@instruction_sets
@pytest.mark.parametrize(
  'format', ['int8', 'int8 asymmetric', 'int4 g32', 'int4 asymmetric', 'mxfp4', 'nvfp4']
)
def test_sums_of_integers_are_exact(format, name):
  # With scales of 1 all is integers: multiples of 16, so that float32 holds their sums.
  w = _weight(format)
  ones = jnp.ones(w.scales.shape, jnp.bfloat16)
  w = quantized.QuantizedTensor(w.values, ones, w.zeros, w.format, w.inputs, w.dtype)
  x = 32 * np.random.default_rng(0).integers(-(2**9), 2**9 + 1, (5, w.inputs))
  x[:, ::16] = 2**14
  zeros = 0 if w.zeros is None else np.repeat(np.asarray(w.zeros, int), w.group_size, axis=0)
  expected = x @ (np.asarray(w.codes(), np.float64) - zeros)
  y = packed.product(jnp.asarray(x, jnp.float32), encode(w), instruction_set=name)
  np.testing.assert_array_equal(np.asarray(y, np.int64), expected)


@native
@instruction_sets
def test_activations_are_rounded_as_stated(name):
  w = _weight('int4 g32')
  p = encode(w)
  # From 2^-80, where all is zero, to 2^80; some blocks end just below a power of two.
  x = np.asarray(_rows(9)) * np.exp2(np.arange(-80, 81, 20, dtype=np.float32))[:, None]
  x[:, 5] = np.nextafter(np.exp2(np.arange(-80, 81, 20, dtype=np.float32)) * 8, np.float32(0))
  steps = _activation_steps(x.astype(np.float64), p)
  rounded = np.rint(x / steps) * steps
  y = packed.product(jnp.asarray(x), p, instruction_set=name)
  dense = _float64(w.dense())
  bound = FLOAT32 * np.abs(rounded) @ np.abs(dense)
  np.testing.assert_array_less(np.abs(y - rounded @ dense), bound + 1e-37)


@native
@instruction_sets
@pytest.mark.parametrize('format', ['int8', 'int4 g64', '2:4 int4 g32'])
def test_an_outlier_costs_its_neighbours_next_to_nothing(format, name):
  w = _weight(format)
  x = np.asarray(_rows(3, dtype=jnp.bfloat16), np.float32)
  x[:, 9] = 60  # some twenty times the next largest: int8 would keep 2 to 3 bits of the others
  half_step = 2.0**-9  # of its block, where the other numbers are of size 1
  y = packed.product(jnp.asarray(x), encode(w), instruction_set=name)
  x64, w64 = _float64(x), _float64(to_dense(w))
  off = np.linalg.norm(y - x64 @ w64) / np.linalg.norm(np.delete(x64, 9, 1) @ np.delete(w64, 9, 0))
  assert off < half_step


@native
@instruction_sets
@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('format', ['int8', 'int4 asymmetric', 'nf4', 'fp8', '2:4 int4 g32'])
def test_scales_are_read_as_they_are_stored(format, dtype, name):
  cast = lambda w: dataclasses.replace(w, scales=w.scales.astype(dtype))
  w = _weight(format)
  w = dataclasses.replace(w, values=cast(w.values)) if '2:4' in format else cast(w)
  x = _rows(3)
  for p in _forms(w):
    assert p.scales.dtype == dtype
    _check(packed.product(x, p, instruction_set=name), x, w, p)


@native
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(bad):
  p = encode(_weight('int8'))
  x = _rows(2).at[1, 5].set(bad)
  y = packed.product(x, p)
  assert np.all(np.isfinite(y[0])) and not np.any(np.isfinite(y[1]))


@native
def test_no_rows_and_leading_axes():
  p = encode(_weight('int8'))
  assert linear.matmul(jnp.zeros((0, 192)), p).shape == (0, 70)
  x = _rows(6)
  folded = linear.matmul(x.reshape(2, 3, 192), p)
  np.testing.assert_array_equal(folded.reshape(6, 70), linear.matmul(x, p))
  np.testing.assert_array_equal(linear.matmul(x[0], p), linear.matmul(x[:1], p)[0])


@native
def test_gradients_and_batches_go_through():
  w = _weight('int8')
  p = encode(w, 'float')
  x = _rows(3)
  gradient = jax.grad(lambda x: linear.matmul(x, p).sum())(x)
  expected = np.broadcast_to(_float64(w.dense()).sum(1), x.shape)
  np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-4)
  y = jax.vmap(linear.matmul, (0, None))(x[:, None], p)
  np.testing.assert_allclose(y[:, 0], linear.matmul(x, p), rtol=1e-6, atol=1e-5)


@native
def test_what_is_packed_and_what_stays():
  w = _weight('int4 g32')
  assert isinstance(layout.pack(w), packed.PackedTensor)
  assert layout.pack(layout.pack(w)).activations == 'int16'
  assert isinstance(layout.pack(_weight('bf16')), packed.PackedTensor)
  plain = jnp.zeros((4, 4))
  assert layout.pack(plain) is plain
  adapted = adapter_starts.zero(w, 2, scale=1.0, key=jax.random.key(0))
  assert isinstance(layout.pack(adapted).base, packed.PackedTensor)
  experts = layout.pack(jax.vmap(FORMATS['int8'])(jnp.ones((2, 16, 8))))
  assert isinstance(experts, packed.PackedTensor) and experts.shape == (2, 16, 8)


@native
def test_the_kernel_names_its_instruction_set():
  name = linear.kernel(encode(_weight('int4 g32')), 'cpu')
  assert cpu.instruction_sets()[0] in name and 'int4' in name
  with pytest.raises(ValueError, match='mmx'):
    packed.product(_rows(1), encode(_weight('int8')), instruction_set='mmx')


def test_the_table_of_nf4_is_that_of_the_format():
  source = packed.__file__.replace('packed.py', 'formats.h')
  with open(source, encoding='utf-8') as file:
    text = file.read()
  assert all(f'{value!r}f' in text for value in quantized.NF4_CODEBOOK)


WITHOUT = """
import jax.numpy as jnp
from ops import experts, linear, quantized
from ops.kernels import cpu
from ops.kernels.cpu import layout
w = quantized.quantize(jnp.arange(12.0).reshape(4, 3), 'int8')
assert not cpu.available() and 'LISSOM_NATIVE' in cpu.why_not(), cpu.why_not()
assert layout.pack(w) is w and layout.pack_widened(w) is w
p = layout.encode(w)
assert linear.kernel(p, 'cpu') is None
groups = linear.grouped_matmul(jnp.ones((2, 4)), experts.stack([p, p]), jnp.array([0, 2]))
assert jnp.allclose(groups, jnp.ones((2, 4)) @ w.dense(), rtol=1e-5)
assert jnp.allclose(linear.matmul(jnp.ones((2, 4)), p), jnp.ones((2, 4)) @ w.dense(), rtol=1e-5)
"""


@native
def test_the_environment_turns_it_off():
  environment = {**os.environ, 'LISSOM_NATIVE': '0'}
  subprocess.run([sys.executable, '-c', WITHOUT], env=environment, check=True)


FORCED = """
import sys
from ops.kernels import cpu
try:
  print(cpu.instruction_sets()[0], cpu.load().selected)
except ValueError as error:
  print(error)
"""


@native
def test_the_environment_picks_an_instruction_set():
  names = cpu.instruction_sets()
  for setting in (names[-1], 'mmx'):
    environment = {**os.environ, 'LISSOM_NATIVE': setting}
    done = subprocess.run(
      [sys.executable, '-c', FORCED], env=environment, check=True, capture_output=True, text=True
    )
    if setting == 'mmx':
      assert "LISSOM_NATIVE='mmx'" in done.stdout and all(name in done.stdout for name in names)
    else:
      assert done.stdout.split() == [setting, setting]


@native
@instruction_sets
def test_products_of_one_input_are_those_of_each_alone(name):
  forms = [('int3', 70), ('int4 g64', 33), ('int8 asymmetric', 5), ('nf4', 64)]
  weights = [encode(_weight(format, 192, outputs)) for format, outputs in forms]
  for rows in (1, 70):
    x = _rows(rows)
    together = packed.joint_product(x, weights, instruction_set=name)
    for w, y in zip(weights, together):
      np.testing.assert_array_equal(y, packed.product(x, w, instruction_set=name))


@native
@pytest.mark.parametrize(
  'format, dtype',
  [*((f, jnp.bfloat16) for f in FORMATS), *((f, d) for f in TILES for d in ('float16', 'float32'))],
)
@pytest.mark.quick(format=(*TILES, 'int3', 'fp8', 'mxfp4', 'nvfp4'))
@pytest.mark.quick(format=(*TILES, 'fp8', 'nvfp4'))
def test_a_widened_weight_multiplies_as_it_is_multiplied_without_the_library(format, dtype):
  w = _weight(format, dtype=dtype)
  wide = layout.pack_widened(w)
  eight_bits = format in ('fp8', 'mxfp8', 'int8', 'int8 g32', 'int8 asymmetric')
  assert (wide is w) == (eight_bits or w.dtype == jnp.float32)
  np.testing.assert_array_equal(to_dense(wide), to_dense(w))
  x = _rows(70, dtype=w.dtype)
  scale = np.abs(np.asarray(x, np.float32)) @ np.abs(np.asarray(to_dense(w), np.float32))
  off = np.abs(np.asarray(linear.matmul(x, wide), np.float32) - linear.matmul(x, w))
  assert (off <= 2 * float(jnp.finfo(w.dtype).eps) * scale).all()


@native
def test_inputs_are_changed_before_a_widened_weight():
  x, int4 = _rows(20, dtype=jnp.bfloat16), _weight('int4 g32', dtype=jnp.bfloat16)
  for w in (rotated.RotatedTensor(int4, inner=1), quantize_activations(int4)):
    wide = layout.pack_widened(w)
    assert type(wide) is type(w) and isinstance(getattr(wide, w.passes_to), packed.PackedTensor)
    np.testing.assert_allclose(
      np.asarray(linear.matmul(x, wide), np.float32), linear.matmul(x, w), 2**-6, 2**-5
    )


@native
def test_one_call_for_the_products_of_one_form():
  formats = ['int8', 'int4 g64', 'int4 g32', 'bf16', 'f16', 'int8', 'bf16']
  weights = [encode(_weight(format)) for format in formats] + [
    encode(_weight('int8', seed=seed)) for seed in range(8)
  ]
  x = _rows(2)
  for w, y in zip(weights, linear.matmuls(x, weights)):
    np.testing.assert_array_equal(y, linear.matmul(x, w))
  # 10 of blocks of 128 are two calls; those of 64, 32, bf16 and f16 are one each.
  text = jax.jit(linear.matmuls).lower(x, weights).as_text()
  assert text.count(f'@{cpu.PRODUCT}(') == 6
  gradient = jax.grad(lambda x: sum(y.sum() for y in linear.matmuls(x, weights)))(x)
  expected = sum(_float64(w.dense()).sum(1) for w in weights)
  np.testing.assert_allclose(gradient, np.broadcast_to(expected, x.shape), rtol=1e-4, atol=1e-3)


@native
@pytest.mark.parametrize('format', ['int8', 'int4 column', 'bf16', '2:4 int8'])
@pytest.mark.parametrize('bits', [8, 4])
def test_weights_that_round_their_inputs_multiply_their_codes_exactly(format, bits):
  x, w = _rows(5), _weight(format)
  for wrap in (lambda w: w, functools.partial(rotated.RotatedTensor, inner=1)):
    slow = wrap(quantize_activations(w, bits))
    fast = layout.pack(slow)
    assert layout.pack(fast) is fast
    assert linear.kernel(fast, 'cpu').startswith('native') and fast.dtype == slow.dtype
    tolerance = 1e-5 * float(jnp.abs(x).max() * jnp.abs(to_dense(w)).sum(0).max())
    np.testing.assert_allclose(linear.matmul(x, fast), linear.matmul(x, slow), atol=tolerance)


@native
def test_a_weight_under_a_correction_has_its_kernel():
  w = adapter_starts.zero(_weight('int4 g64'), 2, scale=1.0, key=jax.random.key(0))
  assert linear.kernel(w, 'cpu') is None
  assert linear.kernel(layout.pack(w), 'cpu').startswith('native')
