"""GPTQ and SparseGPT as steps: how results are stored, what they refuse, what they report."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.compress import contracts, pipeline, recipe, registry
from model.compress.obs import GptqSpec, SparseGptSpec, gptq, sparsegpt
from ops import adapter_starts, linear, quantized, sparse
from ops.quantized import QuantizedTensor
from ops.solvers import obs
from ops.sparse import SparseTensor

INPUTS, OUTPUTS = 64, 6
RNG = np.random.default_rng(0)
X_TI = RNG.standard_normal((300, INPUTS)) @ RNG.standard_normal((INPUTS, INPUTS))
COVARIANCE_II = jnp.asarray(X_TI.T @ X_TI / 300, jnp.float32)
MEASURED = {'input_covariance': COVARIANCE_II}
W_IO = jnp.asarray(RNG.standard_normal((INPUTS, OUTPUTS)), jnp.float32)

dense = jax.jit(linear.dense)
solve = jax.jit(obs.solve, static_argnames=('grid', 'pruning', 'act_order', 'damping'))
SPECS = {
  'gptq': [
    GptqSpec(format='int3', symmetric=False, clip='mse', group_size=16, act_order=False),
    GptqSpec(format='int2', group_size=32),
    GptqSpec(format='int8', double=True, group_size=16),
    GptqSpec(format='nf4', double=True),
    GptqSpec(format='fp8_e4m3', act_order=False),
    GptqSpec(format='mxfp4', act_order=False),
    GptqSpec(format='mxfp8'),
    GptqSpec(format='nvfp4'),
  ],
  'sparsegpt': [
    SparseGptSpec(n=2, m=4),
    SparseGptSpec(n=4, m=8, format='int3', group_size=16, clip='mse'),
    SparseGptSpec(n=2, m=4, format='int4', symmetric=False),
    SparseGptSpec(sparsity=0.7, format='nf4', group_size=16),
    SparseGptSpec(n=2, m=4, format='mxfp4'),
    SparseGptSpec(sparsity=0.5, format='nvfp4'),
    SparseGptSpec(sparsity=0.0, per_output=True),
  ],
}


QUICK = [('gptq', SPECS['gptq'][0]), ('sparsegpt', SPECS['sparsegpt'][1])]
OTHERS = [(name, spec) for name in SPECS for spec in SPECS[name] if (name, spec) not in QUICK]


@pytest.mark.parametrize(
  'name, spec', [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)]
)
def test_the_contract_with_options(name, spec):
  contracts.check(name, spec)


def _technique(function, spec):
  """(w, statistics) -> outcome by the registry's row, which also factors the covariance."""
  return functools.partial(registry.lookup(function.__name__), spec=spec)


def _run(function, w, spec, measured=MEASURED):
  outcome = jax.jit(_technique(function, spec))(w, measured)
  events = {event: int(count) for event, count in outcome.events.items() if int(count)}
  return outcome.weight, events


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  'spec',
  [GptqSpec(group_size=16, act_order=False), GptqSpec(format='int8', symmetric=False)],
  ids=str,
)
def test_what_is_stored_is_what_was_solved(spec, dtype):
  w_IO = W_IO.astype(dtype)
  weight, events = _run(gptq, w_IO, spec)
  group = quantized.resolve_group(spec.format, INPUTS, spec.group_size)
  grid = obs.Grid(format=spec.format, group=group, symmetric=spec.symmetric)
  expected_IO = solve(w_IO, COVARIANCE_II, grid=grid, act_order=spec.act_order).w_IO
  assert isinstance(weight, QuantizedTensor) and weight.dtype == w_IO.dtype and events == {}
  np.testing.assert_array_equal(dense(weight), expected_IO.astype(dtype))


