import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from ops import sampling
from ops.sampling import SamplingConfig

CASES = {
  'temperature': {'temperature': 0.7},
  'top-k': {'temperature': 1.0, 'top_k': 5},
  'top-1': {'temperature': 1.0, 'top_k': 1},
  'top-k past the vocabulary': {'temperature': 1.0, 'top_k': 1000},
  'top-p': {'temperature': 1.0, 'top_p': 0.8},
  'tiny top-p': {'temperature': 1.0, 'top_p': 1e-6},
  'top-p of everything': {'temperature': 1.0, 'top_p': 1.0},
  'min-p': {'temperature': 1.0, 'min_p': 0.1},
  'min-p of the best': {'temperature': 1.0, 'min_p': 1.0},
  'min-p of nothing': {'temperature': 1.0, 'min_p': 0.0},
  'all': {'temperature': 1.6, 'top_k': 20, 'top_p': 0.9, 'min_p': 0.08},
  'hot': {'temperature': 5.0, 'top_k': 30, 'top_p': 0.5},
}


cut = jax.jit(sampling.cut)
sample = jax.jit(sampling.sample)


def rows(config, count):
  return sampling.settings([config] * count)


def keys(seed, count):
  return jax.random.split(jax.random.key(seed), count)


def hugging_face(logits, config):
  steps = [logits_process.TemperatureLogitsWarper(config.temperature)]
  if config.top_k is not None:
    steps.append(logits_process.TopKLogitsWarper(config.top_k))
  if config.top_p is not None:
    steps.append(logits_process.TopPLogitsWarper(config.top_p))
  if config.min_p is not None:
    steps.append(logits_process.MinPLogitsWarper(config.min_p))
  return LogitsProcessorList(steps)(None, torch.tensor(logits)).numpy()


@pytest.mark.parametrize('name', CASES)
def test_cuts_to_what_hugging_face_keeps(rng, name):
  logits = (2 * rng.standard_normal((16, 100))).astype(np.float32)
  config = SamplingConfig(**CASES[name])
  np.testing.assert_allclose(
    cut(jnp.asarray(logits), rows(config, 16)), hugging_face(logits, config), rtol=1e-6
  )


def kept(probabilities, **cuts):
  logits = jnp.log(jnp.asarray([probabilities]))
  left = cut(logits, rows(SamplingConfig(temperature=1.0, **cuts), 1))
  return ''.join('.X'[int(v)] for v in np.isfinite(left)[0])


@pytest.mark.parametrize('size', [3, 256, 700])
def test_the_likeliest_token_is_the_first_of_equals(size, rng):
  logits = rng.integers(0, 40, (50, size)).astype(np.float32)  # the largest occurs several times
  logits[:3, 1:] = -np.inf
  logits[3] = -np.inf
  tokens = jax.jit(lambda x: sample(x, sampling.GREEDY, None))(logits)
  np.testing.assert_array_equal(tokens, logits.argmax(1))


def test_top_p_keeps_the_smallest_set_that_reaches_it():
  assert kept([0.1, 0.4, 0.2, 0.3], top_p=0.39) == '.X..'
  assert kept([0.1, 0.4, 0.2, 0.3], top_p=0.41) == '.X.X'
  assert kept([0.1, 0.4, 0.2, 0.3], top_p=0.75) == '.XXX'


def test_among_equals_top_p_keeps_as_few_as_it_needs_and_top_k_keeps_all():
  assert kept([0.25, 0.25, 0.25, 0.25], top_p=0.4) == 'XX..'
  assert kept([0.3, 0.3, 0.3, 0.1], top_k=2) == 'XXX.'


def test_min_p_is_relative_to_the_best():
  assert kept([0.5, 0.26, 0.24, 0.0], min_p=0.5) == 'XX..'


def test_each_cut_sees_what_the_one_before_left():
  # Of the first two tokens the first has 4/7, which reaches 0.55; of all four it has 0.4.
  assert kept([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.55) == 'X...'
  assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.55) == 'XX..'


def test_temperature_zero_is_greedy_and_needs_no_key(rng):
  logits = rng.standard_normal((8, 50)).astype(np.float32)
  tokens = sample(jnp.asarray(logits), sampling.GREEDY, None)
  assert tokens.dtype == jnp.int32
  np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_draws_as_often_as_the_probabilities_say(rng):
  logits = rng.standard_normal(12).astype(np.float32)
  config = SamplingConfig(temperature=0.8, top_k=8, top_p=0.95)
  draws = 20_000
  logits_BV = jnp.broadcast_to(jnp.asarray(logits)[None], (draws, 12))
  tokens = jax.jit(sampling.sample)(logits_BV, rows(config, draws), keys(0, draws))
  counts = np.bincount(np.asarray(tokens), minlength=12)
  expected = torch.tensor(hugging_face(logits[None], config)).softmax(-1).numpy()[0] * draws
  possible = expected > 0
  assert 2 < possible.sum() < 12
  assert counts[~possible].sum() == 0
  chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
  assert chi_square < 25  # at most 7 degrees of freedom: exceeded once in more than 1,000 keys


