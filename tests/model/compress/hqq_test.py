"""Tests the technique's contract, its stored form and its ledger events."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.compress import contracts, recipe, registry
from model.compress.hqq import HqqSpec
from ops import linear, quantized, sparse
from ops.kernels.cpu import layout

RECIPES = pathlib.Path(__file__).parents[3] / 'experiments' / 'recipes'
HQQ = registry.lookup('hqq')
to_dense = jax.jit(linear.dense)
quantize = jax.jit(quantized.quantize, static_argnames=('format', 'group_size', 'symmetric'))
LOST = 'zeros that became nonzero, because zero points are not integers'


@pytest.mark.parametrize(
  'spec',
  [
    HqqSpec(),
    HqqSpec(format='int3', group_size=32, iterations=5),
    HqqSpec(format='int2', group_size=16),
    HqqSpec(format='int8', group_size=-1),
  ],
)
@pytest.mark.quick(spec=(HqqSpec(), HqqSpec(format='int3', group_size=32, iterations=5)))
def test_the_contract_holds(spec):
  contracts.check('hqq', spec)


@pytest.fixture
def w_IO(rng):
  return jnp.asarray(rng.standard_t(3, size=(128, 24)), jnp.bfloat16)


def _run(w, **options):
  return jax.jit(lambda w: HQQ(w, {}, HqqSpec(**options)))(w)


def test_bytes_are_counted_with_the_zero_points(w_IO):
  q = _run(w_IO).weight
  assert q.group_size == 64 and q.format == 'int4' and q.zeros.dtype == jnp.float16
  assert q.nbytes == 128 * 24 / 2 + 2 * 24 * (2 + 2)


def test_the_error_is_smaller_than_with_rounding_to_nearest(w_IO):
  w = np.asarray(w_IO, np.float64)
  error = lambda q: (np.abs(np.asarray(to_dense(q), np.float64) - w) ** 0.7).sum()
  for format in ('int4', 'int3', 'int2'):
    rounded = quantize(w_IO, format, group_size=64, symmetric=False)
    assert error(_run(w_IO, format=format).weight) < error(rounded)


def test_floating_zero_points_are_left_to_xla(w_IO):
  for format in ('int4', 'int3'):
    floating = _run(w_IO, format=format).weight
    assert floating.format == format and not layout.can_pack(floating)
    assert layout.pack(floating) is floating
    assert layout.can_pack(quantize(w_IO, format, group_size=64, symmetric=False))


def test_pruned_weights_that_become_nonzero_are_counted(w_IO):
  pruned_IO = jnp.where(sparse.unstructured_mask(jnp.abs(w_IO), 0.05, per_output=True), w_IO, 0)
  outcome = _run(pruned_IO)
  back = (np.asarray(pruned_IO) == 0) & (np.asarray(to_dense(outcome.weight)) != 0)
  assert int(outcome.events[LOST]) == back.sum() > 0
  assert int(_run(w_IO).events[LOST]) == 0


def test_weights_dropped_by_n_of_m_pruning_stay_zero(w_IO):
  two_of_four = lambda w: sparse.compress(w, sparse.n_of_m_mask(jnp.abs(w), 2, 4), 2, 4)
  kept = jax.jit(two_of_four)(w_IO)
  outcome = _run(kept)
  assert isinstance(outcome.weight.values, quantized.QuantizedTensor)
  assert not np.any(np.asarray(to_dense(outcome.weight))[np.asarray(to_dense(kept)) == 0])


def test_a_group_size_that_does_not_divide_is_halved_and_recorded():
  outcome = _run(jnp.ones((96, 4)) / 3)
  assert outcome.weight.group_size == 32
  assert outcome.events['group size, because 64 does not divide 96 inputs'] == 32


@pytest.mark.parametrize(
  'options, message',
  [
    ({'format': 'nf4'}, 'nf4 has no asymmetric form'),
    ({'format': 'int5'}, "'int5' is not one of"),
    ({'group_size': 0}, 'a group size is positive'),
    ({'iterations': 0}, 'at least one iteration, not 0'),
  ],
)
def test_the_spec_refuses_invalid_options(options, message):
  with pytest.raises(ValueError, match=message):
    HqqSpec(**options)


@pytest.mark.parametrize('name', ['hqq_int4', 'hqq_int3', 'int3', 'int3_asym', 'int4_clip'])
def test_its_recipes_are_valid(name):
  one = recipe.load(RECIPES / f'{name}.yaml')
  assert one.name == name and one.steps[0].technique == 'cast'
