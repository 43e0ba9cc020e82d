"""One contract for all weight types: what the models, files, meshes and recipes rely on."""

import dataclasses
import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import native, sharding
from ops import (
  activations,
  experts,
  int8_training,
  linear,
  lora,
  masked,
  qat,
  quantized,
  rotated,
  scales,
  sparse,
)
from ops.kernels import fused
from ops.kernels.cpu import layout
from ops.linear import WEIGHT_TYPES, Weight

INPUTS, OUTPUTS = 64, 32
REFITTED = 0.2  # a grid moves when it is fitted to its own points: 2 bits, most of all
# Their gradients and their stored form are not those of the rounded matrix, and have own tests.
ONLY_TRAINED = ('int8 products',)
TRAINED = ('value', 'adapter')  # the roles that gradients reach in any weight
# Sums of 64 products of order 1 in float32, and with 8 bits of mantissa.
TOLERANCE = {'float32': 2e-5, 'bfloat16': 2**-6}


def _quantized(name, **options):
  return lambda w_IO: quantized.quantize(w_IO, name, **options)


def _floating_zeros(w_IO):
  scales_JO, zeros_JO = quantized.fit(w_IO, 'int4', group_size=32, symmetric=False)
  return quantized.encode(w_IO, scales_JO, zeros_JO.astype(jnp.float16) + 0.25, 'int4')


def _sparse(n, m, fn=None):
  def make(w_IO):
    w = sparse.compress(w_IO, sparse.n_of_m_mask(jnp.abs(w_IO), n, m), n, m)
    return w if fn is None else w.map_values(fn)

  return make


def _lora(fn):
  def make(w_IO):
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape) / 8
    return lora.LoraTensor(fn(w_IO), draw(1, INPUTS, 4), draw(2, 4, OUTPUTS), 0.5)

  return make


def _dora(fn):
  lengths_O = jnp.linspace(0.5, 2, OUTPUTS)
  return lambda w_IO: lora.DoraTensor(_lora(fn)(w_IO), lengths_O)


def _activations(fn, bits=8, absmax=None):
  limit = None if absmax is None else jnp.float32(absmax)
  return lambda w_IO: activations.quantize_activations(fn(w_IO), bits, absmax=limit)


EXAMPLES = {
  'int8': _quantized('int8'),
  'int8 asymmetric groups': _quantized('int8', group_size=32, symmetric=False),
  'int4': _quantized('int4', group_size=16),
  'int3': _quantized('int3'),
  'int2 asymmetric': _quantized('int2', group_size=16, symmetric=False, clip='mse'),
  'int4 floating zeros': _floating_zeros,
  'nf4 double': _quantized('nf4', double=True),
  'fp8': _quantized('fp8_e4m3'),
  'mxfp4': _quantized('mxfp4'),
  'mxfp8': _quantized('mxfp8'),
  'nvfp4': _quantized('nvfp4'),
  'scales': lambda w_IO: scales.quantize_scales(jnp.abs(w_IO)),
  'e4m3 scales': lambda w_IO: scales.e4m3_scales(jnp.abs(w_IO)),
  '2:4': _sparse(2, 4),
  '8:16': _sparse(8, 16),
  '2:4 of int8': _sparse(2, 4, _quantized('int8')),
  '2:4 of mxfp4': _sparse(2, 4, _quantized('mxfp4')),
  'packed': lambda w_IO: layout.encode(_quantized('int4', group_size=16)(w_IO), 'float'),
  'fused': lambda w_IO: fused.pack(_quantized('int4', group_size=32)(w_IO), 'tpu'),
  'inputs': _activations(_quantized('int8')),
  'inputs static': _activations(_quantized('int4', group_size=-1), absmax=6),
  'inputs of 4 bits over int4': _activations(_quantized('int4', group_size=16), 4),
  'masked': lambda w_IO: masked.masked(w_IO, jnp.abs(w_IO) > 0.1),
  'masked int8': lambda w_IO: masked.masked(w_IO, jnp.abs(w_IO) > 0.1).map_values(
    _quantized('int8')
  ),
  'learned int4': lambda w_IO: qat.learn(w_IO, 'int4', group_size=16),
  'learned int8 with inputs': _activations(lambda w_IO: qat.learn(w_IO, 'int8', held=True)),
  'learned 2:4': _sparse(2, 4, lambda v: qat.learn(v, 'int8', held=True)),
  'int8 products': int8_training.Int8Products,
  'rotated': lambda w_IO: rotated.RotatedTensor(w_IO, 1),
  'rotated heads of int8': lambda w_IO: rotated.RotatedTensor(_quantized('int8')(w_IO), 16),
  'lora': _lora(lambda w_IO: w_IO),
  'dora': _dora(lambda w_IO: w_IO),
  'dora over nf4': _dora(_quantized('nf4', double=True)),
  'lora under a mask': lambda w_IO: lora.keep_zeros(_lora(_sparse(2, 4))(w_IO)),
  'lora over nf4': _lora(_quantized('nf4', double=True)),
  'lora over 2:4 of int4': _lora(_sparse(2, 4, _quantized('int4', group_size=16))),
}
examples = pytest.mark.parametrize('name', EXAMPLES)