def test_rows_are_drawn_independently_and_the_key_decides():
  logits_BV, config = jnp.zeros((64, 1000)), SamplingConfig(temperature=1.0)
  draw = lambda seed: np.asarray(sample(logits_BV, rows(config, 64), keys(seed, 64)))
  np.testing.assert_array_equal(draw(1), draw(1))
  assert len(set(draw(1))) > 32
  assert (draw(1) != draw(2)).any()


def test_low_precision_logits_are_cut_in_float32(rng):
  logits = jnp.asarray(rng.standard_normal((4, 300)), jnp.bfloat16)
  config = SamplingConfig(temperature=1.0, top_p=0.9)
  cut = sampling.cut(logits, rows(config, 4))
  assert cut.dtype == jnp.float32
  # Equal logits are many in bfloat16, and which of them stays is free: compare how many stay.
  expected = hugging_face(np.asarray(logits, np.float32), config)
  np.testing.assert_array_equal(np.isfinite(cut).sum(-1), np.isfinite(expected).sum(-1))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'temperature': -1.0}, '0 or more, not -1.0'),
    ({'temperature': float('nan')}, 'not nan'),
    ({'top_k': 0}, 'at least 1, not 0'),
    ({'top_p': 0.0}, 'above 0 and at most 1, not 0.0'),
    ({'top_p': 1.5}, 'not 1.5'),
    ({'min_p': -0.1}, 'between 0 and 1, not -0.1'),
  ],
)
def test_a_config_that_makes_no_sense_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    SamplingConfig(**fields)


MIXED = [SamplingConfig(**case) for case in CASES.values()] + [
  SamplingConfig(),
  SamplingConfig(top_k=3),
]


def test_rows_of_different_settings_are_each_as_alone(rng):
  logits = (2 * rng.standard_normal((len(MIXED), 100))).astype(np.float32)
  keys_B = keys(1, len(MIXED))
  together = sample(jnp.asarray(logits), sampling.settings(MIXED), keys_B)
  kept = np.asarray(cut(jnp.asarray(logits), sampling.settings(MIXED)))
  for row, config in enumerate(MIXED):
    one = slice(row, row + 1)
    alone = sample(jnp.asarray(logits[one]), rows(config, 1), keys_B[one])
    assert together[row] == alone[0]
    if config.temperature > 0:
      np.testing.assert_allclose(kept[one], hugging_face(logits[one], config), rtol=1e-6)
    else:
      assert together[row] == logits[row].argmax()


def test_equal_keys_draw_equal_tokens_in_any_row():
  logits_BV = jnp.zeros((3, 1000))
  keys_B = keys(0, 2)[jnp.asarray([0, 1, 0])]
  config = SamplingConfig(temperature=1.0, top_p=0.9)
  a, b, c = sample(logits_BV, rows(config, 3), keys_B).tolist()
  assert a == c != b


def test_settings_that_a_row_has_not_are_neutral():
  found = sampling.settings([SamplingConfig(temperature=0.5, top_k=5, top_p=1.0), SamplingConfig()])
  assert (found.top_p_B.tolist(), found.min_p_B.tolist()) == ([1.0, 1.0], [0.0, 0.0])
  assert found.temperature_B.tolist() == [0.5, 0.0]
  assert found.top_k_B[0] == 5 and found.top_k_B[1] > 10**9


def test_bad_calls_are_refused():
  config = SamplingConfig(temperature=0.5)
  with pytest.raises(ValueError, match='needs a random key per row'):
    sample(jnp.zeros((1, 3)), rows(config, 1), None)
  with pytest.raises(ValueError, match='BV has 2 axes'):
    sample(jnp.zeros(3), rows(config, 1), keys(0, 1))
  with pytest.raises(ValueError, match='axis B'):
    sample(jnp.zeros((2, 3)), rows(config, 2), keys(0, 1))
  with pytest.raises(ValueError, match='axis B'):
    sample(jnp.zeros((2, 3)), rows(config, 1), keys(0, 2))
  with pytest.raises(ValueError, match='take the argmax'):
    sampling.cut(jnp.zeros((1, 3)), sampling.GREEDY)
