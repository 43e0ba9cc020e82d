import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ops import rope
from ops.rope import RopeConfig

WIDTH = 32
FREQUENCY_RTOL = 1e-5  # Hugging Face works in float32 throughout
ANGLE_ATOL = 2e-4  # that error times positions below 300

LLAMA3 = {
  'factor': 8.0,
  'original_max_positions': 64,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
}
YARN = {'factor': 4.0, 'original_max_positions': 128}
CASES = {
  'plain': {'kind': 'plain'},
  'plain, another theta': {'kind': 'plain', 'theta': 5e5},
  'linear': {'kind': 'linear', 'factor': 4.0},
  'dynamic': {'kind': 'dynamic', 'factor': 2.0, 'original_max_positions': 64},
  'llama3': dict(kind='llama3', theta=5e5, **LLAMA3),
  'yarn': dict(kind='yarn', **YARN),
  'yarn, given factor': dict(kind='yarn', attention_factor=1.3, **YARN),
  'yarn, mscale': dict(kind='yarn', mscale=1.0, mscale_all_dim=0.7, **YARN),
  'yarn, mscale alone': dict(kind='yarn', mscale=0.7, **YARN),
  'yarn, not truncated': dict(kind='yarn', truncate=False, **YARN),
  'yarn, betas': dict(kind='yarn', beta_fast=8.0, beta_slow=2.0, **YARN),
  'yarn, no ramp': {'kind': 'yarn', 'factor': 4.0, 'original_max_positions': 4},
  'yarn, factor 1': {'kind': 'yarn', 'factor': 1.0, 'original_max_positions': 128},
}
NAMES = {'low_freq_factor', 'high_freq_factor', 'beta_fast', 'beta_slow', 'mscale'}
NAMES |= {'mscale_all_dim', 'truncate', 'factor', 'attention_factor'}


def hf_config(config):
  parameters = {name: getattr(config, name) for name in NAMES}
  parameters['rope_theta'] = config.theta
  parameters['rope_type'] = 'default' if config.kind == 'plain' else config.kind
  if config.original_max_positions:
    parameters['original_max_position_embeddings'] = config.original_max_positions
  return LlamaConfig(
    hidden_size=2 * WIDTH,
    num_attention_heads=2,
    head_dim=WIDTH,
    max_position_embeddings=config.original_max_positions or 64,
    rope_parameters={k: v for k, v in parameters.items() if v is not None},
  )


def hf_frequencies(config, length):
  theirs = hf_config(config)
  if config.kind == 'plain':
    values, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
  else:
    values, factor = ROPE_INIT_FUNCTIONS[config.kind](theirs, 'cpu', seq_len=length)
  return values.numpy(), factor


@pytest.mark.parametrize('length', [10, 64, 65, 1000])
@pytest.mark.parametrize('name', CASES)
def test_frequencies_match_hugging_face(name, length):
  config = RopeConfig(**CASES[name])
  expected, factor = hf_frequencies(config, length)
  actual, actual_factor = rope.frequencies(config, WIDTH, length)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected, rtol=FREQUENCY_RTOL)
  assert actual_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize('name', CASES)
def test_cos_and_sin_match_hugging_face(name):
  config = RopeConfig(**CASES[name])
  positions = np.array([[0, 1, 2, 63, 64], [5, 299, 7, 100, 131]])
  actual = rope.cos_sin(jnp.asarray(positions), config, WIDTH)
  for row in range(2):  # separately, because in transformers the longest row decides for all
    module = LlamaRotaryEmbedding(hf_config(config))
    expected = module(torch.zeros(1, 5, WIDTH), torch.tensor(positions[row : row + 1]))
    for mine, theirs in zip(actual, expected):
      assert mine.dtype == jnp.float32
      np.testing.assert_allclose(mine[row], theirs[0].numpy(), atol=ANGLE_ATOL)


