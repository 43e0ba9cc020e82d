"""The accelerators' own compilers say that no product holds a widened copy of its weight.

They need no device, but their libraries: `pip install 'lissom[tpu]'` and `'lissom[cuda]'`; without
one its tests are skipped. Run them with

  python -m pytest -n 0 tests/ops/kernels/compiled_test.py
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.eval import buffers, targets
from ops import activations, linear, quantized
from ops.kernels import fused

INPUTS, OUTPUTS = 1024, 2816  # past the size that a compiler would keep in registers
# Bytes: float32 sums of eight rows for each of 16 groups or splits. The smallest weight widened to
# bfloat16 would take four times as much.
ALLOWED = 16 * 8 * OUTPUTS * 4

FORMATS = {
  'int8': {'format': 'int8'},
  'int8 g128': {'format': 'int8', 'group_size': 128},
  'int8 asymmetric': {'format': 'int8', 'group_size': 64, 'symmetric': False},
  'int4': {'format': 'int4', 'group_size': 128},
  'int4 g32': {'format': 'int4', 'group_size': 32},
  'int4 asymmetric': {'format': 'int4', 'group_size': 128, 'symmetric': False},
  'int4 g32 asymmetric': {'format': 'int4', 'group_size': 32, 'symmetric': False},
  'int4 column': {'format': 'int4', 'group_size': -1},
  'nf4': {'format': 'nf4'},
  'nf4 double': {'format': 'nf4', 'double': True},
  'fp8': {'format': 'fp8_e4m3'},
  'mxfp4': {'format': 'mxfp4'},
  'mxfp8': {'format': 'mxfp8'},
}
formats = pytest.mark.parametrize('format', FORMATS)
DEVICES = {'tpu': targets.tpu, 'gpu': targets.gpu}


def _devices(platform):
  try:
    return DEVICES[platform]()
  except ValueError as error:
    pytest.skip(str(error))


def _shapes(fn, platform):
  make = lambda w_IO: fused.pack(fn(w_IO), platform)
  return jax.eval_shape(make, jax.ShapeDtypeStruct((INPUTS, OUTPUTS), jnp.bfloat16))


def _compile(platform, w, rows, product=linear.matmul, dtype=jnp.bfloat16):
  x = jax.ShapeDtypeStruct((rows, INPUTS), dtype)
  return targets.compile(product, _devices(platform)[0], x, w)


@pytest.mark.parametrize('rows', [1, 8])
@pytest.mark.parametrize('platform', DEVICES)
@formats
def test_no_weight_is_widened(format, platform, rows):
  w = _shapes(lambda w_IO: quantized.quantize(w_IO, **FORMATS[format]), platform)
  claimed = linear.kernel(w, platform)
  assert bool(claimed) == ((format, platform) != ('int8 asymmetric', 'gpu'))
  compiled = _compile(platform, w, rows)
  assert bool(claimed) == (buffers.widened(compiled.as_text(), [w]) == [])
  allowed = ALLOWED * (2 if format == 'mxfp8' else 1)  # it has 32 groups
  assert not claimed or compiled.memory_analysis().temp_size_in_bytes <= allowed


@pytest.mark.parametrize('platform', DEVICES)
def test_the_dense_form_is_caught_widening(platform):
  w = _shapes(lambda w_IO: quantized.quantize(w_IO, 'int8', group_size=64), platform)
  compiled = _compile(platform, w, 8, quantized.through_dense)
  assert buffers.widened(compiled.as_text(), [w])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('platform', DEVICES)
def test_prefill_is_compiled_too(platform, dtype):
  for format in ('int4', 'nf4', 'int4 g32 asymmetric'):
    w = _shapes(lambda w_IO, format=format: quantized.quantize(w_IO, **FORMATS[format]), platform)
    compiled = _compile(platform, w, 300, dtype=dtype)
    assert buffers.widened(compiled.as_text(), [w]) == []


@pytest.mark.parametrize('rows', [1, 64])
@pytest.mark.parametrize('bits', [8, 4])
def test_rounded_activations_meet_integers_on_a_tpu(bits, rows):
  make = lambda w_IO: quantized.quantize(w_IO, f'int{bits}', group_size=-1)
  w = _shapes(lambda w_IO: activations.quantize_activations(make(w_IO)), 'tpu')
  compiled = _compile('tpu', w, rows)
  assert buffers.widened(compiled.as_text(), [w]) == []
  # The matrix unit multiplies the integers as they are: a convolution of them, summed in s32.
  (product,) = (line for line in compiled.as_text().splitlines() if ' convolution(' in line)
  assert ' = s32[' in product


@pytest.mark.parametrize('axis', ['I', 'O'])
def test_xla_splits_the_product_over_a_mesh(axis):
  mesh = Mesh(_devices('tpu'), ('model',))
  make = lambda w_IO: fused.pack(quantized.quantize(w_IO, 'int4'), 'tpu', one_device=False)
  w = jax.eval_shape(make, jax.ShapeDtypeStruct((INPUTS, OUTPUTS), jnp.bfloat16))
  spec = PartitionSpec('model', None) if axis == 'I' else PartitionSpec(None, 'model')
  whole = NamedSharding(mesh, PartitionSpec())
  x = targets.placed(jax.ShapeDtypeStruct((1, INPUTS), jnp.bfloat16), whole)
  compiled = jax.jit(linear.matmul).lower(x, targets.placed(w, NamedSharding(mesh, spec))).compile()
  parts = 4 * (axis == 'I') or 1, 4 * (axis == 'O') or 1
  part = jax.ShapeDtypeStruct((INPUTS // parts[0], OUTPUTS // parts[1]), jnp.int4)
  assert buffers.widened(compiled.as_text(), [part]) == []
  assert ('all-reduce' in compiled.as_text()) == (axis == 'I')


def test_a_model_spread_over_devices_compiles_where_the_kernel_would_not():
  mesh = Mesh(_devices('tpu'), ('model',))
  sharding = NamedSharding(mesh, PartitionSpec())
  shape = jax.ShapeDtypeStruct((INPUTS, OUTPUTS), jnp.bfloat16)
  x = targets.placed(jax.ShapeDtypeStruct((1, INPUTS), jnp.bfloat16), sharding)
  w = jax.eval_shape(lambda w_IO: quantized.quantize(w_IO, 'nf4'), shape)
  packed = lambda alone: targets.placed(
    jax.eval_shape(lambda w: fused.pack(w, 'tpu', one_device=alone), w), sharding
  )
  jax.jit(linear.matmul).lower(x, packed(False)).compile()
  with pytest.raises(NotImplementedError, match='automatically partitioned'):
    jax.jit(linear.matmul).lower(x, packed(True))
