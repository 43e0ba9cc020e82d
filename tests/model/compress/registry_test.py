"""Tests that every row of the registry is complete and that invalid ones are refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.compress import registry, statistics, techniques
from model.compress.hqq import HqqSpec
from model.compress.registry import Outcome, PruneSpec, Technique
from ops import quantized, sparse
from ops.linear import dense

ROWS = list(registry.TECHNIQUES.values())
to_dense = jax.jit(dense)
quantize = jax.jit(quantized.quantize, static_argnames=('format', 'group_size', 'symmetric'))
magnitude = jax.jit(
  lambda w, spec: registry.lookup('magnitude')(w, {}, spec).weight, static_argnames='spec'
)


@pytest.mark.parametrize('row', ROWS, ids=lambda row: row.name)
def test_a_row_has_all_that_recipes_and_reports_need(row: Technique):
  assert re.fullmatch(r'[a-z][a-z0-9_]*', row.name)
  assert re.search(r'\b(19|20)\d\d, https://\S+\.\S+$', row.paper)
  assert row.summary.endswith('.')
  assert 10 < len(row.summary) < 100
  assert dataclasses.is_dataclass(row.spec)
  assert row.spec() == row.spec()
  assert hash(row.spec()) == hash(row.spec())  # a static argument of jit
  assert set(row.statistics) <= set(statistics.STATISTICS)
  with pytest.raises(dataclasses.FrozenInstanceError):
    row.spec().another = None


def test_a_name_can_be_registered_once():
  with pytest.raises(ValueError, match="'magnitude' is registered already"):
    registry.pruning_score('magnitude', paper='')(lambda w_IO, statistics: w_IO)


@pytest.mark.parametrize(
  'name, message',
  [
    ('wandaa', 'did you mean wanda?'),
    ('round', 'there are .*cast, .*magnitude|did you mean'),
    ('zzzzzzzz', 'there are .*cast, .*magnitude, .*round_to_nearest, .*wanda'),
    ('', 'there are'),
  ],
)
def test_an_unknown_name_lists_the_nearest(name, message):
  with pytest.raises(ValueError, match=message):
    registry.lookup(name)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'n': 2}, 'needs both n and m'),
    ({'m': 4}, 'needs both n and m'),
    ({'n': 4, 'm': 4}, '0 < N < M <= 16, not 4:4'),
    ({'n': 0, 'm': 4}, 'not 0:4'),
    ({'n': 2, 'm': 32}, 'not 2:32'),
    ({'sparsity': 0.5, 'n': 2, 'm': 4}, 'either a sparsity'),
    ({'sparsity': 1.0}, 'below 1, not 1.0'),
    ({'sparsity': -0.1}, 'not -0.1'),
    ({'sparsity': float('nan')}, 'not nan'),
  ],
)
def test_prune_spec_refuses_invalid_options(options, message):
  with pytest.raises(ValueError, match=message):
    PruneSpec(**options)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'format': 'int5'}, "'int5' is not one of int8, int4, int3, int2, nf4, fp8_e4m3"),
    ({'format': 'nf4', 'symmetric': False}, 'nf4 has no asymmetric form'),
    ({'format': 'mxfp4', 'group_size': 16}, 'mxfp4 has blocks of 32 inputs, not of 16'),
    ({'format': 'nvfp4', 'clip': 'mse'}, "leave the clip 'mse' out"),
    ({'format': 'mxfp8', 'double': True}, 'leave double quantization out'),
    ({'clip': 'max'}, "clip 'max' is not one of none, mse"),
    ({'group_size': 0}, 'a group size is positive, or -1'),
    ({'group_size': -2}, 'a group size is positive, or -1'),
  ],
)
def test_quantize_spec_refuses_invalid_options(options, message):
  with pytest.raises(ValueError, match=message):
    techniques.QuantizeSpec(**options)


def test_cast_spec_refuses_invalid_options():
  with pytest.raises(ValueError, match="not 'int8'"):
    techniques.CastSpec(dtype='int8')


def test_a_technique_gets_only_its_own_statistics():
  row = Technique(
    name='probe',
    function=lambda w, statistics, spec: Outcome(w, dict.fromkeys(statistics, 1)),
    spec=PruneSpec,
    statistics=('input_norm',),
    paper='',
  )
  outcome = row(jnp.ones((2, 2)), {'input_norm': 1, 'input_absmax': 2}, PruneSpec())
  assert outcome.events == {'input_norm': 1}


def test_the_default_drops_half_of_each_output(rng):
  w_IO = jnp.asarray(rng.standard_normal((10, 7)), jnp.float32)
  pruned_IO = magnitude(w_IO, PruneSpec())
  assert ((pruned_IO == 0).sum(0) == 5).all()
  pool_IO = magnitude(w_IO, PruneSpec(per_output=False))
  assert int((pool_IO == 0).sum()) == 35
  assert not ((pool_IO == 0).sum(0) == 5).all()


@pytest.mark.parametrize('options', [{}, {'symmetric': False}, {'group_size': 16}])
@pytest.mark.parametrize('format', ['int8', 'int4', 'int3'])
@pytest.mark.quick(format=('int3',), options=({}, {'symmetric': False}))
def test_a_quantized_weight_is_pruned_on_its_grid(rng, format, options):
  w_IO = jnp.asarray(rng.standard_normal((64, 12)), jnp.float32)
  w = quantize(w_IO, format, **options)
  before = np.asarray(to_dense(w))
  half = magnitude(w, PruneSpec())
  expected = np.asarray(magnitude(to_dense(w), PruneSpec()))
  assert isinstance(half, quantized.QuantizedTensor) and half.nbytes == w.nbytes
  np.testing.assert_array_equal(to_dense(half), expected)
  stored = magnitude(w, PruneSpec(n=2, m=4))
  assert isinstance(stored.values, quantized.QuantizedTensor) and stored.shape == w.shape
  kept = np.asarray(to_dense(stored))
  assert ((kept != 0).reshape(16, 4, 12).sum(1) <= 2).all() and (kept != 0).mean() > 0.3
  np.testing.assert_array_equal(kept[kept != 0], before[kept != 0])


@pytest.mark.parametrize('n, m, group', [(4, 8, 12), (1, 3, 128), (2, 4, 6)])
def test_groups_that_cut_through_n_of_m_are_refused(n, m, group):
  w = jax.eval_shape(lambda w: quantized.quantize(w, 'int4', group_size=group), _shape(384))
  with pytest.raises(ValueError, match=f'shared by {group} inputs.*{n}:{m}.*multiple of {m}'):
    jax.eval_shape(lambda w: registry.lookup('magnitude')(w, {}, PruneSpec(n=n, m=m)), w)


@pytest.mark.parametrize('n, m, group', [(4, 8, 24), (1, 3, 96), (1, 3, -1), (4, 8, 16)])
@pytest.mark.quick(m=(8,))
def test_kept_weights_do_not_move_where_groups_fit(rng, n, m, group):
  w_IO = jnp.asarray(rng.standard_t(3, (192, 12)) * rng.uniform(0.1, 9, (192, 1)), jnp.float32)
  w = quantize(w_IO, 'int4', group_size=group)
  before, pruned = (np.asarray(to_dense(a)) for a in (w, magnitude(w, PruneSpec(n=n, m=m))))
  assert ((pruned != 0).reshape(-1, m, 12).sum(1) <= n).all() and (pruned != 0).any()
  np.testing.assert_array_equal(pruned[pruned != 0], before[pruned != 0])


def _shape(inputs):
  return jax.ShapeDtypeStruct((inputs, 12), jnp.float32)


def test_zero_points_that_are_no_integers_have_no_zero(rng):
  w_IO = jnp.asarray(rng.standard_normal((64, 12)), jnp.float32)
  w = jax.jit(lambda w_IO: registry.lookup('hqq')(w_IO, {}, HqqSpec()).weight)(w_IO)
  with pytest.raises(ValueError, match=r'zero has no code.*prune n of m'):
    registry.lookup('magnitude')(w, {}, PruneSpec())
  stored = magnitude(w, PruneSpec(n=2, m=4))
  kept, before = (np.asarray(to_dense(a)) for a in (stored, w))
  assert ((kept != 0).reshape(16, 4, 12).sum(1) <= 2).all() and (kept != 0).mean() > 0.4
  np.testing.assert_array_equal(kept[kept != 0], before[kept != 0])


def test_cast_counts_what_overflows():
  w_IO = jnp.asarray([[1e5, 1.0], [-7e4, jnp.inf]], jnp.float32)
  outcome = registry.lookup('cast')(w_IO, {}, techniques.CastSpec(dtype='float16'))
  assert outcome.weight.dtype == jnp.float16
  assert int(outcome.events['weights past the range of the type']) == 2


def test_cast_reaches_the_values_of_a_sparse_matrix():
  w_IO = jax.random.normal(jax.random.key(0), (8, 3))
  two_of_four = lambda w: sparse.compress(w, sparse.n_of_m_mask(jnp.abs(w), 2, 4), 2, 4)
  stored = jax.jit(two_of_four)(w_IO)
  weight = registry.lookup('cast')(stored, {}, techniques.CastSpec()).weight
  assert isinstance(weight, sparse.SparseTensor)
  assert weight.values.dtype == jnp.bfloat16
