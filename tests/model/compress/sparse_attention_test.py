"""Sparse attention as a retrofit: which layers get it, what it computes, and what is refused."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from model import config as configs
from model import hf, kv_cache
from model.compress import pipeline, recipe
from model.compress.measurements import Measurements
from model.compress.sparse_attention import SparseAttentionSpec, check
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, parameters
from ops import patterns

EXACT = 1e-5  # of logits, which are of order 1
PATTERN = patterns.parse('window4+first2')
ROWS_BT = np.random.default_rng(1).integers(0, 40, (3, 17), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, tokens_BT):
  return nnx.merge(graphdef, state)(tokens_BT)


def _logits(model):
  return np.asarray(_run(*nnx.split(model), ROWS_BT))


def _config(*mixers, layers=5) -> ModelConfig:
  usual = AttentionConfig(query_heads=2, kv_heads=1, head_width=8)
  mixers = mixers or (usual,) * layers
  ffn = FeedForwardConfig(width=24)
  return ModelConfig(
    family='llama',
    vocab_size=40,
    width=16,
    layers=tuple(LayerConfig(mixer=mixer, ffn=ffn) for mixer in mixers),
    max_positions=64,
  )


@pytest.fixture(scope='module')
def model():
  made, rng = Transformer(_config(), rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for path, param in parameters(made).items():
    if 'norm' not in path:
      value = rng.standard_normal(param.get_value().shape) / 2
      param.set_value(jax.numpy.asarray(value, 'float32'))
  return made


def _compress(model, *steps, **options):
  one = recipe.parse({'name': 'x', 'steps': list(steps)})
  return pipeline.compress(model, one, ROWS_BT, **options)


def _with(model, chosen):
  """The model with the pattern in some layers, built by hand."""
  layers = tuple(
    layer.with_mixer(sparse=PATTERN) if l in chosen else layer
    for l, layer in enumerate(model.config.layers)
  )
  made = Transformer(model.config.replace(layers=layers), rngs=nnx.Rngs(1))
  given = parameters(model)
  for path, param in parameters(made).items():
    param.set_value(given[path].get_value())
  return made


@pytest.mark.parametrize(
  'options, chosen',
  [
    ({'full_every': 2}, (0, 2, 4)),
    ({'full_every': None}, (0, 1, 2, 3, 4)),
    ({'full_layers': [0, 1, 4]}, (2, 3)),
  ],
)
def test_chosen_layers_get_the_pattern_and_nothing_else_changes(model, options, chosen):
  sparse, ledger = _compress(model, {'sparse_attention': {'pattern': str(PATTERN), **options}})
  found = [layer.mixer.pattern for layer in sparse.config.layers]
  assert found == [PATTERN if l in chosen else None for l in range(5)]
  assert [(row['layer'], row['event'], row['detail']) for row in ledger.to_rows()] == [
    (f'layers.{l}.attention', 'keys that a query sees at most, of 64', '6') for l in chosen
  ]
  np.testing.assert_allclose(_logits(sparse), _logits(_with(model, chosen)), atol=EXACT)
  assert np.abs(_logits(sparse) - _logits(model))[:, :5].max() < EXACT  # all still in sight
  assert np.abs(_logits(sparse) - _logits(model)).max() > 0.01
  assert model.config == _config()


def test_first_tokens_can_stay_near(model):
  step = {'pattern': str(PATTERN), 'full_every': None, 'cap_first': True}
  sparse, _ = _compress(model, {'sparse_attention': step})
  assert [layer.mixer.first_reach for layer in sparse.config.layers] == [5] * 5
  difference = np.abs(_logits(sparse) - _logits(_with(model, range(5))))
  assert difference[:, :6].max() < EXACT and difference[:, 6:].max() > 0.01


@pytest.mark.slow
def test_layers_that_need_all_keys_most_can_be_measured(model):
  """Against whole models, each with one layer changed."""
  nll = lambda one: float(
    -np.take_along_axis(
      np.asarray(jax.nn.log_softmax(_logits(one)))[:2, :-1], ROWS_BT[:2, 1:, None], 2
    ).mean()
  )
  base = nll(model)
  rises = np.array([nll(_with(model, [l])) - base for l in range(5)])
  found, losses = Measurements(model, ROWS_BT).losses(_with(model, range(5)), 2)
  np.testing.assert_allclose(found, base, rtol=EXACT)
  np.testing.assert_allclose(losses - found, rises, atol=EXACT)
  step = {'pattern': str(PATTERN), 'full_every': 2, 'choose': 'loss', 'rows': 2}
  sparse, ledger = _compress(model, {'sparse_attention': step})
  full = [l for l, layer in enumerate(sparse.config.layers) if layer.mixer.pattern is None]
  assert full == sorted(np.argsort(rises)[-2:].tolist())
  noted = {row['layer']: int(row['detail']) for row in ledger.to_rows() if 'loss' in row['event']}
  highest = int(np.argmax(rises))
  assert noted[f'layers.{highest}.attention'] == round(1000 * rises[highest])


def test_a_saved_model_has_its_patterns_and_short_caches(model, tmp_path):
  step = {'pattern': str(PATTERN), 'full_every': 2}
  sparse, _ = _compress(
    model, {'sparse_attention': step}, {'round_to_nearest': {'format': 'int4', 'group_size': 8}}
  )
  hf.save_pretrained(sparse, None, tmp_path / 'saved')
  again, _ = hf.load_pretrained(tmp_path / 'saved')
  assert again.config == sparse.config
  np.testing.assert_array_equal(_logits(again), _logits(sparse))
  bytes_of = lambda one: sum(
    leaf.nbytes for leaf in jax.tree.leaves(kv_cache.init(one.config, 1, 64))
  )
  assert bytes_of(again) < 0.65 * bytes_of(model)  # 3 of 5 layers hold 14 of 64, and positions


WINDOWED = AttentionConfig(query_heads=2, kv_heads=1, head_width=8, window=8)
REFUSED = {
  'cap_first needs a window with first tokens, not window8': {
    'pattern': 'window8',
    'cap_first': True,
  },
  'at least 2, not 1': {'full_every': 1},
  'rows must be at least 1': {'rows': 0},
  'is no sparse pattern': {'pattern': 'windows8'},
  'which says how many layers stay': {'choose': 'loss', 'full_every': None},
  'layer 5; there are layers 0 to 4': {'full_layers': (1, 5)},
  'no layer of 5 changes': {'full_layers': (0, 1, 2, 3, 4)},
  'hides nothing within the 64 positions': {'pattern': 'window64'},
}


@pytest.mark.parametrize('message', REFUSED)
def test_what_cannot_be_is_refused(message):
  with pytest.raises(ValueError, match=message):
    check(_config(), SparseAttentionSpec(**{'pattern': 'window8+first2', **REFUSED[message]}))


def test_a_layer_with_a_window_stays_as_it_is_or_is_refused(model):
  config = _config(WINDOWED, *(layer.mixer for layer in model.config.layers[1:]))
  with pytest.raises(ValueError, match='layer 0 has window8 already; name such layers in full'):
    check(config, SparseAttentionSpec(pattern='window4'))
  check(config, SparseAttentionSpec(pattern='window4', full_layers=(0, 4)))


def test_short_calibration_rows_cannot_measure_long_windows(model):
  with pytest.raises(ValueError, match='hides nothing in calibration rows of 17 tokens'):
    _compress(model, {'sparse_attention': {'pattern': 'window32', 'choose': 'loss'}})


def test_configs_with_patterns_survive_json(model):
  config = _with(model, [0, 2]).config
  assert configs.from_json(configs.to_json(config)) == config
