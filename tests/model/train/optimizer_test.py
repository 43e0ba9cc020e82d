"""Tests the optimizer against torch's AdamW, and its schedule against the formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from model.train import optimizer
from model.train.optimizer import OptimizerConfig

# Float32 sums of a handful of terms in another order.
TOLERANCE = {'rtol': 2e-5, 'atol': 1e-7}


def test_twenty_updates_equal_torch(rng):
  config = OptimizerConfig(
    steps=20, learning_rate=0.01, warmup_steps=3, weight_decay=0.2, clip_norm=0.5
  )
  start = {'w': rng.normal(size=(3, 4)), 'b': rng.normal(size=4)}
  gradients = [{k: rng.normal(size=v.shape) for k, v in start.items()} for _ in range(20)]
  ours = _run_ours(config, start, gradients)
  theirs = _run_torch(config, start, gradients)
  for name in start:
    np.testing.assert_allclose(ours[name], theirs[name], **TOLERANCE)


def _run_ours(config, start, gradients):
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
  tx = optimizer.make(config)
  state = tx.init(params)
  for gradient in gradients:
    gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return params


def _run_torch(config, start, gradients):
  params = {k: torch.nn.Parameter(torch.tensor(v, dtype=torch.float32)) for k, v in start.items()}
  groups = [
    {'params': [params['w']], 'weight_decay': config.weight_decay},
    {'params': [params['b']], 'weight_decay': 0.0},
  ]
  tx = torch.optim.AdamW(groups, lr=1.0, betas=(config.b1, config.b2), eps=config.eps)
  for n, gradient in enumerate(gradients):
    for name, value in gradient.items():
      params[name].grad = torch.tensor(value, dtype=torch.float32)
    torch.nn.utils.clip_grad_norm_(params.values(), config.clip_norm)
    for group in tx.param_groups:
      group['lr'] = _rate(config, n)
    tx.step()
  return {k: v.detach().numpy() for k, v in params.items()}


def _rate(config, n):
  warmup, peak = config.warmup_steps, config.learning_rate
  if n < warmup:
    return peak * (n + 1) / (warmup + 1)
  progress = min(1.0, (n - warmup) / (config.steps - warmup))
  low = config.floor * peak
  return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))


@pytest.mark.parametrize('warmup', [0, 1, 7])
def test_schedule_follows_the_formula(warmup):
  config = OptimizerConfig(steps=30, learning_rate=0.3, warmup_steps=warmup, floor=0.2)
  got = [float(optimizer.schedule(config)(n)) for n in range(35)]
  np.testing.assert_allclose(got, [_rate(config, n) for n in range(35)], rtol=1e-6)
  assert max(got) == got[warmup] and min(got[:1]) > 0


@pytest.mark.parametrize(
  'change, match',
  [
    ({'steps': 0}, 'steps must be at least 1'),
    ({'warmup_steps': 10}, 'between 0 and steps - 1 = 9, not 10'),
    ({'learning_rate': 0.0}, 'learning_rate must be positive'),
    ({'learning_rate': math.nan}, 'learning_rate must be positive'),
    ({'floor': 1.5}, 'floor is a fraction'),
    ({'b2': 1.0}, 'b1 and b2'),
    ({'weight_decay': -1.0}, 'weight_decay must not be negative'),
    ({'clip_norm': 0.0}, 'clip_norm must be positive'),
  ],
)
def test_bad_values_are_named(change, match):
  with pytest.raises(ValueError, match=match):
    OptimizerConfig(**{'steps': 10, 'learning_rate': 0.1, **change})
