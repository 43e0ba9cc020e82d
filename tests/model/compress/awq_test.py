"""AWQ against numpy and transformers: scales, the errors of the grid, clipping, outliers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from model import hf
from model.compress import awq, calibrate, folding, pipeline, recipe
from model.compress.awq import AwqSpec, Rounded
from model.compress.techniques import QuantizeSpec
from model.transformer import Transformer, linears, parameters
from ops.linear import dense
from ops.quantized import QuantizedTensor, quantize
from ops.sparse import SparseTensor

SPEC = AwqSpec(format='int3', group_size=16)
GRID = 20
STATISTICS = ('input_absmean', 'input_covariance')
FLOAT32 = 1e-5  # powers and products of a few float32 numbers
# Mean squares of differences of outputs of order 1, whose own rounding is 1e-6.
ERRORS = 1e-3


def _logits(model, tokens_BT):
  return np.asarray(_run(*nnx.split(model), tokens_BT))


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


def _parse(*steps):
  return recipe.parse({'name': 'x', 'steps': list(steps)})


def _with_outliers(model, size=30.0, every=12):
  """Makes a few channels of both norms of each block large, as in language models."""
  for block in model.layers:
    for norm in (block.attention_norm, block.ffn_norm):
      norm.scale.set_value(norm.scale.get_value().at[::every].multiply(size))
  return model


def _numpy_round(w_IO, bits, size):
  """Asymmetric rounding to nearest with float16 scales, independent of ops/quantized.py."""
  w_JgO = np.asarray(w_IO, np.float64).reshape(-1, size, w_IO.shape[1])
  low, high = np.minimum(w_JgO.min(1), 0), np.maximum(w_JgO.max(1), 0)
  scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
  zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
  codes = np.clip(np.round(w_JgO / scale[:, None]) + zero[:, None], 0, 2**bits - 1)
  return ((codes - zero[:, None]) * scale[:, None]).reshape(w_IO.shape)


def _numpy_scales(mean_I, alpha):
  if alpha == 0:
    return np.ones(len(mean_I))
  live = mean_I > 0
  s = np.maximum(np.where(live, mean_I, 1) ** alpha, 1e-4)
  return np.where(live, s / np.sqrt(s[live].max() * s[live].min()), 1)


def _group(site, producer):
  return next(g for g in folding.groups(site.config, site.layer) if g.producer == producer)


def test_scales_are_those_of_the_formula(rng):
  mean_I = (10 ** rng.uniform(-3, 3, 32)).astype(np.float32)
  mean_I[5] = 0
  weights = [rng.standard_normal((32, 6)).astype(np.float32) for _ in range(2)]
  group = folding.Group(producer='n', consumers=('a', 'b'))
  found_AO = awq._candidates(jnp.asarray(mean_I), [jnp.asarray(w) for w in weights], group, SPEC)
  expected = [_numpy_scales(mean_I.astype(np.float64), k / GRID) for k in range(GRID)]
  np.testing.assert_allclose(found_AO, expected, rtol=FLOAT32)

  w = np.abs(np.concatenate(weights, 1)).astype(np.float64)
  relative = np.concatenate([half / (half.max(0) + 1e-6) for half in (w[:16], w[16:])]).mean(1)
  duo = awq._candidates(
    jnp.asarray(mean_I),
    [jnp.asarray(w) for w in weights],
    group,
    dataclasses.replace(SPEC, duo=True),
  )
  live, alpha = mean_I > 0, 7 / GRID
  s = np.maximum(np.where(live, mean_I, 1) ** alpha / (relative ** (1 - alpha) + 1e-4), 1e-4)
  s = np.where(live, s / np.sqrt(s[live].max() * s[live].min()), 1)
  np.testing.assert_allclose(duo[7], s, rtol=FLOAT32)
  np.testing.assert_array_equal(duo[0], 1)


@pytest.fixture
def torch_block(tmp_path):
  """A function (model, tokens) -> a function ({their name: array}) -> output of its block 0."""

  def load(model, tokens_BT):
    hf.save_pretrained(model, None, tmp_path / 'hf')
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'hf', dtype=torch.float64)
    layer, seen = other.eval().model.layers[0], []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.numpy()))

    def run(changes):
      for name, value in changes.items():
        layer.get_parameter(name).data = torch.from_numpy(np.array(value, np.float64))
      with torch.no_grad():
        other(torch.from_numpy(np.asarray(tokens_BT, np.int64)))
      return seen.pop()

    return run

  return load


def test_errors_of_the_grid_are_those_of_transformers_and_the_best_is_taken(
  tiny, tokens_BT, site_of, torch_block
):
  model = _with_outliers(tiny())
  site = site_of(model, tokens_BT, STATISTICS)
  group, measured = _group(site, 'ffn_norm'), site.statistics['ffn.up']['input_absmean']
  scales_AO = awq._candidates(measured, [], group, SPEC)
  trial = folding.Trial(group, group.consumers, Rounded(SPEC.rounding))
  found = site.errors(trial, (scales_AO, measured), GRID)

  values = {path: np.asarray(v, np.float64) for path, v in site.parameters.items()}
  run, errors = torch_block(model, tokens_BT), []
  original = run({})
  for k in range(GRID):
    s = _numpy_scales(np.asarray(measured, np.float64), k / GRID)
    changes = {'post_attention_layernorm.weight': values['ffn_norm.scale'] / s}
    for ours, theirs in (('ffn.gate', 'mlp.gate_proj'), ('ffn.up', 'mlp.up_proj')):
      changes[f'{theirs}.weight'] = _numpy_round(values[f'{ours}.weight'] * s[:, None], 3, 16).T
    errors.append(np.square(run(changes) - original).mean())
  # A weight at the edge between two codes may fall to either side.
  np.testing.assert_allclose(found, errors, rtol=0.02)
  best = int(np.argmin(errors))
  assert best > 0 and errors[best] < 0.6 * errors[0]

  changes = awq.awq(site, dataclasses.replace(SPEC, quantize=False))
  s = _numpy_scales(np.asarray(measured, np.float64), int(np.argmin(found)) / GRID)
  stored = np.asarray(changes.parameters['ffn_norm.scale'], np.float64)
  np.testing.assert_allclose(stored, values['ffn_norm.scale'] / s, rtol=FLOAT32)


_nearest = jax.jit(lambda w_IO: quantize(w_IO, 'int3', group_size=16, symmetric=False))


@pytest.mark.parametrize('producer', ['attention_norm', 'attention.value', 'ffn_norm', 'ffn.up'])
@pytest.mark.quick(producer=('attention_norm', 'ffn.up'))
def test_it_is_never_worse_than_rounding_to_nearest(tiny, tokens_BT, site_of, producer):
  site = site_of(tiny(seed=3), tokens_BT, STATISTICS)
  group = _group(site, producer)
  site = dataclasses.replace(site, targets=group.consumers)
  changes = awq.awq(site, dataclasses.replace(SPEC, clip_search=False)).parameters
  rounded = {
    f'{name}.weight': _nearest(site.parameters[f'{name}.weight']) for name in group.consumers
  }
  ours, plain = (site.errors(_Given(), values, 1)[0] for values in (changes, rounded))
  assert 0 < ours <= plain * (1 + ERRORS)


@dataclasses.dataclass(frozen=True)
class _Given:
  """A candidate that is given the values to put in."""

  def __call__(self, parameters, arrays, k):
    return arrays


def test_outliers_are_what_it_is_for(tiny, tokens_BT, site_of):
  model = _with_outliers(tiny())
  site = site_of(model, tokens_BT, STATISTICS)
  scaled = awq.awq(site, dataclasses.replace(SPEC, clip_search=False)).parameters
  plain = {path: _nearest(w) for path, w in site.parameters.items() if path.endswith('.weight')}
  both = awq.awq(site, SPEC).parameters
  plain, scaled, both = (site.errors(_Given(), v, 1)[0] for v in (plain, scaled, both))
  assert scaled < 0.5 * plain and both < 0.5 * plain


@pytest.mark.parametrize('format, bits', [('int3', 3), ('int4', 4)])
@pytest.mark.quick(bits=(3,))
def test_clipping_takes_the_best_range_of_each_group(rng, format, bits):
  inputs, outputs, size = 32, 5, 16
  w_IO = rng.standard_t(3, (inputs, outputs)).astype(np.float32)
  x_TI = (rng.standard_normal((200, inputs)) * rng.uniform(0.1, 5, inputs)).astype(np.float32)
  covariance_II = jnp.asarray(x_TI.T @ x_TI / len(x_TI))
  spec = QuantizeSpec(format=format, group_size=size, symmetric=False)
  found_IO = np.asarray(jax.jit(awq.clip, static_argnums=2)(w_IO, covariance_II, spec))

  shrunk = 0
  for j in range(0, inputs, size):
    for o in range(outputs):
      column, errors, tried = w_IO[j : j + size, o], [], []
      for i in range(21):
        limit = np.float32(1 - i / 40) * np.abs(column).max()
        tried.append(np.clip(column, -limit, limit))
        moved = _numpy_round(tried[-1][:, None], bits, size)[:, 0] - column
        errors.append(np.square(x_TI[:, j : j + size].astype(np.float64) @ moved).mean())
      shrunk += int(np.argmin(errors) > 0)
      np.testing.assert_allclose(
        found_IO[j : j + size, o], tried[int(np.argmin(errors))], rtol=FLOAT32, atol=FLOAT32
      )
  assert shrunk > 2


@pytest.mark.slow
def test_query_and_key_are_not_clipped(tiny, tokens_BT, site_of):
  site = site_of(tiny(), tokens_BT, STATISTICS)
  clipped = awq.awq(site, SPEC).parameters
  plain = awq.awq(site, dataclasses.replace(SPEC, clip_search=False)).parameters
  same = {
    path: bool(np.array_equal(dense(clipped[path]), dense(plain[path])))
    for path in plain
    if path.endswith('.weight')
  }
  assert {path for path in same if same[path]} == {'attention.query.weight', 'attention.key.weight'}


@pytest.mark.slow
def test_inputs_that_never_occur_are_left_alone(tiny, tokens_BT):
  model = tiny(layers=1)
  norm = model.layers[0].ffn_norm
  norm.scale.set_value(norm.scale.get_value().at[3].set(0))
  compressed, ledger = pipeline.compress(
    model, _parse({'awq': {'format': 'int3', 'grid': 2}}), tokens_BT
  )
  for value in parameters(compressed).values():
    assert np.isfinite(np.asarray(dense(value.get_value()), np.float32)).all()
  before = dense(model.layers[0].ffn.up.weight.get_value())[3]
  after = dense(compressed.layers[0].ffn.up.weight.get_value())[3]
  step = np.abs(np.asarray(before)).max()  # of a group of 16 with 3 bits, at most
  assert np.abs(np.asarray(before - after)).max() < step
  assert any('no calibration token' in event.event for event in ledger.events)


@pytest.mark.slow
def test_without_quantization_the_model_stays_what_it_was(tiny, tokens_BT):
  model = _with_outliers(tiny())
  steps = [{'awq': {'quantize': False, 'grid': 4}, 'only': ['*.gate', '*.key', '*.output']}]
  scaled, _ = pipeline.compress(model, _parse(*steps), tokens_BT)
  expected = _logits(model, tokens_BT)
  np.testing.assert_allclose(
    _logits(scaled, tokens_BT), expected, atol=1e-4 * np.abs(expected).max()
  )
  ratio = scaled.layers[1].ffn_norm.scale.get_value() / model.layers[1].ffn_norm.scale.get_value()
  assert np.abs(np.log(ratio)).max() > 0.1


def test_a_recipe_stores_saves_and_compiles_once_for_all_blocks(tiny, tokens_BT, tmp_path):
  model = tiny(layers=3)
  before = calibrate._errors._cache_size()
  # An own group size, so that no other test has compiled it.
  step = {'awq': {'format': 'int4', 'group_size': 8, 'grid': 3}}
  compressed, ledger = pipeline.compress(model, _parse(step), tokens_BT)
  assert calibrate._errors._cache_size() - before == 1
  for linear in linears(compressed).values():
    weight = linear.weight.get_value()
    if isinstance(weight, QuantizedTensor):
      assert (weight.format, weight.group_size) == ('int4', 8) and weight.zeros is not None
  assert sum(row.stored.startswith('QuantizedTensor') for row in ledger.layers) == 21
  hf.save_pretrained(compressed, None, tmp_path / 'm', recipe=_parse(step).to_dict())
  loaded, _ = hf.load_pretrained(tmp_path / 'm')
  np.testing.assert_array_equal(_logits(loaded, tokens_BT), _logits(compressed, tokens_BT))


def test_what_could_not_be_scaled_is_in_the_ledger(tiny, tokens_BT):
  layer = tiny().config.layers[0].with_ffn(gated=False, activation='gelu')
  config = tiny().config.replace(norm='layer', layers=(layer,))
  model = Transformer(config, rngs=nnx.Rngs(0))
  step = {'round_to_nearest': {'format': 'int8'}, 'only': ['*.value']}
  rest = ['*.query', '*.key', '*.output', '*.up', '*.down']
  awq_step = {'awq': {'grid': 2, 'group_size': 16}, 'only': rest}
  _, ledger = pipeline.compress(model, _parse(step, awq_step), tokens_BT)
  found = {(event.layer, event.event) for event in ledger.events if 'grid' not in event.event}
  stored = 'not scaled, because attention.value.weight is a QuantizedTensor'
  assert found >= {
    ('layers.0.ffn.down', 'not scaled, because gelu does not commute with scales'),
    ('layers.0.attention.output', stored),
    ('layers.0.attention.query', stored),
  }


@pytest.mark.parametrize(
  'options, message',
  [
    ({'grid': 0}, 'at least one point'),
    ({'rows': 0}, 'at least one row'),
    ({'format': 'nf4'}, 'no asymmetric form'),
    ({'format': 'int5'}, 'int5'),
    ({'group_size': 0}, 'group size'),
    ({'alpha': 0.5}, "unknown key 'alpha'"),
    ({'duo': 1}, 'duo is bool'),
  ],
)
def test_options_that_make_no_sense_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    _parse({'awq': options})


def test_matrices_that_cannot_be_scaled_are_refused_before_any_work(tiny, tokens_BT):
  with pytest.raises(ValueError, match=r'awq on .*: .*does not divide'):
    pipeline.check(tiny(), _parse({'awq': {'group_size': 7}}), tokens_BT)
  pruned = _parse({'magnitude': {'n': 2, 'm': 4}}, {'awq': {}})
  with pytest.raises(ValueError, match=f'scales plain matrices, not a {SparseTensor.__name__}'):
    pipeline.check(tiny(), pruned, tokens_BT)
  with pytest.raises(ValueError, match='needs calibration text'):
    pipeline.check(tiny(), _parse({'awq': {}}))
