"""Checks the contract of all techniques, and that each way to break it is detected."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from model.compress import contracts, registry, statistics, techniques
from model.compress.registry import Outcome, PruneSpec, technique
from ops import adapter_starts, quantized, sparse
from ops.linear import Weight, array

SPECS = {
  'cast': [techniques.CastSpec(dtype=dtype) for dtype in ('bfloat16', 'float16', 'float32')],
  'round_to_nearest': [
    techniques.QuantizeSpec(format='int8', symmetric=False),
    techniques.QuantizeSpec(format='int8', group_size=16),
    techniques.QuantizeSpec(format='int4', symmetric=False, group_size=32),
    techniques.QuantizeSpec(format='int4', double=True),
    techniques.QuantizeSpec(format='nf4', double=True),
    techniques.QuantizeSpec(format='fp8_e4m3', group_size=-1),
    techniques.QuantizeSpec(format='mxfp4'),
    techniques.QuantizeSpec(format='mxfp8', group_size=32),
    techniques.QuantizeSpec(format='nvfp4'),
  ],
  'magnitude': [PruneSpec(n=2, m=4), PruneSpec(sparsity=0.0), PruneSpec(sparsity=0.9)],
  'wanda': [PruneSpec(n=4, m=8), PruneSpec(sparsity=0.3, per_output=False)],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoSpec:
  """No options."""


@pytest.fixture
def broken(monkeypatch):
  """Registers a function as the technique 'broken' for the duration of a test."""
  monkeypatch.setattr(registry, 'TECHNIQUES', dict(registry.TECHNIQUES))
  return technique('broken', spec=NoSpec, paper='None 2000, https://example.org')


@pytest.mark.parametrize(
  'name', [row.name for row in registry.TECHNIQUES.values() if row.scope in contracts.SCOPES]
)
def test_every_technique_with_its_defaults(name):
  contracts.check(name)


@pytest.mark.parametrize('name, spec', [(name, spec) for name in SPECS for spec in SPECS[name]])
@pytest.mark.quick(
  spec=(
    techniques.CastSpec(dtype='float16'),
    techniques.QuantizeSpec(format='int4', symmetric=False, group_size=32),
    techniques.QuantizeSpec(format='nf4', double=True),
    techniques.QuantizeSpec(format='nvfp4'),
    PruneSpec(n=2, m=4),
    PruneSpec(sparsity=0.3, per_output=False),
  )
)
def test_techniques_with_options(name, spec):
  contracts.check(name, spec)


def test_an_unknown_technique_is_refused():
  with pytest.raises(ValueError, match="unknown technique 'wandah'; did you mean wanda"):
    contracts.check('wandah')


def test_nested_weights_keep_the_contract(broken):
  @broken
  def nested(w, statistics, spec):
    """Nests int4 codes with quantized scales in N:M sparsity, with an adapter on top."""
    pruned = sparse.compress(w, sparse.n_of_m_mask(sparse.magnitude_score(w), 2, 4), 2, 4)
    base = pruned.map_values(lambda v: quantized.quantize(v, 'int4', double=True))
    return adapter_starts.zero(base, 3, scale=2.0, key=jax.random.key(0))

  contracts.check('broken')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unregistered(Weight):
  """A weight type that is registered with JAX but not for saving."""

  values: jax.Array = array('IO')

  @property
  def shape(self):
    return self.values.shape

  @property
  def dtype(self):
    return self.values.dtype

  def dense(self):
    return self.values

  def map_values(self, fn):
    return Unregistered(fn(self.values))


class WrongProduct(Unregistered):
  """A weight whose product differs from its dense form."""

  def matmul(self, x):
    return 2 * (x @ self.values)


jax.tree_util.register_dataclass(WrongProduct, data_fields=['values'], meta_fields=[])
_CALLS = []


def _noisy(w):
  _CALLS.append(w)
  return w + len(_CALLS)


BROKEN = {
  'returns a matrix, not a NoneType': lambda w: None,
  'turns the shape': lambda w: w.T,
  'not finite': lambda w: w / 0,
  'of zeros: dense\\(\\) is not finite': lambda w: w / jnp.abs(w).max(),
  'of a constant: dense\\(\\) is not finite': lambda w: w / (w.max() - 1),
  'happened -1 times': lambda w: Outcome(w, {'odd': -1}),
  'another result when it is compiled again': _noisy,
  'saving|weight type': Unregistered,
}


@pytest.mark.parametrize('message', BROKEN)
def test_each_broken_contract_is_named(broken, message):
  _CALLS.clear()
  broken(lambda w, statistics, spec: BROKEN[message](w))
  with pytest.raises((AssertionError, ValueError), match=message):
    contracts.check('broken')


def test_decisions_that_depend_on_values_are_refused(broken):
  broken(lambda w, statistics, spec: w if float(w[0, 0]) > 0 else -w)
  with pytest.raises(jax.errors.ConcretizationTypeError):
    contracts.check('broken')


def test_a_product_that_differs_from_dense_is_named(broken, monkeypatch):
  monkeypatch.setattr(contracts, '_check_stored', lambda name, weight: None)
  broken(lambda w, statistics, spec: WrongProduct(w))
  with pytest.raises(AssertionError, match=r'matmul and dense\(\) differ'):
    contracts.check('broken')


def test_the_example_has_all_statistics(broken):
  seen = []

  @technique('probe', spec=NoSpec, paper='', statistics=tuple(statistics.STATISTICS))
  def probe(w, statistics, spec):
    seen.append({k: v.shape for k, v in statistics.items()})
    return w

  contracts.check('probe')
  assert seen[0] == {
    'rows': (),
    'input_norm': (contracts.INPUTS,),
    'input_covariance': (contracts.INPUTS, contracts.INPUTS),
    'input_absmax': (contracts.INPUTS,),
    'input_absmean': (contracts.INPUTS,),
    'input_moments': (2, contracts.INPUTS),
  }
