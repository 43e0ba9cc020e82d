"""Tests the accelerators' kernels against numpy in interpreted mode, and which weights they take.

Where there is a GPU or a TPU, the compiled kernels are tested too:

  JAX_PLATFORMS=cuda,cpu python -m pytest -n 0 -m accelerator tests/ops/kernels/fused_test.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import activations, adapter_starts, linear, quantized, rotated
from ops.kernels import fused
from ops.kernels.gpu import quantized_matmul as gpu
from ops.kernels.tpu import quantized_matmul as tpu

# Sums in float32 in another order, relative to the sum of the magnitudes of the terms. With zero
# points, two sums are subtracted that are larger than their difference.
FLOAT32 = {True: 1e-6, False: 1e-5}
BFLOAT16 = 2**-8  # of the result, beside float32's
CODEBOOK = 2**-9  # of each term, where a codebook's values are multiplied in bfloat16

EXAMPLES = {
  'nf4': {'format': 'nf4', 'group_size': 64},
  'nf4 double': {'format': 'nf4', 'group_size': 64, 'double': True},
  'nf4 column': {'format': 'nf4', 'group_size': -1},
  'int4': {'format': 'int4', 'group_size': 64, 'clip': 'signed'},  # some scales are negative
  'int4 asymmetric': {'format': 'int4', 'group_size': 32, 'symmetric': False},
  'int4 column': {'format': 'int4', 'group_size': -1},
  'int3': {'format': 'int3', 'group_size': 32},
  'mxfp4': {'format': 'mxfp4'},
  'nvfp4': {'format': 'nvfp4'},
}
QUICK = ('nf4', 'int4 asymmetric')  # interpreting takes seconds; the others are for -m slow
examples = pytest.mark.parametrize(
  'name', [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EXAMPLES]
)


@functools.cache
def _weight(name, inputs=192, outputs=70):
  draw = np.random.default_rng([inputs, outputs]).normal(size=(inputs, outputs))
  quantize = jax.jit(lambda w_IO: quantized.quantize(w_IO, **EXAMPLES[name]))
  return quantize(jnp.asarray(draw, jnp.float32))


to_dense = jax.jit(linear.dense)


def _rows(rows, inputs=192, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(rows).normal(size=(rows, inputs)), dtype)


def _float64(a):
  return np.asarray(jnp.asarray(a, jnp.float32), np.float64)


def _check(y, x, w):
  x64, w64 = _float64(x), _float64(to_dense(w))
  bound = FLOAT32[w.zeros is None] * np.abs(x64) @ np.abs(w64)
  if x.dtype == jnp.bfloat16:
    bound += BFLOAT16 * np.abs(x64 @ w64)
    bound += CODEBOOK * np.abs(x64) @ np.abs(w64) * (w.format == 'nf4')
  assert y.dtype == x.dtype and y.shape == (len(x), w.shape[1])
  assert (np.abs(_float64(y) - x64 @ w64) - bound).max() <= 0


@examples
@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
def test_kernels_multiply_like_the_dense_form(platform, name):
  kernel, w = fused.KERNELS[platform], _weight(name)
  if not kernel.takes(w):
    assert name in {'gpu': ('int3', 'nvfp4'), 'tpu': ('int4', 'int4 column', 'nvfp4')}[platform]
    return
  x = _rows(3, dtype=jnp.bfloat16 if name == 'nf4' else jnp.float32)
  _check(kernel.product(x, w, interpret=True), x, w)


def test_blocks_past_the_end_add_nothing_on_a_tpu(monkeypatch):
  for constant, size in (('BLOCK_INPUTS', 64), ('BLOCK_OUTPUTS', 128), ('BLOCK_ROWS', 8)):
    monkeypatch.setattr(tpu, constant, size)
  w = _weight('int4 asymmetric', inputs=9 * 32, outputs=200)  # pieces by eights, so two blocks
  x = _rows(11, 9 * 32)
  _check(fused.KERNELS['tpu'].product(x, w, interpret=True), x, w)


def test_splits_and_blocks_past_the_end_on_a_gpu(monkeypatch):
  assert [gpu._splits(steps, wanted) for steps, wanted in ((12, 9), (12, 1), (7, 9))] == [4, 1, 1]
  monkeypatch.setattr(gpu, 'BLOCK_OUTPUTS', 32)
  w, x = _weight('int4 asymmetric', 256, 70), _rows(21, 256)
  _check(fused.KERNELS['gpu'].product(x, w, interpret=True), x, w)


@pytest.mark.parametrize('name', ['int4', 'int4 asymmetric'])
def test_a_gpu_decodes_integers_in_bfloat16(name):
  w, x = _weight(name), _rows(3, dtype=jnp.bfloat16)
  x64, w64 = _float64(x), _float64(to_dense(w))
  y = fused.KERNELS['gpu'].product(x, w, interpret=True)
  # An offset is subtracted, as with zero points.
  bound = FLOAT32[False] * np.abs(x64) @ np.abs(w64) + BFLOAT16 * np.abs(x64 @ w64)
  assert y.dtype == jnp.bfloat16 and (np.abs(_float64(y) - x64 @ w64) <= bound).all()


@examples
def test_a_gpu_multiplies_by_several_weights_in_one_kernel(name):
  weights = [_weight(name, outputs=outputs) for outputs in (70, 140, 10)]
  if not fused.KERNELS['gpu'].takes(weights[0]):
    return
  x = _rows(3)
  found = fused._gpu_products(x, weights, interpret=True)
  for y, w in zip(found, weights, strict=True):
    _check(y, x, w)


@pytest.mark.parametrize('formats', [['nf4'] * 3, ['nf4', 'int4'], ['int4', 'int4 asymmetric']])
def test_one_kernel_is_lowered_for_weights_that_are_alike(formats):
  weights = [fused.pack(_weight(name), 'gpu') for name in formats]
  x = _rows(2, dtype=jnp.bfloat16)
  text = jax.jit(linear.matmuls).trace(x, weights).lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('__gpu$xla.gpu.triton') == len(set(formats))
  x = _rows(2)
  for y, name in zip(jax.jit(linear.matmuls)(x, weights), formats, strict=True):
    _check(y, x, _weight(name))


@pytest.mark.parametrize('name', ['nf4', 'int4 asymmetric'])
@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_products_are_lowered_to_kernels(platform, name):
  w = fused.pack(_weight(name), {'cuda': 'gpu'}.get(platform, platform))
  traced = jax.jit(linear.matmul).trace(_rows(2, dtype=jnp.bfloat16), w)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert {'tpu': '@tpu_custom_call', 'cuda': 'triton'}[platform] in text
  assert 'custom_call' not in traced.lower(lowering_platforms=('cpu',)).as_text()


@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
@examples
def test_packing_preserves_values(platform, name):
  w = _weight(name)
  packed = fused.pack(w, platform)
  np.testing.assert_array_equal(jax.jit(lambda w: w.dense())(packed), jax.jit(_dense)(w))
  assert fused.pack(packed, platform) is packed
  _check(linear.matmul(_rows(2), packed), _rows(2), w)


def _dense(w):
  return w.dense()


def _packed(name, platform, **options):
  """Returns the shapes of an example's packed form."""
  shape = jax.ShapeDtypeStruct((192, 70), jnp.float32)
  make = lambda w_IO: fused.pack(quantized.quantize(w_IO, **EXAMPLES[name]), platform, **options)
  return jax.eval_shape(make, shape)