def _matrix(name, *lead, seed=0):
  rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
  return jnp.asarray(rng.normal(size=(*lead, INPUTS, OUTPUTS)) / 8, jnp.float32)


@functools.cache
def _make(name):
  return jax.jit(EXAMPLES[name])


@functools.cache
def weight(name) -> Weight:
  return _make(name)(_matrix(name))


to_dense = jax.jit(lambda w: w.dense())
matmul = jax.jit(linear.matmul)


@functools.cache
def dense(name):
  """What the example stands for, in float64."""
  return np.asarray(to_dense(weight(name)), np.float64)


def _inputs(*lead, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(1).normal(size=(*lead, INPUTS)), dtype)


def _seen(x, name):
  """The inputs as the product takes them, in float64: most weights leave them as they are."""
  return np.asarray(weight(name).round_inputs(x), np.float64)


def _assert_near(actual, expected, dtype='float32'):
  actual = np.asarray(jnp.asarray(actual, jnp.float32), np.float64)
  atol = TOLERANCE[dtype] * max(1.0, np.abs(expected).max())
  np.testing.assert_allclose(actual, expected, atol=atol, rtol=0)


def _assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _types(w):
  own = {type(w).__name__} if isinstance(w, Weight) else set()
  inner = [v for v in vars(w).values() if isinstance(v, Weight)] if own else []
  return own.union(*map(_types, inner))


def test_every_registered_type_has_an_example():
  shapes = jax.ShapeDtypeStruct((INPUTS, OUTPUTS), jnp.float32)
  seen = set().union(*(_types(jax.eval_shape(make, shapes)) for make in EXAMPLES.values()))
  ours = {name for name, cls in WEIGHT_TYPES.items() if cls.__module__.startswith('ops.')}
  assert seen == ours, 'add an example to EXAMPLES for each registered type'


@examples
def test_it_stands_for_a_matrix(name):
  w = weight(name)
  assert isinstance(w, Weight)
  assert tuple(w.shape) == (INPUTS, OUTPUTS) and w.dtype == jnp.float32
  assert to_dense(w).shape == w.shape and to_dense(w).dtype == w.dtype
  half = jax.eval_shape(_make(name), jax.ShapeDtypeStruct((INPUTS, OUTPUTS), jnp.bfloat16))
  assert half.dtype == jax.eval_shape(lambda w: w.dense(), half).dtype


@examples
def test_making_it_twice_gives_the_same_bits(name):
  _assert_same(_make(name)(_matrix(name)), weight(name))
  assert np.abs(dense(name) - np.asarray(_matrix(name))).max() > 0  # an example that compresses


@examples
def test_the_product_with_the_identity_is_the_dense_form(name):
  _assert_near(matmul(jnp.eye(INPUTS), weight(name)), _seen(jnp.eye(INPUTS), name) @ dense(name))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('lead', [(), (5,), (2, 3)])
@examples
def test_products_are_those_of_the_dense_form(name, lead, dtype):
  x = _inputs(*lead, dtype=dtype)
  y = matmul(x, weight(name))
  assert y.shape == (*lead, OUTPUTS) and y.dtype == dtype
  _assert_near(y, _seen(x, name) @ dense(name), dtype)


