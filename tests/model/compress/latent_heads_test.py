"""Attention made into latent attention: exact if nothing is left out, and optimal if it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import kv_cache, presets
from model.compress import latent_heads, pipeline, recipe
from model.layers.mixers.latent import LatentConfig
from model.transformer import Context, Transformer, parameters
from ops.rope import RopeConfig

# The matrices are decomposed in float64 and rounded to float32; logits are of order 1.
TOLERANCE = 1e-5
LENGTH, VOCABULARY = 16, 256


def _model(name, rope=None, layers=1, **mixer) -> Transformer:
  """A model in which no parameter has its initial value."""
  config = presets.preset(name)
  own = tuple(layer.with_mixer(**mixer) for layer in config.layers[:layers])
  config = config.replace(layers=own, rope=rope or config.rope)
  model, rng = Transformer(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for param in parameters(model).values():
    value = param.get_value()
    param.set_value(jnp.asarray(value + 0.1 * rng.standard_normal(value.shape), value.dtype))
  return model


@pytest.fixture(scope='module')
def tokens_BT():
  return np.random.default_rng(1).integers(0, VOCABULARY, (8, LENGTH), np.int32)


def _converted(model, tokens_BT, **options):
  steps = [{'latent_heads': options}]
  return pipeline.compress(model, recipe.parse({'name': 'x', 'steps': steps}), tokens_BT)


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


def _logits(model, tokens_BT):
  return np.asarray(_run(*nnx.split(model), tokens_BT))


CASES = {
  'grouped': ('tiny-llama', {}),
  'biased': ('tiny-llama', {'qkv_bias': True, 'query_scale': 0.3}),
  'partly rotated': ('tiny-neox', {}),
  'never rotated': ('tiny-gpt2', {}),
  'a layer at rest': ('tiny-smollm3', {'rotates': False}),
}


@pytest.mark.parametrize(
  ('case', 'importance'),
  [*((case, 'outputs') for case in CASES), ('partly rotated', 'weights')],
)
@pytest.mark.quick(case=('biased', 'partly rotated', 'a layer at rest'), importance=('outputs',))
def test_with_all_pairs_at_full_rank_nothing_changes(tokens_BT, case, importance):
  name, traits = CASES[case]
  model = _model(name, **traits)
  found, _ = _converted(model, tokens_BT, importance=importance)
  mixer = found.config.layers[0].mixer
  assert isinstance(mixer, LatentConfig) and mixer.pairs is None
  expected = _logits(model, tokens_BT)
  assert np.abs(expected).max() > 0.5
  np.testing.assert_allclose(_logits(found, tokens_BT), expected, atol=TOLERANCE, rtol=TOLERANCE)


YARN = RopeConfig(theta=100.0, kind='yarn', factor=4.0, original_max_positions=32)


@pytest.mark.parametrize(
  ('choice', 'pairs'),
  [
    ('uniform', [0, 2, 5]),
    pytest.param('high', [0, 1, 2], marks=pytest.mark.slow),
    pytest.param('low', [5, 6, 7], marks=pytest.mark.slow),
  ],
)
def test_pairs_that_are_left_out_do_not_rotate_and_the_others_do(tokens_BT, choice, pairs):
  """The original attention, with the angles of those pairs set to zero."""
  model = _model('tiny-llama', rope=YARN)
  found, _ = _converted(model, tokens_BT, choice=choice, pairs=3)
  mixer = found.config.layers[0].mixer
  assert (list(mixer.pairs), mixer.full_rotary_width, mixer.still_width) == (pairs, 16, 10)
  context = Context.of(model.config, jnp.asarray(tokens_BT))
  ((key, (cos, sin)),) = context.angles.items()
  at_rest = np.setdiff1d(np.arange(16), [*pairs, *(8 + p for p in pairs)])
  factor = float(np.hypot(cos, sin).max())
  assert factor > 1.1
  context.angles[key] = cos.at[..., at_rest].set(factor), sin.at[..., at_rest].set(0)
  x_BTD, _ = context.run(model.layers[0], model.embed(tokens_BT))
  expected = np.asarray(model.logits(model.final_norm(x_BTD)))
  np.testing.assert_allclose(_logits(found, tokens_BT), expected, atol=TOLERANCE, rtol=TOLERANCE)
  assert np.abs(expected - _logits(model, tokens_BT)).max() > 100 * TOLERANCE


def test_the_pairs_of_the_largest_queries_and_keys_are_kept(tokens_BT):
  model = _model('tiny-llama')
  own = model.layers[0].attention
  for linear, heads in ((own.query, 4), (own.key, 2)):
    w_DHO = np.array(linear.weight.get_value()).reshape(-1, heads, 16)
    w_DHO[..., [3, 11, 5, 14]] *= 6  # both elements of pair 3, and one of pairs 5 and 6 each
    linear.weight.set_value(jnp.asarray(w_DHO.reshape(len(w_DHO), -1)))
  found, _ = _converted(model, tokens_BT, pairs=3)
  assert found.config.layers[0].mixer.pairs == (3, 5, 6)


@pytest.mark.parametrize('rank', [4, 20])
def test_a_rank_leaves_out_the_smallest_singular_values(rng, rank):
  w_IO = rng.normal(size=(24, 40)) * np.linspace(1, 3, 40)[None]
  down_IR, up_RO = latent_heads.decompose(w_IO, rank)
  assert (down_IR.shape, up_RO.shape) == ((24, rank), (rank, 40))
  tail = np.linalg.svd(w_IO, compute_uv=False)[rank:]
  np.testing.assert_allclose(np.square(down_IR @ up_RO - w_IO).sum(), np.square(tail).sum())


def test_outputs_lose_least_where_their_inputs_decide(rng):
  x_TI = rng.normal(size=(400, 24)) * np.geomspace(0.05, 5, 24)[None]
  w_IO = rng.normal(size=(24, 40))
  error = lambda pair: np.square(x_TI @ (pair[0] @ pair[1] - w_IO)).sum()
  plain = error(latent_heads.decompose(w_IO, 6))
  found = error(latent_heads.decompose(w_IO, 6, x_TI.T @ x_TI / len(x_TI)))
  # No matrix of the rank comes nearer to the outputs than their own truncation.
  tail = np.linalg.svd(x_TI @ w_IO, compute_uv=False)[6:]
  np.testing.assert_allclose(found, np.square(tail).sum(), rtol=1e-4)
  assert found < 0.5 * plain


def test_a_smaller_latent_is_cached_and_decoded(tokens_BT):
  model = _model('tiny-llama', layers=2, qkv_bias=True)
  found, ledger = _converted(model, tokens_BT, rank_per_head=6, pairs=2)
  mixer = found.config.layers[1].mixer
  assert mixer.cached == 12 + 2 * 2 * 2 and model.config.layers[1].mixer.cached == 64
  assert kv_cache.init(found.config, 1, 8)[0].tokens.x_BSKH.shape == (1, 8, 1, 20)
  graphdef, state = nnx.split(found)

  @jax.jit
  def step(state, tokens_BT, positions_BT, caches):
    own = nnx.merge(graphdef, state)
    x_BTD, caches = own.hidden(tokens_BT, positions_BT=positions_BT, cache=caches)
    return own.logits(x_BTD), caches

  caches, parts = kv_cache.init(found.config, len(tokens_BT), LENGTH), []
  for t in range(LENGTH):
    at = np.full((len(tokens_BT), 1), t, np.int32)
    logits, caches = step(state, tokens_BT[:, t : t + 1], at, caches)
    parts.append(logits)
  np.testing.assert_allclose(
    np.concatenate(parts, 1), _logits(found, tokens_BT), atol=10 * TOLERANCE
  )
  text = str([dataclasses.asdict(row) for row in ledger.events])
  assert 'numbers of a token in a cache, of 64' in text


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('tiny-qwen3', {}, 'layer 0 has norms of queries and keys'),
    ('tiny-mistral', {}, 'layer 0 has a window'),
    ('tiny-gemma2', {}, 'layer 0 has a soft cap'),
    ('tiny-deepseek-v3', {}, 'layer 0 has a LatentConfig'),
    ('tiny-llama', {'pairs': 9}, 'pairs 9 is more than the 8 pairs'),
    (
      'tiny-llama',
      {'rank_per_head': 17},
      'latents of 34 numbers, above the full rank 32 of layer 0',
    ),
    ('tiny-llama', {'rank_per_head': 0}, 'rank_per_head must be at least 1, not 0'),
    ('tiny-llama', {'pairs': -1}, 'pairs is a number of pairs, at least 0, not -1'),
  ],
)
def test_what_latents_cannot_compute_is_refused(tokens_BT, name, options, message):
  model = Transformer(presets.preset(name), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=message):
    _converted(model, tokens_BT, **options)
