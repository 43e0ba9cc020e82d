"""Tests SmoothQuant against numpy: scales, stored integers, the search and the gain."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import hf
from model.compress import contracts, folding, pipeline, recipe, smoothquant
from model.compress.smoothquant import ActivationSpec, SmoothQuantSpec, Stored
from model.transformer import Transformer, matrices
from ops.activations import ActivationQuantized
from ops.linear import dense

STATISTICS = ('input_absmax',)
FLOAT32 = 1e-5  # powers and products of a few float32 numbers
PLAIN = [{'round_to_nearest': {'format': 'int8'}}, {'quantize_activations': {}}]


def _parse(*steps):
  return recipe.parse({'name': 'x', 'steps': list(steps)})


def _with_outliers(model, size=100.0, every=16):
  """Makes a few channels of both norms of each block large, and the weights that read them low."""
  for block in model.layers:
    for norm in (block.attention_norm, block.ffn_norm):
      norm.scale.set_value(norm.scale.get_value().at[::every].multiply(size))
    for linear in (block.attention.query, block.attention.key, block.attention.value):
      linear.weight.set_value(linear.weight.get_value().at[::every].divide(size))
    for linear in (block.ffn.gate, block.ffn.up):
      linear.weight.set_value(linear.weight.get_value().at[::every].divide(size))
  return model


def _logits(model, tokens_BT):
  return np.asarray(_run(*nnx.split(model), tokens_BT))


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


@dataclasses.dataclass(frozen=True)
class _Given:
  """A candidate that returns the values that it is given."""

  def __call__(self, parameters, arrays, k):
    return arrays


def _numpy_scales(absmax_I, weights, alpha):
  w_I = np.max([np.abs(w).max(1) for w in weights], 0)
  live = (absmax_I > 0) & (w_I > 0)
  x_I, w_I = np.where(live, absmax_I, 1), np.where(live, w_I, 1)
  return np.where(live, np.maximum(x_I**alpha / w_I ** (1 - alpha), 1e-5), 1)


@pytest.mark.parametrize('alpha', [0.0, 0.5, 0.85, 1.0])
def test_scales_match_the_formula(rng, alpha):
  absmax_I = 10 ** rng.uniform(-3, 3, 32)
  weights = [10 ** rng.uniform(-3, 1, (32, 1)) * rng.standard_normal((32, 6)) for _ in range(2)]
  absmax_I[5], weights[0][7], weights[1][7] = 0, 0, 0
  group = folding.Group(producer='n', consumers=('a', 'b'))
  arrays = [jnp.asarray(w, jnp.float32) for w in weights]
  find = lambda **spec: smoothquant._candidates(
    jnp.asarray(absmax_I, jnp.float32), arrays, group, SmoothQuantSpec(**spec)
  )
  expected = _numpy_scales(absmax_I, weights, alpha)
  assert expected[5] == expected[7] == 1
  np.testing.assert_allclose(find(alpha=alpha), expected[None], rtol=FLOAT32)
  grid = find(alpha=None)
  assert len(grid) == 22 and (grid[0] == 1).all()
  np.testing.assert_allclose(grid[1 + round(alpha * 20)], expected, rtol=FLOAT32)


@pytest.mark.parametrize('activations', ['dynamic', 'static'])
@pytest.mark.quick(activations=('static',))
def test_stored_weights_are_smoothed_and_rounded(tiny, tokens_BT, site_of, activations):
  site = site_of(_with_outliers(tiny()), tokens_BT, STATISTICS)
  changes = smoothquant.smoothquant(site, SmoothQuantSpec(activations=activations)).parameters
  values = {path: np.asarray(v, np.float64) for path, v in site.parameters.items()}
  stages = (
    ('attention_norm', ('attention.query', 'attention.key', 'attention.value')),
    ('ffn_norm', ('ffn.gate', 'ffn.up')),
  )
  absmax = {k: np.asarray(s['input_absmax'], np.float64) for k, s in site.statistics.items()}
  for norm, layers in stages:
    s = _numpy_scales(absmax[layers[0]], [values[f'{layer}.weight'] for layer in layers], 0.5)
    expected = values[f'{norm}.scale'] / s
    np.testing.assert_allclose(changes[f'{norm}.scale'], expected, rtol=FLOAT32)
    for layer in layers:
      values[f'{layer}.weight'] = values[f'{layer}.weight'] * s[:, None]
      absmax[layer] = absmax[layer] / s
  for layer in site.targets:
    stored = changes[f'{layer}.weight']
    w = values[f'{layer}.weight']
    assert (stored.bits, stored.values.format, stored.values.group_size) == (8, 'int8', len(w))
    half_step = np.abs(w).max(0) / 127.5 / 2
    assert (np.abs(np.asarray(dense(stored), np.float64) - w) <= 1.01 * half_step).all()
    if activations == 'static':
      np.testing.assert_allclose(stored.scale, absmax[layer].max() / 127, rtol=FLOAT32)
    else:
      assert stored.scale is None


def test_the_search_picks_the_smallest_error_of_the_block(tiny, tokens_BT, site_of):
  model = _with_outliers(tiny())
  site = site_of(model, tokens_BT, STATISTICS)
  site = dataclasses.replace(site, targets=('ffn.gate', 'ffn.up'))
  errors = {}
  for alpha in (None, 0.0, 0.5, 1.0):
    spec = SmoothQuantSpec(alpha=alpha, weight_bits=4)
    errors[alpha] = site.errors(_Given(), smoothquant.smoothquant(site, spec).parameters, 1)[0]
  unsmoothed = {
    f'{layer}.weight': Stored(4, 8, False)(site.parameters[f'{layer}.weight'], jnp.ones(48))
    for layer in site.targets
  }
  errors['none'] = site.errors(_Given(), unsmoothed, 1)[0]
  best = errors.pop(None)
  assert 0 < best <= min(errors.values()) * 1.001
  assert best < 0.5 * max(errors.values())


@pytest.mark.parametrize('static', [False, True])
@pytest.mark.quick(static=(True,))
@pytest.mark.slow
def test_smoothing_helps_a_model_with_outliers(tiny, tokens_BT, static):
  model = _with_outliers(tiny())
  expected = _logits(model, tokens_BT)
  plain = [PLAIN[0], {'quantize_activations_static' if static else 'quantize_activations': {}}]
  smooth = {'smoothquant': {'activations': 'static' if static else 'dynamic'}}
  error = {}
  for name, steps in (('plain', plain), ('smooth', [smooth])):
    compressed, _ = pipeline.compress(model, _parse(*steps), tokens_BT)
    error[name] = np.square(_logits(compressed, tokens_BT) - expected).mean()
  # Steps that are 5 to 100 times as wide make squares that are far more than 10 times as large.
  assert error['smooth'] < 0.1 * error['plain']


@pytest.mark.parametrize('fold', ['norms', 'all'])
@pytest.mark.quick(fold=('all',))
def test_without_quantization_the_outputs_do_not_change(tiny, tokens_BT, fold):
  model = _with_outliers(tiny(layers=1))
  step = {'smoothquant': {'quantize': False, 'fold': fold}}
  smoothed, _ = pipeline.compress(model, _parse(step), tokens_BT)
  expected = _logits(model, tokens_BT)
  actual = _logits(smoothed, tokens_BT)
  np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
  before, after = matrices(model), matrices(smoothed)
  same = {path.split('.')[-1] for path in after if np.array_equal(before[path], after[path])}
  assert same == ({'head'} if fold == 'all' else {'head', 'output', 'down'})


@pytest.mark.parametrize(
  'steps',
  [
    [{'smoothquant': {'activations': 'static', 'weight_bits': 4}}],
    [*PLAIN],
    [{'round_to_nearest': {'format': 'int4'}}, {'quantize_activations_static': {'bits': 4}}],
  ],
)
@pytest.mark.quick(steps=([{'smoothquant': {'activations': 'static', 'weight_bits': 4}}],))
def test_a_model_is_the_same_when_saved_and_loaded(tiny, tokens_BT, tmp_path, steps):
  one = _parse(*steps)
  compressed, ledger = pipeline.compress(tiny(layers=1), one, tokens_BT)
  stored = {row.stored for row in ledger.layers if row.layer.startswith('layers.')}
  assert len(stored) in (1, 2, 3)
  assert all(
    one.startswith('ActivationQuantized') and 'of QuantizedTensor' in one for one in stored
  )
  hf.save_pretrained(compressed, None, tmp_path / 'm', recipe=one.to_dict())
  loaded, _ = hf.load_pretrained(tmp_path / 'm')
  assert isinstance(loaded.layers[0].ffn.up.weight.get_value(), ActivationQuantized)
  np.testing.assert_array_equal(_logits(loaded, tokens_BT), _logits(compressed, tokens_BT))


@pytest.mark.parametrize('name', ['quantize_activations', 'quantize_activations_static'])
@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.quick(bits=(4,))
def test_the_contract_holds(name, bits):
  contracts.check(name, ActivationSpec(bits=bits))


def test_layers_that_cannot_be_scaled_are_in_the_ledger(tiny, tokens_BT):
  model = tiny(layers=1)
  only = ['*.query', '*.key', '*.ffn.*']
  steps = [
    {'round_to_nearest': {}, 'only': ['*.value']},
    {'smoothquant': {}, 'only': only},
  ]
  compressed, ledger = pipeline.compress(model, _parse(*steps), tokens_BT)
  found = {(event.layer, event.event) for event in ledger.events}
  why = 'not scaled, because attention.value.weight is a QuantizedTensor'
  assert found >= {('layers.0.attention.query', why), ('layers.0.attention.key', why)}
  assert isinstance(compressed.layers[0].attention.key.weight.get_value(), ActivationQuantized)


def test_without_norms_before_the_layers_only_the_other_groups_are_smoothed(tiny, tokens_BT):
  config = tiny(layers=1).config
  layer = dataclasses.replace(config.layers[0], pre_norms=False, post_norms=True)
  model = Transformer(config.replace(layers=(layer,)), rngs=nnx.Rngs(0))
  with pytest.raises(
    ValueError, match=r'smoothquant: fold: norms folds .* and this model has none'
  ):
    pipeline.check(model, _parse({'smoothquant': {}}), tokens_BT)
  _, ledger = pipeline.compress(model, _parse({'smoothquant': {'fold': 'all'}}), tokens_BT)
  why = 'not scaled, because no norm comes before it'
  found = {event.layer.removeprefix('layers.0.') for event in ledger.events if event.event == why}
  assert found == {f'attention.{x}' for x in ('query', 'key', 'value')} | {'ffn.gate', 'ffn.up'}


@pytest.mark.parametrize(
  'step, message',
  [
    ({'smoothquant': {'alpha': 1.5}}, 'between 0 and 1'),
    ({'smoothquant': {'alpha': 'best'}}, 'alpha is'),
    ({'smoothquant': {'grid': 0}}, 'at least one step'),
    ({'smoothquant': {'rows': 0}}, 'at least one row'),
    ({'smoothquant': {'weight_bits': 3}}, 'weight_bits is 8 or 4'),
    ({'smoothquant': {'activations': 'fixed'}}, 'activations is dynamic or static'),
    ({'smoothquant': {'fold': 'none'}}, 'fold is norms or all'),
    ({'quantize_activations': {'bits': 16}}, 'bits is 8 or 4'),
  ],
)
def test_invalid_options_are_refused(step, message):
  with pytest.raises(ValueError, match=message):
    _parse(step)


def test_the_dataclasses_refuse_invalid_values():
  for options in (
    {'fold': 'none'},
    {'activations': 'fixed'},
    {'weight_bits': 3},
    {'activation_bits': 16},
  ):
    with pytest.raises(ValueError):
      SmoothQuantSpec(**options)
  with pytest.raises(ValueError, match='8 or 4 bits, not 5'):
    ActivationSpec(bits=5)


def test_matrices_that_cannot_be_scaled_are_refused_before_any_work(tiny, tokens_BT):
  twice = _parse(*PLAIN, {'smoothquant': {}})
  with pytest.raises(ValueError, match='scales plain matrices, not a ActivationQuantized'):
    pipeline.check(tiny(), twice, tokens_BT)
  with pytest.raises(ValueError, match='quantized already, to 8 bits'):
    pipeline.check(tiny(), _parse(*PLAIN, PLAIN[1]), tokens_BT)
  with pytest.raises(ValueError, match='needs calibration text'):
    pipeline.check(tiny(), _parse({'quantize_activations_static': {}}))
