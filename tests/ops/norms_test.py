import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ops import norms

EPS = 1e-5
FLOAT32 = 1e-5  # a few roundings on values of order one
BFLOAT16 = 2**-8  # one rounding, relative: 8 bits of mantissa


def arrays(rng, shape=(2, 3, 48)):
  return [rng.standard_normal(s).astype(np.float32) for s in (shape, shape[-1:], shape[-1:])]


@pytest.mark.parametrize('offset', [0.0, 1.0])
def test_rms_norm_matches_the_float64_formula(rng, offset):
  x, scale, _ = arrays(rng)
  x64 = x.astype(np.float64)
  expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + EPS) * (scale + offset)
  actual = norms.rms_norm(jnp.asarray(x), jnp.asarray(scale), eps=EPS, offset=offset)
  np.testing.assert_allclose(actual, expected, atol=FLOAT32)


def test_rms_norm_matches_torch(rng):
  x, scale, _ = arrays(rng)
  expected = torch.nn.functional.rms_norm(
    torch.tensor(x), x.shape[-1:], torch.tensor(scale), eps=EPS
  )
  actual = norms.rms_norm(jnp.asarray(x), jnp.asarray(scale), eps=EPS)
  np.testing.assert_allclose(actual, expected.numpy(), atol=FLOAT32)


@pytest.mark.parametrize('shape', [(48,), (5, 48), (2, 3, 4, 48)])
@pytest.mark.parametrize('biased', [True, False])
def test_layer_norm_matches_torch(rng, shape, biased):
  x, scale, bias = arrays(rng, shape)
  bias = bias if biased else None
  expected = torch.nn.functional.layer_norm(
    *(torch.tensor(x), shape[-1:], torch.tensor(scale)), torch.tensor(bias) if biased else None, EPS
  )
  actual = norms.layer_norm(
    *(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias) if biased else None), eps=EPS
  )
  np.testing.assert_allclose(actual, expected.numpy(), atol=FLOAT32)


def test_layer_norm_survives_a_large_mean(rng):
  x, scale, bias = arrays(rng)
  far = (x + 4096.0).astype(np.float32)  # E[x²] - E[x]² in float32 would be rounding error only
  x64 = far.astype(np.float64)
  expected = (x64 - x64.mean(-1, keepdims=True)) / x64.std(-1, keepdims=True) * scale + bias
  actual = norms.layer_norm(*map(jnp.asarray, (far, scale, bias)), eps=0.0)
  np.testing.assert_allclose(actual, expected, atol=5e-3)  # the mean is off by 4096 * 2**-24


@pytest.mark.parametrize('name', ['rms', 'layer'])
def test_bfloat16_is_computed_in_float32_and_rounded_once(rng, name):
  x, scale, bias = [jnp.asarray(a, jnp.bfloat16) for a in arrays(rng)]
  fn = {
    'rms': lambda x, s, b: norms.rms_norm(x, s, eps=EPS),
    'layer': lambda x, s, b: norms.layer_norm(x, s, b, eps=EPS),
  }[name]
  exact = fn(*(a.astype(jnp.float32) for a in (x, scale, bias)))
  actual = fn(x, scale, bias)
  assert actual.dtype == jnp.bfloat16
  np.testing.assert_allclose(actual.astype(np.float32), exact, rtol=BFLOAT16, atol=1e-6)


def test_the_gradient_of_rms_norm_matches_torch(rng):
  x, scale, cotangent = arrays(rng)
  leaves = [torch.tensor(a, requires_grad=True) for a in (x, scale)]
  out = torch.nn.functional.rms_norm(leaves[0], x.shape[-1:], leaves[1], eps=EPS)
  (out * torch.tensor(cotangent)).sum().backward()
  loss = lambda x, s: jnp.sum(norms.rms_norm(x, s, eps=EPS) * jnp.asarray(cotangent)[None, None])
  actual = jax.grad(loss, (0, 1))(jnp.asarray(x), jnp.asarray(scale))
  for mine, theirs in zip(actual, leaves):
    np.testing.assert_allclose(mine, theirs.grad.numpy(), atol=1e-4)


def test_a_scale_of_another_width_is_refused():
  with pytest.raises(ValueError, match='axis D'):
    norms.rms_norm(jnp.zeros((2, 4)), jnp.zeros(5), eps=EPS)
  with pytest.raises(ValueError, match='axis D'):
    norms.layer_norm(jnp.zeros((2, 4)), jnp.zeros(4), jnp.zeros(5), eps=EPS)
