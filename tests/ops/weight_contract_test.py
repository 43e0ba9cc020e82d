"""One contract for all weight types: what the models, files, meshes and recipes rely on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import native, sharding
from ops import linear, masked, sparse
from ops.linear import WEIGHT_TYPES, Weight

INPUTS, OUTPUTS = 64, 32  # of the examples
REFITTED = 0.2  # a grid moves when it is fitted to its own points: 2 bits, most of all
TRAINED = ('value', 'adapter')  # the roles that gradients reach in any weight
to_dense = jax.jit(lambda w: w.dense())
matmul = jax.jit(linear.matmul)


def _types(w):
  own = {type(w).__name__} if isinstance(w, Weight) else set()
  inner = [v for v in vars(w).values() if isinstance(v, Weight)] if own else []
  return own.union(*map(_types, inner))


def test_every_registered_type_has_an_example(all_examples):
  shapes = jax.ShapeDtypeStruct((INPUTS, OUTPUTS), jnp.float32)
  seen = set().union(*(_types(jax.eval_shape(e.make, shapes)) for e in all_examples.values()))
  ours = {name for name, cls in WEIGHT_TYPES.items() if cls.__module__.startswith('ops.')}
  assert seen == ours, 'add an example to EXAMPLES for each registered type'


def test_it_stands_for_a_matrix(example):
  w = example.weight
  assert isinstance(w, Weight)
  assert tuple(w.shape) == (INPUTS, OUTPUTS) and w.dtype == jnp.float32
  assert to_dense(w).shape == w.shape and to_dense(w).dtype == w.dtype
  half = jax.eval_shape(example.make, jax.ShapeDtypeStruct((INPUTS, OUTPUTS), jnp.bfloat16))
  assert half.dtype == jax.eval_shape(lambda w: w.dense(), half).dtype


def test_making_it_twice_gives_the_same_bits(example, assert_same):
  assert_same(example.make(example.matrix()), example.weight)
  assert (
    np.abs(example.dense - np.asarray(example.matrix())).max() > 0
  )  # an example that compresses


def test_the_product_with_the_identity_is_the_dense_form(example, assert_near):
  assert_near(
    matmul(jnp.eye(INPUTS), example.weight), example.seen(jnp.eye(INPUTS)) @ example.dense
  )


@pytest.mark.parametrize('lead, dtype', [((), 'float32'), ((2, 3), 'bfloat16')])
def test_products_are_those_of_the_dense_form(example, lead, dtype, inputs_of, assert_near):
  x = inputs_of(*lead, dtype=dtype)
  y = matmul(x, example.weight)
  assert y.shape == (*lead, OUTPUTS) and y.dtype == dtype
  assert_near(y, example.seen(x) @ example.dense, dtype)


def test_some_columns_are_those_of_the_dense_form(example, assert_near):
  some = np.array([31, 0, 17, 17, 5])
  found = jax.jit(lambda w: linear.dense(linear.columns(w, some)))(example.weight)
  assert_near(found, example.dense[:, some])


def test_new_values_do_not_compile_again(example, inputs_of, assert_near):
  traces = []

  @jax.jit
  def run(x, w):
    traces.append(1)
    return linear.matmul(x, w)

  x, other = inputs_of(3), example.make(example.matrix(seed=1))
  run(x, example.weight)
  assert_near(run(x, other), example.seen(x) @ np.asarray(to_dense(other), np.float64))
  assert len(traces) == 1


def test_the_gradient_of_the_input_is_that_of_the_dense_product(example, inputs_of, assert_near):
  if example.only_trained:
    return
  x, y_bar = inputs_of(4), np.random.default_rng(2).normal(size=(4, OUTPUTS))
  loss = lambda x, w: jnp.sum(linear.matmul(x, w) * jnp.asarray(y_bar, jnp.float32))
  assert_near(jax.jit(jax.grad(loss))(x, example.weight), y_bar @ example.dense.T)


def test_the_gradients_of_what_can_be_trained_are_those_of_the_dense_product(
  example, inputs_of, assert_near
):
  if example.only_trained:
    return
  leaves, structure = jax.tree.flatten(example.weight)
  trained = {i for i, role in enumerate(linear.roles(example.weight)) if role in TRAINED}
  x, y_bar = inputs_of(4), jnp.asarray(np.random.default_rng(2).normal(size=(4, OUTPUTS)))

  def gradients(product):
    def loss(own):
      w = jax.tree.unflatten(structure, [own.get(i, leaf) for i, leaf in enumerate(leaves)])
      return jnp.sum(product(w) * y_bar.astype(jnp.float32))

    return jax.jit(jax.grad(loss))({i: leaves[i] for i in trained})

  seen = jnp.asarray(example.seen(x), jnp.float32)
  expected = gradients(lambda w: seen @ w.dense())
  for i, gradient in gradients(lambda w: linear.matmul(x, w)).items():
    assert jnp.abs(gradient).max() > 0
    assert_near(gradient, np.asarray(expected[i], np.float64))


def test_each_array_has_a_role_that_suits_its_type(example):
  roles = linear.roles(example.weight)
  for leaf, role in zip(jax.tree.leaves(example.weight), roles, strict=True):
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    if role in TRAINED:
      assert floating and leaf.dtype.itemsize >= 2
    if role == 'mask':
      assert not floating
    if role == 'code':
      assert leaf.dtype.itemsize == 1


def test_bytes_are_those_of_the_leaves(example):
  leaves = jax.tree.leaves(example.weight)
  assert example.weight.nbytes == sum(a.size * a.dtype.itemsize for a in leaves) > 0


def test_it_is_a_pytree_and_a_parameter(example, assert_same):
  leaves, treedef = jax.tree.flatten(example.weight)
  assert all(isinstance(leaf, jax.Array) for leaf in leaves)
  assert_same(jax.tree.unflatten(treedef, leaves), example.weight)
  assert hash(treedef) == hash(jax.tree.structure(example.weight))  # the key of jit's cache
  assert_same(nnx.Param(example.weight).get_value(), example.weight)


def test_it_is_described_and_built_again_bit_by_bit(example, assert_same):
  module = nnx.Module()
  module.weight = nnx.Param(example.weight)
  arrays, layout = native.flatten(module)
  layout = json.loads(json.dumps(layout))
  assert sorted(arrays) == sorted(native.names(layout['weight'], 'weight'))
  built = native.build(layout['weight'], 'weight', arrays.__getitem__)
  assert type(built) is type(example.weight)
  assert_same(built, example.weight)


def test_sharded_it_multiplies_the_same(example, inputs_of, assert_near, assert_same):
  mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
  places = sharding.weight_shardings(mesh, example.weight, ('D', 'F'))
  placed = jax.device_put(example.weight, places)
  assert jax.tree.map(lambda a: a.sharding, placed) == places
  assert any(not a.sharding.is_fully_replicated for a in jax.tree.leaves(placed))
  assert_same(jax.device_get(placed), jax.device_get(example.weight))
  x = jax.device_put(inputs_of(8), sharding.batch_sharding(mesh))
  y = matmul(x, placed)
  assert len(y.sharding.device_set) == 8
  assert_near(y, example.seen(x) @ example.dense)


def test_values_are_mapped_or_the_refusal_says_why(example, assert_near):
  w = example.weight
  try:
    doubled = w.map_values(lambda values: 2 * values)
  except ValueError as error:
    assert 'quantized' in str(error)
    return
  assert type(doubled) is type(w) and doubled.shape == w.shape
  if any(kind in example.name for kind in ('lora', 'dora', 'learned')):
    return  # corrections and held scales do not double; their own tests say what happens
  assert_near(to_dense(doubled), 2 * example.dense)


def test_what_is_stored_multiplies_the_same_bit_for_bit(example, inputs_of, assert_same):
  if example.only_trained:
    return
  final = jax.jit(linear.stored)(example.weight)
  assert 'Qat' not in ' '.join(_types(final))
  x = inputs_of(3)
  assert np.asarray(matmul(x, final)).tobytes() == np.asarray(matmul(x, example.weight)).tobytes()
  assert_same(linear.stored(final), final)


def test_refitting_its_own_matrix_changes_little_or_the_refusal_says_why(example):
  w = example.weight
  try:
    again = jax.jit(lambda w: w.refit(w.dense()))(w)
  except ValueError as error:
    assert 'cannot store another matrix' in str(error)
    return
  assert jax.tree.structure(again) == jax.tree.structure(w)
  off = np.linalg.norm(np.asarray(to_dense(again), np.float64) - example.dense)
  assert off <= REFITTED * np.linalg.norm(example.dense)
  if isinstance(w, masked.MaskedTensor | sparse.SparseTensor):
    np.testing.assert_array_equal(np.asarray(to_dense(again))[example.dense == 0], 0)


def test_a_kernel_has_a_name_or_there_is_none(example):
  for platform in ('cpu', 'gpu', 'tpu'):
    found = linear.kernel(example.weight, platform)
    assert found is None or (isinstance(found, str) and found)


def test_inputs_that_do_not_fit_are_refused(example):
  with pytest.raises(ValueError, match='x has 5 inputs, but the weight takes 64'):
    linear.matmul(jnp.zeros((2, 5)), example.weight)


def test_a_map_over_its_tree_may_leave_anything_in_the_place_of_arrays(example):
  w = example.weight
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
def test_what_does_not_fit_is_refused_when_it_is_built(what, example_of):
  shapes = lambda name: jax.eval_shape(example_of(name).make, _wrong((INPUTS, OUTPUTS)))
  build, message = NONSENSE[what]
  with pytest.raises(ValueError, match=message):
    build(shapes)


def test_real_arrays_are_checked_too(example_of):
  with pytest.raises(ValueError, match='32 columns of codes have scales for 5'):
    dataclasses.replace(example_of('int8').weight, scales=jnp.ones((3, 5)))