def test_a_sparse_matrix_keeps_its_zeros_and_stores_fewer_codes():
  compress = lambda w: sparse.compress(w, sparse.n_of_m_mask(jnp.abs(w), 2, 4), 2, 4)
  pruned = jax.jit(compress)(W_IO)
  for act_order in (False, True):
    spec = GptqSpec(format='int4', group_size=16, act_order=act_order)
    weight, _ = _run(gptq, pruned, spec)
    grid = obs.Grid(format='int4', group=32)  # 16 values that are stored
    expected_IO = solve(dense(pruned), COVARIANCE_II, grid=grid, act_order=act_order).w_IO
    assert isinstance(weight, SparseTensor) and isinstance(weight.values, QuantizedTensor)
    assert weight.values.group_size == 16 and weight.values.shape == (INPUTS // 2, OUTPUTS)
    np.testing.assert_array_equal(dense(weight), expected_IO)
    assert (np.asarray(dense(weight))[np.asarray(dense(pruned)) == 0] == 0).all()


def test_each_kind_of_pruning_is_stored_in_its_own_way():
  plain, _ = _run(sparsegpt, W_IO, SparseGptSpec())
  expected = solve(W_IO, COVARIANCE_II, pruning=obs.Pruning(sparsity=0.5))
  np.testing.assert_array_equal(plain, expected.w_IO)
  n_of_m, _ = _run(sparsegpt, W_IO.astype(jnp.bfloat16), SparseGptSpec(n=2, m=4))
  pruning = obs.Pruning(n=2, m=4)
  expected = solve(W_IO.astype(jnp.bfloat16), COVARIANCE_II, pruning=pruning)
  assert isinstance(n_of_m, SparseTensor) and n_of_m.dtype == jnp.bfloat16
  np.testing.assert_array_equal(n_of_m.dense().astype(jnp.float32), expected.w_IO)
  joint, _ = _run(sparsegpt, W_IO, SparseGptSpec(n=2, m=4, format='int4', group_size=16))
  grid = obs.Grid(format='int4', group=32)
  expected = solve(W_IO, COVARIANCE_II, pruning=pruning, grid=grid)
  assert isinstance(joint.values, QuantizedTensor) and joint.values.group_size == 16
  np.testing.assert_array_equal(dense(joint), expected.w_IO)
  codes, _ = _run(sparsegpt, W_IO, SparseGptSpec(sparsity=0.6, format='int8'))
  assert isinstance(codes, QuantizedTensor)
  assert (np.asarray(codes.dense()) == 0).sum() >= round(0.6 * W_IO.size)


NO_TOKEN = 'for no calibration token reached it'


def test_what_fell_short_is_an_event():
  nothing = {'input_covariance': jnp.zeros((INPUTS, INPUTS))}
  spec = GptqSpec(format='int4', group_size=16)
  weight, events = _run(gptq, W_IO, spec, nothing)
  assert events == {f'rounded to nearest, {NO_TOKEN}': 1}
  nearest = quantized.quantize(W_IO, 'int4', group_size=16).dense()
  np.testing.assert_array_equal(dense(weight), nearest)
  _, events = _run(sparsegpt, W_IO, SparseGptSpec(), nothing)
  assert events == {f'pruned by magnitude, {NO_TOKEN}': 1}
  _, events = _run(sparsegpt, W_IO, SparseGptSpec(n=2, m=4, format='int8'), nothing)
  assert events == {f'pruned by magnitude and rounded to nearest, {NO_TOKEN}': 1}
  sample = {'input_covariance': jnp.asarray(X_TI[:1].T @ X_TI[:1], jnp.float32)}
  _, events = _run(gptq, W_IO, spec, sample)
  assert events == {'Hessian of deficient rank, held up by its damping': 1}
  bad = {'input_covariance': jnp.full((INPUTS, INPUTS), -1e6) + 1e6 * jnp.eye(INPUTS) * 1.00001}
  _, events = _run(gptq, W_IO, spec, bad)
  assert events == {
    'damping raised tenfold': 6,
    'rounded to nearest, for its Hessian is singular': 1,
  }


def test_another_group_than_the_usual_is_an_event():
  _, events = _run(gptq, W_IO, GptqSpec(format='int4'))
  assert events == {'group size, because 128 does not divide 64 inputs': 64}
  _, events = _run(sparsegpt, W_IO, SparseGptSpec(n=2, m=4, format='int4'))
  assert events == {'group size, because 128 does not divide 32 inputs': 32}


def _shapes(make):
  return jax.eval_shape(make, W_IO)


int8 = lambda w_IO: quantized.quantize(w_IO, 'int8')
two_of_four = lambda w_IO: sparse.compress(w_IO, w_IO > -9, 2, 4)


@pytest.mark.parametrize(
  'message, function, w, spec',
  [
    ('not a QuantizedTensor', gptq, _shapes(int8), GptqSpec()),
    (
      'not a LoraTensor',
      gptq,
      _shapes(lambda w: adapter_starts.zero(w, 2, scale=1.0, key=jax.random.key(0))),
      GptqSpec(),
    ),
    (
      'not a SparseTensor of QuantizedTensor',
      gptq,
      _shapes(lambda w: two_of_four(w).map_values(int8)),
      GptqSpec(),
    ),
    (
      'prunes plain matrices, not a SparseTensor',
      sparsegpt,
      _shapes(two_of_four),
      SparseGptSpec(),
    ),
    ('does not divide 64', gptq, W_IO, GptqSpec(group_size=24)),
    ('groups of 3 for 1:3', sparsegpt, W_IO, SparseGptSpec(n=1, m=3)),
    (
      'no whole number of groups of 4 of 8',
      sparsegpt,
      W_IO,
      SparseGptSpec(n=4, m=8, format='int4', group_size=2),
    ),
  ],
)
def test_what_does_not_fit_is_refused(message, function, w, spec):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(_technique(function, spec), w, MEASURED)


@pytest.mark.parametrize(
  'message, spec, options',
  [
    ('damping is positive', GptqSpec, {'damping': 0.0}),
    ('a group size is positive', GptqSpec, {'group_size': 0}),
    ('asymmetric', GptqSpec, {'format': 'nf4', 'symmetric': False}),
    ('is not one of', GptqSpec, {'format': 'int5'}),
    ('needs both n and m', SparseGptSpec, {'n': 2}),
    ('takes either a sparsity', SparseGptSpec, {'n': 2, 'm': 4, 'sparsity': 0.5}),
    ('at least 0 and below 1', SparseGptSpec, {'sparsity': 1.0}),
    ('only with a format', SparseGptSpec, {'group_size': 64}),
    ('asymmetric', SparseGptSpec, {'format': 'fp8_e4m3', 'symmetric': False}),
    ('blocks of 32 inputs, not of 128', GptqSpec, {'format': 'mxfp4', 'group_size': 128}),
    ('leave double quantization out', GptqSpec, {'format': 'nvfp4', 'double': True}),
    ("leave the clip 'mse' out", SparseGptSpec, {'format': 'mxfp8', 'clip': 'mse'}),
  ],
)
def test_options_that_make_no_sense(message, spec, options):
  with pytest.raises(ValueError, match=message):
    spec(**options)


@pytest.mark.parametrize(
  'step',
  [
    {'gptq': {'format': 'int4', 'group_size': 16}},
    {'sparsegpt': {'n': 2, 'm': 4, 'format': 'int4', 'group_size': 8}},
  ],
  ids=str,
)
def test_a_model_has_smaller_output_errors_than_without_calibration(
  step, tiny, tokens_BT, logits_of
):
  (name, options), *_ = step.items()
  other = [{'round_to_nearest': {'format': 'int4', 'group_size': options['group_size']}}]
  if name == 'sparsegpt':
    other = [{'wanda': {'n': 2, 'm': 4}}, *other]
  ours, ledger = _compressed(tiny(layers=1), [step], tokens_BT)
  theirs, _ = _compressed(tiny(layers=1), other, tokens_BT)
  expected = logits_of(tiny(layers=1), tokens_BT)
  moved = [np.abs(logits_of(model, tokens_BT) - expected).mean() for model in (ours, theirs)]
  assert moved[0] < moved[1]
  told = {(row.layer, row.event) for row in ledger.events}  # of 80 inputs, by 60 tokens
  assert ('layers.0.ffn.down', 'Hessian of deficient rank, held up by its damping') in told


def _compressed(model, steps, tokens_BT):
  data = [step | {'only': ['*.ffn.*']} for step in steps]
  return pipeline.compress(model, recipe.parse({'name': 'x', 'steps': data}), tokens_BT)