@examples
def test_new_values_do_not_compile_again(name):
  traces = []

  @jax.jit
  def run(x, w):
    traces.append(1)
    return linear.matmul(x, w)

  x, other = _inputs(3), _make(name)(_matrix(name, seed=1))
  run(x, weight(name))
  _assert_near(run(x, other), _seen(x, name) @ np.asarray(to_dense(other), np.float64))
  assert len(traces) == 1


@functools.cache
def _experts(name):
  """Three experts of one example: made one by one, and together as one weight."""
  w_EIO = _matrix(name, 3)
  return [_make(name)(w_IO) for w_IO in w_EIO], jax.jit(jax.vmap(EXAMPLES[name]))(w_EIO)


@examples
def test_experts_are_a_leading_axis(name):
  alone, w = _experts(name)
  x_ETI = _inputs(3, 2)
  assert tuple(w.shape) == (3, INPUTS, OUTPUTS) and w.dtype == jnp.float32
  assert experts.count(w) == 3 and experts.count(alone[0]) is None
  dense_EIO = np.stack([np.asarray(to_dense(one), np.float64) for one in alone])
  _assert_near(jax.jit(linear.dense)(w), dense_EIO)
  _assert_near(jax.jit(jax.vmap(linear.matmul))(x_ETI, w), _seen(x_ETI, name) @ dense_EIO)


@examples
def test_experts_are_stacked_and_taken_bit_by_bit(name):
  alone, w = _experts(name)
  stacked = experts.stack(alone)
  assert jax.tree.structure(stacked) == jax.tree.structure(w)
  assert [a.shape for a in jax.tree.leaves(stacked)] == [a.shape for a in jax.tree.leaves(w)]
  assert stacked.nbytes == sum(one.nbytes for one in alone) > 0
  stacked.check()
  for e, one in enumerate(alone):
    _assert_same(experts.take(stacked, e), one)


@examples
def test_each_group_of_rows_meets_its_own_expert(name):
  alone, w = _experts(name)
  x_TI, sizes_E = _inputs(6), [2, 0, 3]
  y_TO = jax.jit(linear.grouped_matmul)(x_TI, w, jnp.asarray(sizes_E))
  owners = [alone[e] for e in np.repeat(np.arange(3), sizes_E)]
  rows = [
    np.asarray(one.round_inputs(x_I[None]), np.float64)[0] @ np.asarray(to_dense(one), np.float64)
    for x_I, one in zip(x_TI, owners)
  ]
  _assert_near(y_TO, np.stack([*rows, np.zeros(OUTPUTS)]))  # no expert has the last row


@examples
def test_the_gradient_of_a_grouped_product_is_that_of_each_group(name):
  if name in ONLY_TRAINED:
    return
  alone, w = _experts(name)
  x_TI, y_bar = _inputs(5), np.random.default_rng(2).normal(size=(5, OUTPUTS))
  product = lambda x: linear.grouped_matmul(x, w, jnp.array([2, 0, 3]))
  slope_TI = jax.jit(jax.grad(lambda x: jnp.sum(product(x) * jnp.float32(y_bar))))(x_TI)
  dense_ = lambda e: np.asarray(to_dense(alone[e]), np.float64)
  _assert_near(slope_TI, np.concatenate([y_bar[:2] @ dense_(0).T, y_bar[2:] @ dense_(2).T]))


@examples
def test_values_of_experts_are_mapped_as_those_of_each(name):
  alone, w = _experts(name)
  double = lambda one: one.map_values(lambda values: 2 * values)
  try:
    expected = [np.asarray(to_dense(jax.jit(double)(one)), np.float64) for one in alone]
  except ValueError:
    return  # test_values_are_mapped_or_the_refusal_says_why has the message
  mapped = jax.jit(lambda w: experts.each(double, w))(w)
  assert type(mapped) is type(w) and mapped.shape == w.shape
  _assert_near(jax.jit(linear.dense)(mapped), np.stack(expected))


@pytest.mark.parametrize('mesh_shape', [{'expert': 3}, {'expert': 3, 'model': 2}])
@examples
def test_sharded_experts_multiply_the_same(name, mesh_shape):
  _, w = _experts(name)
  mesh = sharding.make_mesh(**mesh_shape)
  places = sharding.weight_shardings(mesh, w, ('E', 'D', 'F'))
  placed = jax.device_put(w, places)
  assert all(a.sharding.spec[0] == 'expert' for a in jax.tree.leaves(placed))
  x_TI, sizes_E = jax.device_put(_inputs(6), sharding.batch_sharding(mesh)), jnp.array([2, 1, 3])
  expected = linear.grouped_matmul(_inputs(6), w, sizes_E)
  _assert_near(jax.jit(linear.grouped_matmul)(x_TI, placed, sizes_E), np.asarray(expected))


