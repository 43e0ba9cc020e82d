import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ops import losses

FLOAT32 = 2e-6  # relative to values of order one
SIZES = {'B': 3, 'T': 7, 'D': 8, 'V': 13}


def problem(rng, B, T, D, V):
  x = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
  w = jnp.asarray(rng.standard_normal((D, V)), jnp.float32)
  labels = rng.integers(0, V, (B, T))
  labels[0, :2] = -1
  labels[1, -1] = -100
  return x, w, jnp.asarray(labels)


def torch_nll(x, w, labels):
  logits = x @ w
  labels = torch.where(labels < 0, -100, labels).long()
  return torch.nn.functional.cross_entropy(
    logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction='none'
  ).reshape(labels.shape)


def chunked(x, w, labels, chunk):
  return losses.cross_entropy(x, labels, lambda x: x @ w, chunk=chunk)


# 3 rows: less than a row's worth, one position of each, uneven, exact, and everything at once.
@pytest.mark.parametrize('chunk', [1, 3, 8, 9, 21, 1024])
def test_cross_entropy_and_its_gradients_match_torch(rng, chunk):
  x, w, labels = problem(rng, **SIZES)
  weights = jnp.asarray(rng.standard_normal(labels.shape), jnp.float32)
  leaves = [torch.tensor(np.array(a), requires_grad=True) for a in (x, w)]
  expected = torch_nll(*leaves, torch.tensor(np.array(labels)))
  (expected * torch.tensor(np.array(weights))).sum().backward()

  actual, pullback = jax.vjp(lambda x, w: chunked(x, w, labels, chunk), x, w)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=FLOAT32, atol=FLOAT32)
  for mine, leaf in zip(pullback(weights), leaves):
    np.testing.assert_allclose(mine, leaf.grad.numpy(), atol=10 * FLOAT32)


def test_ignored_labels_give_zero_and_no_gradient(rng):
  x, w, labels = problem(rng, **SIZES)
  nll, pullback = jax.vjp(lambda x: chunked(x, w, labels, 6), x)
  ignored = np.asarray(labels) < 0
  np.testing.assert_array_equal(np.asarray(nll)[ignored], 0.0)
  np.testing.assert_array_equal(np.asarray(pullback(jnp.ones_like(nll))[0])[ignored], 0.0)
  assert (np.asarray(nll)[~ignored] > 0).all()


def test_low_precision_logits_are_summed_in_float32(rng):
  x, w, labels = problem(rng, **SIZES)
  x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
  logits = torch.tensor(np.asarray(x @ w, np.float32))
  expected = torch_nll(logits, torch.eye(w.shape[1]), torch.tensor(np.array(labels))).numpy()
  actual = chunked(x, w, labels, 1024)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize('backward', [False, True])
def test_the_logits_of_all_tokens_are_never_stored(rng, backward):
  B, T, D, V, chunk = 4, 256, 16, 4096, 32
  all_logits, chunk_logits = 4 * B * T * V, 4 * chunk * V
  loss = lambda x, w, labels, chunk: jnp.sum(chunked(x, w, labels, chunk))

  def temporaries(chunk):
    fn = functools.partial(loss, chunk=chunk)
    fn = jax.grad(fn, (0, 1)) if backward else fn
    compiled = jax.jit(fn).lower(*problem(rng, B, T, D, V)).compile()
    assert (f'f32[{B},{T},{V}]' in compiled.as_text()) == (chunk > B * T - 1)
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(B * T) >= all_logits  # the check does find stored logits
  assert temporaries(chunk) < 6 * chunk_logits < all_logits / 4


def test_a_chunk_of_zero_tokens_is_refused(rng):
  x, w, labels = problem(rng, **SIZES)
  with pytest.raises(ValueError, match='at least 1 token, not 0'):
    chunked(x, w, labels, 0)
  with pytest.raises(ValueError, match='axis T'):
    chunked(x, w, labels[:, :5], 4)


def kl_in_float64(p_logits, q_logits):
  def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
  return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def kl_tolerance(distance):
  """Bounds the error: a logarithm near 10 is off by at most 2**-21, and KL is quadratic in that."""
  return 1e-5 + 2 * 2**-21 / distance


@pytest.mark.parametrize('distance', [1e-3, 0.1, 1.0, 30.0])
def test_kl_divergence_matches_the_float64_formula(rng, distance):
  p = (3 * rng.standard_normal((2, 5, 1000))).astype(np.float32)
  q = (p + distance * rng.standard_normal(p.shape)).astype(np.float32)
  actual = losses.kl_divergence(jnp.asarray(p), jnp.asarray(q))
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, kl_in_float64(p, q), rtol=kl_tolerance(distance))


def test_a_tiny_kl_divergence_is_not_lost_in_rounding(rng):
  p = (3 * rng.standard_normal((64, 1000))).astype(np.float32)
  q = (p + 1e-4 * rng.standard_normal(p.shape)).astype(np.float32)
  expected = kl_in_float64(p, q)
  assert expected.max() < 2e-8  # far below the rounding of one logarithm
  actual = losses.kl_divergence(jnp.asarray(p), jnp.asarray(q))
  np.testing.assert_allclose(actual, expected, rtol=kl_tolerance(1e-4))
  assert (np.asarray(losses.kl_divergence(jnp.asarray(p), jnp.asarray(p))) == 0).all()


def test_kl_divergence_of_impossible_tokens():
  log = lambda *values: jnp.log(jnp.asarray(values))
  p, q = log(0.5, 0.5, 0.0), log(0.25, 0.25, 0.5)
  np.testing.assert_allclose(losses.kl_divergence(p, q), np.log(2), rtol=1e-6)
  np.testing.assert_allclose(losses.kl_divergence(p, p), 0.0, atol=1e-7)
  assert losses.kl_divergence(q, p) == np.inf


def test_the_gradient_of_kl_divergence_is_q_minus_p(rng):
  p, q = (jnp.asarray(4 * rng.standard_normal((6, 50)), jnp.float32) for _ in range(2))
  q = q.at[0, 0].add(200.0)  # exp(200) overflows
  actual = jax.grad(lambda q: jnp.sum(losses.kl_divergence(p, q)))(q)
  expected = jax.nn.softmax(q) - jax.nn.softmax(p)
  np.testing.assert_allclose(actual, expected, atol=FLOAT32)


def test_kl_divergence_refuses_unequal_shapes():
  with pytest.raises(ValueError, match='axis V'):
    losses.kl_divergence(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
  with pytest.raises(ValueError, match=r'shapes \(2, 3\) and \(1, 3\)'):
    losses.kl_divergence(jnp.zeros((2, 3)), jnp.zeros((1, 3)))