def test_ntk_matches_the_formula():
  config = RopeConfig(kind='ntk', theta=1e4, factor=8.0)
  theta = 1e4 * 8.0 ** (WIDTH / (WIDTH - 2))
  expected = [1 / theta ** (2 * i / WIDTH) for i in range(WIDTH // 2)]
  actual, factor = rope.frequencies(config, WIDTH, 7)
  np.testing.assert_allclose(actual, expected, rtol=1e-6)
  assert factor == 1.0


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest():
  plain, _ = rope.frequencies(RopeConfig(), WIDTH, 1)
  ntk, _ = rope.frequencies(RopeConfig(kind='ntk', factor=8.0), WIDTH, 1)
  np.testing.assert_allclose(np.asarray(plain)[[0, -1]] / np.asarray(ntk)[[0, -1]], [1, 8], 1e-5)


def test_dynamic_is_plain_up_to_the_original_length_and_takes_traced_lengths():
  config = RopeConfig(kind='dynamic', factor=4.0, original_max_positions=64)
  plain, _ = rope.frequencies(RopeConfig(), WIDTH, 1)
  traced = jax.jit(lambda length: rope.frequencies(config, WIDTH, length)[0])
  np.testing.assert_allclose(traced(64), plain, rtol=1e-6)
  assert np.asarray(traced(65))[-1] < np.asarray(plain)[-1] * 0.999
  np.testing.assert_allclose(traced(200), hf_frequencies(config, 200)[0], rtol=FREQUENCY_RTOL)


def test_frequencies_at_a_long_context_are_exact_to_float32():
  # At position 2**17, an error of one unit in the last place of a frequency rotates by 2**-7.
  expected = [5e5 ** (-2 * i / 128) for i in range(64)]
  actual, _ = rope.frequencies(RopeConfig(theta=5e5), 128, 1)
  np.testing.assert_array_equal(actual, np.asarray(expected, np.float32))


@pytest.mark.parametrize('head_width', [WIDTH, WIDTH + 8])
def test_rotation_matches_hugging_face(rng, head_width):
  x = rng.standard_normal((2, 5, 3, head_width)).astype(np.float32)
  positions = np.array([[0, 1, 2, 3, 4], [5, 299, 7, 100, 131]])
  cos, sin = rope.cos_sin(jnp.asarray(positions), RopeConfig(), WIDTH)
  part = torch.tensor(x[..., :WIDTH]).transpose(1, 2)
  expected, _ = apply_rotary_pos_emb(part, part, *(torch.tensor(np.array(a)) for a in (cos, sin)))
  actual = rope.rotate(jnp.asarray(x), cos, sin)
  np.testing.assert_allclose(actual[..., :WIDTH], expected.transpose(1, 2).numpy(), atol=1e-6)
  np.testing.assert_array_equal(actual[..., WIDTH:], x[..., WIDTH:])


def test_products_depend_only_on_the_distance(rng):
  q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, WIDTH)), jnp.float32) for _ in range(2))

  def product(at_q, at_k):
    turned = [
      rope.rotate(x, *rope.cos_sin(jnp.full((1, 1), at), RopeConfig(), WIDTH))
      for x, at in ((q, at_q), (k, at_k))
    ]
    return float(jnp.sum(turned[0] * turned[1]))

  assert product(9, 2) == pytest.approx(product(107, 100), abs=1e-4)


def test_rotation_returns_the_dtype_of_x():
  cos, sin = rope.cos_sin(jnp.zeros((1, 2), jnp.int32), RopeConfig(), 8)
  x = jnp.ones((1, 2, 3, 16), jnp.bfloat16)
  assert rope.rotate(x, cos, sin).dtype == jnp.bfloat16
  np.testing.assert_array_equal(rope.rotate(x, cos, sin), x)  # position 0 is not rotated


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'kind': 'longrope'}, "'longrope' is not one of plain"),
    ({'factor': 0.5}, 'at least 1, not 0.5'),
    ({'theta': 0.0}, 'greater than 1, not 0.0'),
    ({'kind': 'yarn', 'factor': 2.0}, 'needs original_max_positions'),
    ({'kind': 'llama3', 'original_max_positions': 8, 'low_freq_factor': 4.0}, 'must be less than'),
  ],
)
def test_an_inconsistent_config_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    RopeConfig(**fields)


def test_invalid_rotary_widths_are_refused():
  with pytest.raises(ValueError, match='even and at least 2, not 7'):
    rope.frequencies(RopeConfig(), 7, 1)
  with pytest.raises(ValueError, match='4 or more'):
    rope.frequencies(RopeConfig(kind='ntk'), 2, 1)
  cos, sin = rope.cos_sin(jnp.zeros((1, 2), jnp.int32), RopeConfig(), 16)
  with pytest.raises(ValueError, match='the rotary width 16 exceeds the head width 8'):
    rope.rotate(jnp.zeros((1, 2, 3, 8)), cos, sin)