def test_which_weights_use_a_kernel_and_which_use_xla():
  left_to_xla = lambda platform, **options: {
    name
    for name in EXAMPLES
    if isinstance(_packed(name, platform, **options), quantized.QuantizedTensor)
  }
  assert left_to_xla('tpu') == {'int4', 'int4 column', 'nvfp4'}
  assert left_to_xla('gpu') == {'int3', 'nvfp4'}
  assert left_to_xla('tpu', one_device=False) == set(EXAMPLES)
  assert _packed('int4', 'tpu').values.dtype == jnp.int4
  assert _packed('int4 asymmetric', 'tpu', one_device=False).values.dtype == jnp.uint4
  stored = _weight('nf4')
  assert fused.pack(stored, 'tpu', one_device=False) is stored
  odd = quantized.quantize(jnp.ones((48, 8)), 'nf4', group_size=24)
  assert fused.pack(odd, 'tpu') is odd and fused.pack(odd, 'gpu') is odd
  array = jnp.ones((4, 4))
  assert fused.pack(array, 'gpu') is array


def test_weights_inside_other_types_are_packed():
  w, key = _weight('nf4'), jax.random.key(0)
  adapted = fused.pack(adapter_starts.zero(w, 2, scale=1.0, key=key), 'gpu')
  assert isinstance(adapted.base, fused.FusedTensor)
  turned = fused.pack(rotated.RotatedTensor(w, 1), 'gpu')
  assert isinstance(turned.weight, fused.FusedTensor)
  small = activations.quantize_activations(_weight('int4 column'))
  assert fused.pack(small, 'tpu').values.values.dtype == jnp.int4
  np.testing.assert_array_equal(
    linear.matmul(_rows(2), fused.pack(small, 'tpu')), linear.matmul(_rows(2), small)
  )
  plain = adapter_starts.zero(jnp.ones((8, 8)), 2, scale=1.0, key=key)
  assert fused.pack(plain, 'tpu') is plain


def test_kernel_names_claim_no_speed():
  w = _weight('nf4')
  for platform in ('tpu', 'gpu'):
    name = linear.kernel(fused.pack(w, platform), platform)
    assert name.startswith('Pallas') and 'nf4' in name and quantized.UNMEASURED in name
    assert linear.kernel(w, platform) is None
  assert linear.kernel(fused.pack(w, 'gpu'), 'cpu') is None


def test_the_gpu_kernel_takes_the_tpu_layout():
  x, signed = _rows(2), quantized.native(_weight('int4'))
  assert signed.values.dtype == jnp.int4
  _check(fused.KERNELS['gpu'].product(x, signed, interpret=True), x, _weight('int4'))


@pytest.mark.accelerator
@pytest.mark.skipif(jax.default_backend() not in fused.KERNELS, reason='needs a GPU or a TPU')
@pytest.mark.parametrize('rows', [1, 5, 200])
@pytest.mark.parametrize('name', EXAMPLES)
def test_on_the_device_itself(name, rows):
  w, x = _weight(name, 512, 384), _rows(rows, 512, jnp.bfloat16)
  _check(jax.jit(linear.matmul)(x, fused.pack(w, jax.default_backend())), x, w)
