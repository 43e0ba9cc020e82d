"""Techniques on weights with experts: what they do to each of them alone, by its own statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.compress import programs, registry, statistics
from model.compress.registry import PLAN, PREPARED, TECHNIQUES
from ops import experts, quantized
from ops.linear import dense

INPUTS, OUTPUTS, EXPERTS, TOKENS = 48, 24, 3, 64
SINGLE = [name for name, row in TECHNIQUES.items() if row.scope in ('linears', 'parameters')]
OPTIONS = {
  'gptq': {'format': 'int4', 'group_size': 16},
  'magnitude': {'n': 2, 'm': 4},
  'round_to_nearest': {'format': 'int4', 'symmetric': False},
}


def _example(row, starved=False):
  """Weights [E, I, O], and what was measured for each expert; the last may see no token."""
  rng = np.random.default_rng(0)
  w_EIO = jnp.asarray(rng.standard_normal((EXPERTS, INPUTS, OUTPUTS)), jnp.float32)
  mix_EII = rng.standard_normal((EXPERTS, INPUTS, INPUTS)) / INPUTS**0.5
  x_ETI = rng.standard_normal((EXPERTS, TOKENS, INPUTS)) @ mix_EII
  x_ETI = jnp.asarray(x_ETI * (np.arange(EXPERTS) < EXPERTS - starved)[:, None, None], jnp.float32)
  measure = lambda x_TI: statistics.finish(statistics.measure([(x_TI,)], row.statistics))
  alone = [measure(x_TI) for x_TI in x_ETI]
  return w_EIO, alone, jax.tree.map(lambda *arrays: jnp.stack(arrays), *alone)


def _plan(row):
  return {PLAN: jnp.float32(0.5)} if row.plan else {}


@pytest.mark.parametrize('name', SINGLE)
@pytest.mark.quick(name=('round_to_nearest', 'wanda', 'gptq', 'sparsegpt', 'hqq'))
def test_each_expert_is_compressed_as_it_would_be_alone(name):
  row = registry.lookup(name)
  spec = row.spec(**OPTIONS.get(name, {}))
  w_EIO, alone, together = _example(row)
  outcome = programs.execute(row, spec, w_EIO, {**together, **_plan(row)})
  each = [
    programs.execute(row, spec, w_IO, {**own, **_plan(row)}) for w_IO, own in zip(w_EIO, alone)
  ]
  expected = experts.stack([one.weight for one in each])
  assert jax.tree.structure(outcome.weight) == jax.tree.structure(expected)
  assert outcome.weight.shape == w_EIO.shape
  for a, b in zip(jax.tree.leaves(outcome.weight), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  assert outcome.events.keys() == each[0].events.keys()
  for event, count in outcome.events.items():
    counts = [int(one.events[event]) for one in each]
    assert int(count) == (counts[0] if event.startswith('group size') else sum(counts)), event


def test_what_is_derived_for_each_expert_is_used():
  row, spec = registry.lookup('gptq'), registry.lookup('gptq').spec(group_size=16)
  w_EIO, _, together = _example(row)
  prepared = programs.prepare(row, spec, programs.has_experts(w_EIO), together)
  given = programs.execute(row, spec, w_EIO, {**together, PREPARED: prepared})
  own = programs.execute(row, spec, w_EIO, together)
  for a, b in zip(jax.tree.leaves(given.weight), jax.tree.leaves(own.weight), strict=True):
    np.testing.assert_array_equal(a, b)


def test_an_expert_without_tokens_is_rounded_to_nearest_and_counted():
  row, spec = registry.lookup('gptq'), registry.lookup('gptq').spec(format='int8')
  w_EIO, _, together = _example(row, starved=True)
  outcome = programs.execute(row, spec, w_EIO, together)
  assert int(outcome.events['rounded to nearest, for no calibration token reached it']) == 1
  assert int(outcome.events['inputs that no calibration token used']) == INPUTS
  nearest_IO = quantized.quantize(w_EIO[-1], 'int8').dense()
  found_EIO = np.asarray(dense(outcome.weight))
  np.testing.assert_allclose(found_EIO[-1], nearest_IO, rtol=1e-6)
  errors = [np.linalg.norm(found - w) for found, w in zip(found_EIO, w_EIO)]
  assert min(errors[:-1]) > errors[-1]  # the others follow their tokens, further from the weights
