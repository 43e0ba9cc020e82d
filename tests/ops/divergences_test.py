"""Divergences against float64 sums of scipy, gradients against torch, and the limits of theory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from ops import divergences
from ops.divergences import Divergence

# Float32 logarithms near 10 are off by 2**-21, on which a divergence depends in second order.
RELATIVE = 2e-5
GRADIENT = 1e-6  # of probabilities
KINDS = [
  ('forward_kl', None),
  ('reverse_kl', None),
  ('jsd', 0.1),
  ('jsd', 0.5),
  ('jsd', 0.9),
  ('normalized_jsd', 0.0),
  ('normalized_jsd', 0.3),
  ('normalized_jsd', 1.0),
  ('skewed_kl', 0.1),
  ('skewed_reverse_kl', 0.1),
]


def _problem(rng, distance=2.0, shape=(3, 4, 50)):
  teacher = (3 * rng.standard_normal(shape)).astype(np.float32)
  student = (teacher + distance * rng.standard_normal(shape)).astype(np.float32)
  return teacher, student


def _expected(kind, mix, teacher, student, temperature=1.0):
  """The definitions of the module's docstring in float64."""
  p, q = (np.exp(log_softmax(np.float64(x) / temperature, -1)) for x in (teacher, student))
  kl = lambda a, b: rel_entr(a, b).sum(-1)
  jsd = lambda b: b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q)
  value = {
    'forward_kl': lambda: kl(p, q),
    'reverse_kl': lambda: kl(q, p),
    'jsd': lambda: jsd(mix),
    'normalized_jsd': lambda: (
      kl(p, q) if mix == 0 else kl(q, p) if mix == 1 else jsd(mix) / (mix * (1 - mix))
    ),
    'skewed_kl': lambda: kl(p, mix * p + (1 - mix) * q),
    'skewed_reverse_kl': lambda: kl(q, mix * q + (1 - mix) * p),
  }[kind]()
  return temperature**2 * value


def _gradient(divergence, teacher, student):
  total = lambda student: jnp.sum(divergence(jnp.asarray(teacher), student))
  return np.asarray(jax.grad(total)(jnp.asarray(student)))


@pytest.mark.parametrize('temperature', [1.0, 3.0])
@pytest.mark.parametrize('kind, mix', KINDS)
def test_values_match_float64(rng, kind, mix, temperature):
  divergence = Divergence(kind=kind, mix=mix, temperature=temperature)
  for distance in (0.05, 2.0, 20.0):
    teacher, student = _problem(rng, distance)
    actual = divergence(jnp.asarray(teacher), jnp.asarray(student))
    assert actual.dtype == jnp.float32 and actual.shape == (3, 4)
    expected = _expected(kind, mix, teacher, student, temperature)
    np.testing.assert_allclose(actual, expected, rtol=RELATIVE / min(1, distance), atol=1e-7)


def _torch_kl(log_p, log_q):
  return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction='sum')


def _torch_jsd(log_p, log_q, beta):
  log_m = torch.logaddexp(log_p + np.log(beta), log_q + np.log1p(-beta))
  return beta * _torch_kl(log_p, log_m) + (1 - beta) * _torch_kl(log_q, log_m)


TORCH = {
  'forward_kl': lambda p, q, _: _torch_kl(p, q),
  'reverse_kl': lambda p, q, _: _torch_kl(q, p),
  'jsd': _torch_jsd,
  'normalized_jsd': lambda p, q, b: _torch_jsd(p, q, b) / (b * (1 - b)),
  'skewed_kl': lambda p, q, a: _torch_kl(p, torch.logaddexp(p + np.log(a), q + np.log1p(-a))),
  'skewed_reverse_kl': lambda p, q, a: _torch_kl(
    q, torch.logaddexp(q + np.log(a), p + np.log1p(-a))
  ),
}


@pytest.mark.parametrize('kind, mix', [row for row in KINDS if row[1] not in (0.0, 1.0)])
def test_gradients_match_torch_in_float64(rng, kind, mix):
  teacher, student = _problem(rng)
  temperature = 2.0
  logits = torch.tensor(student, dtype=torch.float64, requires_grad=True)
  logs = [torch.log_softmax(x / temperature, -1) for x in (torch.tensor(teacher).double(), logits)]
  (temperature**2 * TORCH[kind](*logs, mix)).backward()
  actual = _gradient(Divergence(kind=kind, mix=mix, temperature=temperature), teacher, student)
  np.testing.assert_allclose(actual, logits.grad.numpy(), rtol=1e-4, atol=4 * GRADIENT)


def test_the_gradient_of_the_forward_kl_is_q_minus_p_and_of_the_reverse_its_log_ratio(rng):
  teacher, student = _problem(rng)
  log_p, log_q = (log_softmax(np.float64(x), -1) for x in (teacher, student))
  p, q = np.exp(log_p), np.exp(log_q)
  forward = _gradient(Divergence(), teacher, student)
  np.testing.assert_allclose(forward, q - p, atol=GRADIENT)
  reverse = _gradient(Divergence(kind='reverse_kl'), teacher, student)
  kl = (q * (log_q - log_p)).sum(-1, keepdims=True)
  np.testing.assert_allclose(reverse, q * (log_q - log_p - kl), rtol=1e-4, atol=4 * GRADIENT)