def test_experts_that_are_stored_differently_are_not_stacked():
  for other in ('int4', 'int8 asymmetric groups'):
    with pytest.raises(ValueError, match='expert 1 is not stored as expert 0 is'):
      experts.stack([weight('int8'), weight(other)])


def test_group_sizes_that_do_not_fit_are_refused():
  _, w = _experts('int8')
  for sizes in ([1, 2], [[1, 2, 3]]):
    with pytest.raises(ValueError, match='do not fit experts of shape'):
      linear.grouped_matmul(_inputs(6), w, jnp.array(sizes))
  with pytest.raises(ValueError, match='do not fit experts of shape'):
    linear.grouped_matmul(_inputs(6), weight('int8'), jnp.array([6]))


@examples
def test_the_gradient_of_the_input_is_that_of_the_dense_product(name):
  if name in ONLY_TRAINED:
    return
  x, y_bar = _inputs(4), np.random.default_rng(2).normal(size=(4, OUTPUTS))
  loss = lambda x, w: jnp.sum(linear.matmul(x, w) * jnp.asarray(y_bar, jnp.float32))
  _assert_near(jax.jit(jax.grad(loss))(x, weight(name)), y_bar @ dense(name).T)


@examples
def test_the_gradients_of_what_can_be_trained_are_those_of_the_dense_product(name):
  if name in ONLY_TRAINED:
    return
  leaves, structure = jax.tree.flatten(weight(name))
  trained = {i for i, role in enumerate(linear.roles(weight(name))) if role in TRAINED}
  x, y_bar = _inputs(4), jnp.asarray(np.random.default_rng(2).normal(size=(4, OUTPUTS)))

  def gradients(product):
    def loss(own):
      w = jax.tree.unflatten(structure, [own.get(i, leaf) for i, leaf in enumerate(leaves)])
      return jnp.sum(product(w) * y_bar.astype(jnp.float32))

    return jax.jit(jax.grad(loss))({i: leaves[i] for i in trained})

  seen = jnp.asarray(_seen(x, name), jnp.float32)
  expected = gradients(lambda w: seen @ w.dense())
  for i, gradient in gradients(lambda w: linear.matmul(x, w)).items():
    assert jnp.abs(gradient).max() > 0
    _assert_near(gradient, np.asarray(expected[i], np.float64))


@examples
def test_each_array_has_a_role_that_suits_its_type(name):
  roles = linear.roles(weight(name))
  for leaf, role in zip(jax.tree.leaves(weight(name)), roles, strict=True):
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    if role in TRAINED:
      assert floating and leaf.dtype.itemsize >= 2
    if role == 'mask':
      assert not floating
    if role == 'code':
      assert leaf.dtype.itemsize == 1


@examples
def test_bytes_are_those_of_the_leaves(name):
  leaves = jax.tree.leaves(weight(name))
  assert weight(name).nbytes == sum(a.size * a.dtype.itemsize for a in leaves) > 0


@examples
def test_it_is_a_pytree_and_a_parameter(name):
  leaves, treedef = jax.tree.flatten(weight(name))
  assert all(isinstance(leaf, jax.Array) for leaf in leaves)
  _assert_same(jax.tree.unflatten(treedef, leaves), weight(name))
  assert hash(treedef) == hash(jax.tree.structure(weight(name)))  # the key of jit's cache
  _assert_same(nnx.Param(weight(name)).get_value(), weight(name))


@examples
def test_it_is_described_and_built_again_bit_by_bit(name):
  module = nnx.Module()
  module.weight = nnx.Param(weight(name))
  arrays, layout = native.flatten(module)
  layout = json.loads(json.dumps(layout))
  assert sorted(arrays) == sorted(native.names(layout['weight'], 'weight'))
  built = native.build(layout['weight'], 'weight', arrays.__getitem__)
  assert type(built) is type(weight(name))
  _assert_same(built, weight(name))


