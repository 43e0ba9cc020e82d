"""Tests caching, causality, packing and the parameter paths for each trait of the families."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import kv_cache, presets, transformer
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer
from ops.linear import Weight
from ops.quantized import quantize
from ops.rope import RopeConfig

# Logits of order 1 in float32, summed in another order.
CACHED = 1e-4
SAME_SUMS = 1e-5
BFLOAT16 = 0.1  # 8 bits of mantissa over two layers, of the largest logit
VOCABULARY, LENGTH = 29, 9

LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=2, kv_heads=2, head_width=8), ffn=FeedForwardConfig(width=24)
)
BIASED = LAYER.with_mixer(qkv_bias=True, output_bias=True).with_ffn(bias=True)
CONFIG = ModelConfig(
  family='llama', vocab_size=VOCABULARY, width=16, layers=(LAYER,) * 2, max_positions=32
)


def _config(first=LAYER, second=None, **fields):
  return CONFIG.replace(layers=(first, second or first), **fields)


TRAITS = {
  'plain': CONFIG,
  'grouped': _config(LAYER.with_mixer(query_heads=4)),
  'window': _config(LAYER.with_mixer(window=3), LAYER),
  'learned positions': _config(BIASED.with_ffn(gated=False), rope=None, norm='layer', tied=True),
  'tied': _config(tied=True, embedding_scale=4.0),
  'parallel': _config(
    dataclasses.replace(LAYER, parallel=True).with_ffn(gated=False, activation='gelu'),
    norm='layer',
  ),
  'post norms': _config(
    dataclasses.replace(LAYER, post_norms=True).with_mixer(softcap=5.0, query_scale=0.3),
    logit_softcap=3.0,
    norm_offset=1.0,
  ),
  'post norms alone, two ropes': _config(
    dataclasses.replace(LAYER, pre_norms=False, post_norms=True).with_mixer(rotates=False),
    LAYER.with_mixer(rope=RopeConfig(theta=50.0)),
  ),
  'qk norm': _config(LAYER.with_mixer(qk_norm=True)),
  'biases': _config(BIASED, head_bias=True),
  'partial rotary': _config(LAYER.with_mixer(rotary_width=4), LAYER.with_mixer(rotary_width=6)),
  'widths': _config(
    LAYER.with_ffn(width=10),
    LAYER.with_ffn(width=32).with_mixer(query_heads=6, kv_heads=3, head_width=4),
  ),
}
traits = pytest.mark.parametrize('trait', TRAITS)


@functools.cache
def make(trait) -> Transformer:
  """Builds a model with all parameters random, so that zeros and ones hide no trait."""
  model = Transformer(TRAITS[trait], rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  for param in transformer.parameters(model).values():
    value = param.get_value()
    noise = rng.normal(size=value.shape) * (0.3 if value.ndim > 1 else 0.1)
    param.set_value(value + jnp.asarray(noise, value.dtype))
  return model


def _tokens(batch=2, length=LENGTH, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length)))


def _jitted(model):
  graphdef, state = nnx.split(model)
  run = jax.jit(lambda state, *a, **k: nnx.merge(graphdef, state)(*a, **k))
  return functools.partial(run, state)


@functools.cache
def program(trait):
  return _jitted(make(trait))


@functools.cache
def full(trait):
  return np.asarray(program(trait)(_tokens()))


@traits
@pytest.mark.quick(trait=('grouped', 'window', 'learned positions', 'parallel', 'widths'))
def test_prefill_and_decode_with_a_cache_equal_the_full_forward_pass(trait):
  model, tokens_BT = make(trait), _tokens()
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(state, tokens_BT, starts_B, cache):
    model = nnx.merge(graphdef, state)
    positions_BT = starts_B[:, None] + jnp.arange(tokens_BT.shape[1])[None]
    x_BTD, cache = model.hidden(tokens_BT, positions_BT=positions_BT, cache=cache)
    return model.logits(x_BTD), cache

  # Row 0 has a prompt of 4 tokens and row 1 a padded one of 2; each continues from its own length.
  cache = kv_cache.init(model.config, 2, LENGTH + 3)
  prompts = jnp.asarray([tokens_BT[0, :4], [*tokens_BT[1, :2], 7, 7]])
  logits, cache = run(state, prompts, jnp.zeros(2, jnp.int32), cache)
  np.testing.assert_allclose(logits[0], full(trait)[0, :4], atol=CACHED)
  np.testing.assert_allclose(logits[1, :2], full(trait)[1, :2], atol=CACHED)
  for step in range(LENGTH - 4):
    at_B = jnp.asarray([4 + step, 2 + step])
    now = jnp.take_along_axis(tokens_BT, at_B[:, None], axis=1)
    logits, cache = run(state, now, at_B, cache)
    expected = full(trait)[np.arange(2), np.asarray(at_B)]
    np.testing.assert_allclose(logits[:, 0], expected, atol=CACHED)
  assert run._cache_size() == 2  # a prefill and a decode step


@traits
@pytest.mark.quick(trait=('plain', 'window', 'parallel', 'widths'))
def test_no_token_reads_the_future(trait):
  graphdef, state = nnx.split(make(trait))
  tokens_BT, width = _tokens(1), CONFIG.width

  def logits(noise_TD):
    model = nnx.merge(graphdef, state)
    embed = model.embed  # patched on this instance only
    model.embed = lambda *a: embed(*a) + noise_TD[None]
    return model(tokens_BT)[0]

  weights_TV = jnp.asarray(np.random.default_rng(1).normal(size=(LENGTH, VOCABULARY)), jnp.float32)

  @jax.jit
  def influence(t):
    loss = lambda noise_TD: jnp.sum(logits(noise_TD)[t] * weights_TV[t])
    return jax.grad(loss)(jnp.zeros((LENGTH, width)))

  seen_TS = np.stack([np.abs(influence(t)).max(-1) > 0 for t in range(LENGTH)])
  windows = [layer.mixer.window or LENGTH for layer in TRAITS[trait].layers]
  reach = sum(window - 1 for window in windows)
  distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
  np.testing.assert_array_equal(seen_TS, (distance >= 0) & (distance <= reach))


def test_windows_limit_how_far_back_all_layers_see():
  config = _config(LAYER.with_mixer(window=3))
  base, changed = _tokens(1), _tokens(1).at[0, 2].add(1) % VOCABULARY
  model = Transformer(config, rngs=nnx.Rngs(0))
  run = _jitted(model)
  moved = np.abs(run(base) - run(changed)).max(-1)[0] > 0
  assert moved.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]  # two layers, two steps back each


@traits
@pytest.mark.quick(trait=('plain', 'window', 'learned positions', 'widths'))
def test_packed_documents_equal_the_same_documents_alone(trait):
  lengths = [4, 2, 3]
  positions = np.concatenate([np.arange(n) for n in lengths])[None]
  segments = np.repeat([5, 9, 1], lengths)[None]
  tokens_BT = _tokens(1)
  packed = program(trait)(
    tokens_BT, positions_BT=jnp.asarray(positions), segments_BT=jnp.asarray(segments)
  )
  # Each document alone starts a row; causality hides the tokens after it.
  starts = np.cumsum([0, *lengths])[:3]
  rows = jnp.stack([jnp.roll(tokens_BT[0], -start) for start in starts])
  alone = np.concatenate([program(trait)(rows[:2]), program(trait)(rows[1:])[1:]])
  expected = np.concatenate([alone[i, :n] for i, n in enumerate(lengths)])
  np.testing.assert_allclose(packed[0], expected, atol=SAME_SUMS)


@pytest.mark.parametrize('trait', ['plain', 'post norms', 'parallel'])
def test_the_split_and_jitted_model_equals_the_model(trait):
  np.testing.assert_allclose(make(trait)(_tokens()), full(trait), atol=SAME_SUMS)


@pytest.mark.parametrize('name', ['tiny-llama', 'tiny-deepseek-v3', 'tiny-qwen3-next'])
def test_modules_are_found_in_the_order_of_nnx(name):
  config = presets.preset(name)
  model = transformer.abstract(config.replace(layers=config.layers * 6))
  model.layers[1] = model.layers[0]  # one that is met twice is given once
  expected = [(tuple(map(str, path)), module) for path, module in nnx.iter_modules(model)]
  found = transformer.modules(model)
  assert [path for path, _ in found] == [path for path, _ in expected]
  assert all(a is b for (_, a), (_, b) in zip(found, expected))


@traits
def test_paths_cover_every_parameter(trait, shapes_by_hand):
  model = make(trait)
  params, linears = transformer.parameters(model), transformer.linears(model)
  state = nnx.split(model)[1]
  assert len(params) == len(jax.tree.leaves(state))
  assert sum(p.get_value().size for p in params.values()) == sum(
    leaf.size for leaf in jax.tree.leaves(state)
  )
  shapes = {path: param.get_value().shape for path, param in params.items()}
  assert shapes == shapes_by_hand(TRAITS[trait])
  matrices = {path for path in params if path.endswith('.weight')}
  assert {f'{path}.weight' for path in linears} == matrices
  assert all(linears[path].weight is params[f'{path}.weight'] for path in linears)
  assert transformer.matrices(model).keys() == linears.keys()


@pytest.mark.parametrize('name', [n for n in presets.names() if n.startswith('tiny')])
def test_an_abstract_model_has_shapes_alone(name, shapes_by_hand):
  config = presets.preset(name)
  model = transformer.abstract(config, jnp.bfloat16)
  params = {path: p.get_value() for path, p in transformer.parameters(model).items()}
  assert all(isinstance(p, jax.ShapeDtypeStruct) for p in params.values())
  # Scores of experts, and what decides on gates of tokens and heads, are float32 in any model.
  exact = ('router', 'shared_gate', 'choice_bias', 'decay', 'strength', 'rates')
  rest = {p.dtype for path, p in params.items() if not any(name in path for name in exact)}
  assert rest == {jnp.dtype('bfloat16')}
  assert {path: p.shape for path, p in params.items()} == shapes_by_hand(config)


@pytest.mark.parametrize('trait', ['plain', 'learned positions', 'post norms'])
def test_half_precision_activations_give_float32_logits(trait):
  graphdef, state = nnx.split(make(trait))
  model = nnx.merge(graphdef, state)
  model.dtype = jnp.dtype('bfloat16')
  x_BTD = jax.eval_shape(lambda: model.hidden(_tokens())[0])
  assert x_BTD.dtype == jnp.bfloat16
  logits = _jitted(model)(_tokens())
  assert logits.dtype == jnp.float32 and logits.shape == (2, LENGTH, VOCABULARY)
  np.testing.assert_allclose(logits, full(trait), atol=BFLOAT16 * np.abs(full(trait)).max())


def test_a_compressed_model_equals_its_dense_weights():
  int8 = jax.jit(lambda w_IO: quantize(w_IO, 'int8', group_size=8))
  small, plain = nnx.clone(make('grouped')), nnx.clone(make('grouped'))
  for path, linear in transformer.linears(small).items():
    w = int8(linear.weight.get_value())
    linear.weight.set_value(w)
    transformer.parameters(plain)[f'{path}.weight'].set_value(w.dense())
  assert all(isinstance(w, Weight) for w in transformer.matrices(small).values())
  logits = np.asarray(_jitted(small)(_tokens()))
  np.testing.assert_allclose(logits, _jitted(plain)(_tokens()), atol=SAME_SUMS)
  assert np.abs(logits - full('grouped')).max() > SAME_SUMS


def test_soft_caps_bound_the_logits():
  assert np.abs(full('post norms')).max() < 3.0
  assert np.abs(full('plain')).max() > 3.0


def test_bad_arguments_are_named():
  model = make('plain')
  cache = kv_cache.init(model.config, 2, LENGTH)
  positions_BT = jnp.broadcast_to(jnp.arange(LENGTH)[None], (2, LENGTH))
  with pytest.raises(ValueError, match='needs positions_BT'):
    model.hidden(_tokens(), cache=cache)
  with pytest.raises(ValueError, match='segments_BT cannot be cached'):
    model.hidden(_tokens(), positions_BT=positions_BT, segments_BT=positions_BT, cache=cache)
  with pytest.raises(ValueError, match='axis T'):
    model(_tokens(), positions_BT=positions_BT[:, :4])