def test_a_high_temperature_tends_to_the_difference_of_centered_logits(rng):
  teacher, student = _problem(rng)
  centered = lambda x: x - x.mean(-1, keepdims=True)
  expected = (centered(student) - centered(teacher)) / teacher.shape[-1]
  gaps = [
    np.abs(_gradient(Divergence(temperature=t), teacher, student) - expected).max()
    for t in (10.0, 100.0)
  ]
  # First-order in 1/T, until the rounding of T (q - p) shows.
  assert gaps[1] < 0.2 * gaps[0] < 0.2 * np.abs(expected).max()


def test_the_normalized_jsd_is_continuous_at_both_ends_and_the_plain_one_vanishes(rng):
  logits = [jnp.asarray(x) for x in _problem(rng)]
  for end, kind in ((0.0, 'forward_kl'), (1.0, 'reverse_kl')):
    limit = np.asarray(Divergence(kind=kind)(*logits))
    np.testing.assert_array_equal(Divergence(kind='normalized_jsd', mix=end)(*logits), limit)
    near = abs(end - 1e-4)
    actual = Divergence(kind='normalized_jsd', mix=near)(*logits)
    np.testing.assert_allclose(actual, limit, rtol=5e-3)
    expected = _expected('normalized_jsd', near, *map(np.asarray, logits))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert np.all(np.asarray(Divergence(kind='jsd', mix=near)(*logits)) < 2e-4 * limit)


def test_jsd_of_one_half_is_symmetric_and_bounded_by_log_2(rng):
  teacher, student = map(jnp.asarray, _problem(rng, distance=30.0))
  jsd = Divergence(kind='jsd', mix=0.5)
  np.testing.assert_allclose(jsd(teacher, student), jsd(student, teacher), rtol=1e-6)
  assert np.all(np.asarray(jsd(teacher, student)) <= np.log(2) * (1 + 1e-6))


@pytest.mark.parametrize('alpha', [0.01, 0.1, 0.5])
def test_skewed_divergences_are_bounded_where_the_plain_ones_are_not(alpha):
  log = lambda *values: jnp.log(jnp.asarray(values))
  p, q = log(0.5, 0.5, 0.0), log(1.0, 0.0, 0.0)
  assert Divergence()(p, q) == np.inf
  for kind in ('skewed_kl', 'skewed_reverse_kl'):
    divergence = Divergence(kind=kind, mix=alpha)
    for pair in ((p, q), (q, p)):
      assert 0 < float(divergence(*pair)) <= -np.log(alpha)
      assert np.isfinite(_gradient(divergence, *pair)).all()
  plain = _gradient(Divergence(kind='skewed_kl', mix=0.0), *_problem(np.random.default_rng(0)))
  forward = _gradient(Divergence(), *_problem(np.random.default_rng(0)))
  np.testing.assert_array_equal(plain, forward)


@pytest.mark.parametrize('kind, mix', KINDS)
def test_equal_distributions_have_no_divergence_and_no_gradient(rng, kind, mix):
  teacher, _ = _problem(rng)
  divergence = Divergence(kind=kind, mix=mix)
  np.testing.assert_array_equal(divergence(jnp.asarray(teacher), jnp.asarray(teacher)), 0.0)
  np.testing.assert_allclose(_gradient(divergence, teacher, teacher), 0.0, atol=GRADIENT)


def test_padded_logits_are_cut_before_the_softmax(rng):
  teacher, student = map(jnp.asarray, _problem(rng))
  padded = lambda x, n: jnp.pad(x, ((0, 0), (0, 0), (0, n)), constant_values=5.0)
  wanted = Divergence()(teacher, student)
  actual = Divergence()(padded(teacher, 14), padded(student, 6), vocabulary=50)
  np.testing.assert_array_equal(actual, wanted)
  with pytest.raises(ValueError, match='axis V'):
    Divergence()(padded(teacher, 14), padded(student, 6))
  mass = np.asarray(Divergence()(padded(teacher, 6), padded(student, 6))) - np.asarray(wanted)
  assert np.abs(mass).mean() > 0.1  # as uncut padding would change it


@pytest.mark.parametrize(
  'settings, match',
  [
    ({'kind': 'kl'}, "kind 'kl' is not one of forward_kl, reverse_kl"),
    ({'mix': 0.5}, 'forward_kl has no mix'),
    ({'kind': 'jsd'}, 'mix of jsd must be above 0'),
    ({'kind': 'jsd', 'mix': 1.0}, 'its ends vanish'),
    ({'kind': 'skewed_kl', 'mix': 1.0}, 'at least 0 and below 1, not 1.0'),
    ({'kind': 'normalized_jsd', 'mix': 1.5}, 'between 0 and 1, not 1.5'),
    ({'temperature': 0.0}, 'temperature must be a positive number, not 0.0'),
  ],
)
def test_bad_settings_are_named(settings, match):
  with pytest.raises(ValueError, match=match):
    Divergence(**settings)


def test_unequal_shapes_are_refused():
  with pytest.raises(ValueError, match=r'shapes \(2, 3\) and \(1, 3\)'):
    divergences.kl(jnp.zeros((2, 3)), jnp.zeros((1, 3)))