@pytest.mark.parametrize('mesh_shape', [(2, 2, 2), (1, 1, 8)])
@examples
def test_sharded_it_multiplies_the_same(name, mesh_shape):
  data, fsdp, model = mesh_shape
  mesh = sharding.make_mesh(data=data, fsdp=fsdp, model=model)
  places = sharding.weight_shardings(mesh, weight(name), ('D', 'F'))
  placed = jax.device_put(weight(name), places)
  assert jax.tree.map(lambda a: a.sharding, placed) == places
  assert any(not a.sharding.is_fully_replicated for a in jax.tree.leaves(placed))
  _assert_same(jax.device_get(placed), jax.device_get(weight(name)))
  x = jax.device_put(_inputs(8), sharding.batch_sharding(mesh))
  y = matmul(x, placed)
  assert len(y.sharding.device_set) == 8
  _assert_near(y, _seen(x, name) @ dense(name))


@examples
def test_values_are_mapped_or_the_refusal_says_why(name):
  w = weight(name)
  try:
    doubled = w.map_values(lambda values: 2 * values)
  except ValueError as error:
    assert 'quantized' in str(error)
    return
  assert type(doubled) is type(w) and doubled.shape == w.shape
  if any(kind in name for kind in ('lora', 'dora', 'learned')):
    return  # corrections and held scales do not double; their own tests say what happens
  _assert_near(to_dense(doubled), 2 * dense(name))


@examples
def test_what_is_stored_multiplies_the_same_bit_for_bit(name):
  if name in ONLY_TRAINED:
    return
  final = jax.jit(linear.stored)(weight(name))
  assert 'Qat' not in ' '.join(_types(final))
  x = _inputs(3)
  assert np.asarray(matmul(x, final)).tobytes() == np.asarray(matmul(x, weight(name))).tobytes()
  _assert_same(linear.stored(final), final)


@examples
def test_refitting_its_own_matrix_changes_little_or_the_refusal_says_why(name):
  w = weight(name)
  try:
    again = jax.jit(lambda w: w.refit(w.dense()))(w)
  except ValueError as error:
    assert 'cannot store another matrix' in str(error)
    return
  assert jax.tree.structure(again) == jax.tree.structure(w)
  off = np.linalg.norm(np.asarray(to_dense(again), np.float64) - dense(name))
  assert off <= REFITTED * np.linalg.norm(dense(name))
  if isinstance(w, masked.MaskedTensor | sparse.SparseTensor):
    np.testing.assert_array_equal(np.asarray(to_dense(again))[dense(name) == 0], 0)


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
@examples
def test_a_kernel_has_a_name_or_there_is_none(name, platform):
  found = linear.kernel(weight(name), platform)
  assert found is None or (isinstance(found, str) and found)


@examples
def test_inputs_that_do_not_fit_are_refused(name):
  with pytest.raises(ValueError, match='x has 5 inputs, but the weight takes 64'):
    linear.matmul(jnp.zeros((2, 5)), weight(name))


@examples
def test_a_map_over_its_tree_may_leave_anything_in_the_place_of_arrays(name):
  w = weight(name)
  leaves, structure = jax.tree.flatten(w)
  for stand_in in (None, object(), True, jax.sharding.PartitionSpec(), jnp.zeros(())):
    assert type(jax.tree.unflatten(structure, [stand_in] * len(leaves))) is type(w)
  stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), w)
  assert tuple(stacked.shape) == (2, INPUTS, OUTPUTS)
  jax.tree.map(lambda leaf: jnp.sum(leaf.astype(jnp.float32)), w)


def _replaced(name, **fields):
  return lambda shapes: dataclasses.replace(shapes(name), **fields)


def _wrong(shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


# What is wrong with a weight of 64 x 32, and what the message says.
NONSENSE = {
  'format': (_replaced('int8', format='int5'), "'int5' is not one of int8, int4"),
  'no format': (_replaced('int8', format=['int8']), r"\['int8'\] is not one of"),
  'inputs': (_replaced('int8', inputs='64'), "'64' inputs"),
  'more inputs': (_replaced('int8', inputs=65), '65 inputs of int8 take 65 rows of int8, not 64'),
  'packed inputs': (
    _replaced('int4', inputs=66),
    '66 inputs of int4 take 33 rows of uint8, not 32',
  ),
  'scales': (_replaced('int8', scales=_wrong((3, 5))), '32 columns of codes have scales for 5'),
  'groups': (_replaced('int4', scales=_wrong((3, 32))), '3 groups of scales do not divide 64'),
  'no groups': (_replaced('int4', scales=_wrong((0, 32))), '0 groups of scales do not divide 64'),
  'whole scales': (_replaced('int8', scales=_wrong((1, 32), jnp.int8)), 'floating, not int8'),
  'codes': (_replaced('int8', values=_wrong((64, 32))), 'codes of int8 are int8, not float32'),
  'fp8 codes': (_replaced('int8', format='fp8_e4m3'), 'fp8_e4m3 are float8_e4m3fn, not int8'),
  'zeros': (
    _replaced('int2 asymmetric', zeros=_wrong((1, 32), jnp.uint8)),
    r'zeros have the shape \(1, 32\), and scales \(4, 32\)',
  ),
  'nf4 zeros': (_replaced('fp8', zeros=_wrong((1, 32), jnp.uint8)), 'fp8_e4m3 has no zero points'),
  'scales of int8': (
    _replaced('int8', scales=_wrong((1, 32), jnp.float8_e8m0fnu)),
    'scales of int8 are floating, not float8_e8m0fnu',
  ),
  'blocks of mxfp4': (
    _replaced('mxfp4', scales=_wrong((4, 32), jnp.float8_e8m0fnu)),
    'mxfp4 has blocks of 32 inputs, not of 16',
  ),
  'blocks of nvfp4': (
    lambda make: dataclasses.replace(make('nvfp4'), scales=make('mxfp4').scales),
    'scales of nvfp4 are floating, not float8_e8m0fnu',
  ),
  'zeros of mxfp8': (_replaced('mxfp8', zeros=_wrong((2, 32), jnp.uint8)), 'has no zero points'),
  'values of e4m3 scales': (_replaced('e4m3 scales', values=_wrong((64, 32))), 'not float32'),
  'scale of e4m3 scales': (_replaced('e4m3 scales', scale=_wrong((), jnp.int8)), 'not int8'),
  'lead': (_replaced('int8', scales=_wrong((2, 1, 32))), r'leading axes \(2,\), and others'),
  'blocks of scales': (_replaced('scales', scales=_wrong((64, 2))), r'not \(64, 1\)'),
  'codes of scales': (_replaced('scales', codes=_wrong((64, 32))), 'codes of scales are int8'),
  'n of m': (_replaced('2:4', n=4), '0 < N < M <= 16, not 4:4'),
  'no n': (_replaced('2:4', n=0), 'n and m are whole numbers above 0, not 0 and 4'),
  'indices': (_replaced('2:4', indices=_wrong((7, 32), jnp.uint8)), r'uint8 of the shape \(8, 32'),
  'rank': (_replaced('lora', a_IR=_wrong((64, 3))), 'axis R of .*RO.* is 4, but was 3'),
  'correction': (_replaced('lora', scale='1'), "finite number, not '1'"),
  'heads': (_replaced('rotated', inner=3), 'a divisor of the 64 inputs, not 3'),
  'mask': (_replaced('masked', mask=_wrong((7, 32), jnp.uint8)), r'uint8 of the shape \(8, 32'),
  'bits': (_replaced('inputs', bits=3), 'activations have 8 or 4 bits, not 3'),
  'rounded twice': (
    lambda make: dataclasses.replace(make('inputs'), values=make('inputs')),
    'alre',
  ),
  'layout': (_replaced('packed', format='int3'), "'int3' is not one of int8, int4, nf4"),
  'tiles': (_replaced('packed', outputs=64), r'\(2, 16\) tiles and steps, not \(1, 16\)'),
  'fused': (_replaced('fused', weight=_wrong((64, 32))), 'no kernel multiplies by a'),
}


@pytest.mark.parametrize('what', NONSENSE)
def test_what_does_not_fit_is_refused_when_it_is_built(what):
  shapes = lambda name: jax.eval_shape(_make(name), _wrong((INPUTS, OUTPUTS)))
  build, message = NONSENSE[what]
  with pytest.raises(ValueError, match=message):
    build(shapes)


def test_real_arrays_are_checked_too():
  with pytest.raises(ValueError, match='32 columns of codes have scales for 5'):
    dataclasses.replace(weight('int8'), scales=jnp.ones((3, 5)))
