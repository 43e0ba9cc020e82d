"""Tests the optimizers against torch, optax and numpy, and the schedules against their formulas."""

import functools
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


@functools.cache
def _compiled(config):
  tx = optimizer.make(config)
  return jax.jit(tx.init), jax.jit(tx.update)


def _run_ours(config, start, gradients):
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
  init, update = _compiled(config)
  state = init(params)
  for gradient in gradients:
    gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
    updates, state = update(gradient, state, params)
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


def test_a_constant_rate_follows_the_warm_up():
  config = OptimizerConfig(steps=9, learning_rate=0.3, warmup_steps=2, decay='constant')
  got = [float(optimizer.schedule(config)(n)) for n in range(9)]
  np.testing.assert_allclose(got, [0.1, 0.2, *[0.3] * 7], rtol=1e-6)


def _plain(name, **changes):
  """Settings without a schedule, clipping or weight decay."""
  fixed = {'decay': 'constant', 'clip_norm': None, 'weight_decay': 0.0, 'learning_rate': 0.01}
  return OptimizerConfig(name=name, steps=20, **{**fixed, **changes})


def _problem(rng, count=5):
  start = {'w': rng.normal(size=(6, 4)), 'head.weight': rng.normal(size=(4, 3)), 'b': np.ones(4)}
  gradients = [{k: rng.normal(size=v.shape) for k, v in start.items()} for _ in range(count)]
  return start, gradients


def _assert_equal(got, want, tolerance=TOLERANCE):
  for name in want:
    np.testing.assert_allclose(got[name], want[name], err_msg=name, **tolerance)


def test_lion_is_its_formula(rng):
  start, gradients = _problem(rng)
  want, m = {k: v.copy() for k, v in start.items()}, {k: 0 * v for k, v in start.items()}
  for g in gradients:
    for k in want:
      want[k] -= 0.01 * np.sign(0.9 * m[k] + 0.1 * g[k])
      m[k] = 0.95 * m[k] + 0.05 * g[k]
  _assert_equal(_run_ours(_plain('lion'), start, gradients), want)


@pytest.mark.parametrize('b1', [0.0, 0.9])
def test_sgd_is_that_of_torch(rng, b1):
  start, gradients = _problem(rng)
  params = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
  tx = torch.optim.SGD(params.values(), lr=0.01, momentum=b1)
  for g in gradients:
    for k, value in g.items():
      params[k].grad = torch.tensor(value)
    tx.step()
  want = {k: v.detach().numpy() for k, v in params.items()}
  _assert_equal(_run_ours(_plain('sgd', b1=b1), start, gradients), want)


def test_adafactor_is_that_of_optax(rng):
  start = {'w': rng.normal(size=(130, 140)), 'b': rng.normal(size=4)}
  gradients = [{k: rng.normal(size=v.shape) for k, v in start.items()} for _ in range(4)]
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
  tx = optax.adafactor(0.01)
  state, update = tx.init(params), jax.jit(tx.update)
  for g in gradients:
    updates, state = update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g), state, params)
    params = optax.apply_updates(params, updates)
  _assert_equal(_run_ours(_plain('adafactor'), start, gradients), params)


def _orthogonal(m):
  """Five steps of the quintic Newton-Schulz iteration."""
  x = m / (np.linalg.norm(m) + 1e-8)
  transposed = x.shape[0] > x.shape[1]
  x = x.T if transposed else x
  for _ in range(5):
    gram = x @ x.T
    x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
  return x.T if transposed else x


def test_muon_is_its_formula_for_hidden_matrices_and_adamw_for_the_rest(rng):
  start, gradients = _problem(rng)
  got = _run_ours(_plain('muon'), start, gradients)
  w, m = start['w'].copy(), np.zeros((6, 4))
  for g in gradients:
    m = 0.95 * m + g['w']
    w -= 0.01 * 0.2 * math.sqrt(6) * _orthogonal(g['w'] + 0.95 * m)
  _assert_equal(got, {'w': w}, {'rtol': 1e-3, 'atol': 1e-5})
  adam = _run_ours(_plain('adamw'), start, gradients)
  _assert_equal(got, {k: adam[k] for k in ('head.weight', 'b')})


def test_muon_is_near_the_closest_orthogonal_matrix(rng):
  m = rng.normal(size=(24, 16))
  u, _, vt = np.linalg.svd(m, full_matrices=False)
  start = {'w': np.zeros((24, 16))}
  got = -_run_ours(_plain('muon', learning_rate=1.0), start, [{'w': m}])['w']
  rotated = u.T @ np.asarray(got) @ vt.T / (0.2 * math.sqrt(24))
  assert np.abs(rotated - np.diag(np.diag(rotated))).max() < 1e-4
  assert np.diag(rotated).min() > 0.6 and np.diag(rotated).max() < 1.25


def test_rates_multiply_the_updates_of_their_parameters(rng):
  start, gradients = _problem(rng)
  plain = _run_ours(_plain('adamw', weight_decay=0.1), start, gradients[:1])
  rates = (('head.*', 16.0), ('*', 0.5))  # the first that matches counts
  got = _run_ours(_plain('adamw', weight_decay=0.1, rates=rates), start, gradients[:1])
  for name, factor in (('w', 0.5), ('head.weight', 16), ('b', 0.5)):
    moved = np.asarray(plain[name]) - start[name]
    np.testing.assert_allclose(got[name] - start[name], factor * moved, rtol=1e-3, atol=1e-6)


def test_rates_name_parameters_that_exist():
  tx = optimizer.make(_plain('adamw', rates=(('*.b_RO', 16.0),)))
  with pytest.raises(ValueError, match=r"pattern '\*\.b_RO' of rates; there are a, b"):
    tx.init({'a': jnp.zeros(3), 'b': jnp.zeros(3)})
  tx.init({'layers.0.up.weight.b_RO': jnp.zeros(3)})


every = pytest.mark.parametrize('name', optimizer.OPTIMIZERS)


@every
def test_state_bytes_are_those_of_the_table(name):
  shape = (1024, 2048)
  params = {'layers.0.weight': jax.ShapeDtypeStruct(shape, jnp.float32)}
  state = jax.eval_shape(optimizer.make(_plain(name)).init, params)
  found = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert found / math.prod(shape) == pytest.approx(optimizer.OPTIMIZERS[name].state_bytes, abs=0.01)


@every
def test_every_optimizer_descends_and_decays_matrices_alone(rng, name):
  # The least squares of a matrix that has a solution, and a vector without a gradient.
  x, solution = jnp.asarray(rng.normal(size=(64, 32))), rng.normal(size=(32, 160))
  y = x @ jnp.asarray(solution)
  loss = lambda p: jnp.mean((x @ p['w'] - y) ** 2)
  params = {'w': jnp.asarray(0.1 * rng.normal(size=(32, 160))), 'b': jnp.ones(4)}
  params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
  tx = optimizer.make(_plain(name, learning_rate=0.05, weight_decay=0.01, clip_norm=1.0))
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value

  losses = []
  for _ in range(60):
    params, state, value = step(params, state)
    losses.append(float(value))
  assert losses[-1] < 0.7 * losses[0]
  np.testing.assert_array_equal(params['b'], np.ones(4))


@pytest.mark.parametrize('name', ['adamw', 'adam8bit', 'adafactor', 'muon'])
@pytest.mark.quick(name=('adamw', 'muon'))
def test_each_expert_is_optimized_by_itself(rng, name):
  """As a matrix of its own, in stacked layers too; their biases are vectors and do not decay."""
  config = _plain(name, weight_decay=0.1)
  scales = np.array([0.1, 1.0, 10.0])
  draw = lambda: {
    'up.weight': scales[:, None, None] * rng.normal(size=(3, 130, 140)),
    'up.bias': scales[:, None] * rng.normal(size=(3, 4)),
  }
  start, gradients = draw(), [draw(), draw()]
  got = _run_ours(config, start, gradients)
  stacked = lambda tree: {f'layers.0.blocks.0.{k}': v[None] for k, v in tree.items()}
  looped = _run_ours(config, stacked(start), list(map(stacked, gradients)))
  for e in range(3):
    take = lambda tree, e=e: {k: v[e] for k, v in tree.items()}
    want = _run_ours(config, take(start), list(map(take, gradients)))
    _assert_equal(take(got), want, {'rtol': 1e-4, 'atol': 1e-5})
    again = {k: looped[f'layers.0.blocks.0.{k}'][0, e] for k in want}
    _assert_equal(again, want, {'rtol': 1e-4, 'atol': 1e-5})
  still = {'router.bias': np.ones(3), 'up.bias': np.ones((3, 4))}
  zero = jax.tree.map(np.zeros_like, still)
  _assert_equal(_run_ours(config, still, [zero]), still)


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
    ({'name': 'adam'}, "the optimizer 'adam' is not one of adamw, adam8bit"),
    ({'decay': 'linear'}, "decay 'linear' is not one of cosine, constant"),
    ({'rates': (('*', -1.0),)}, r"the rate of '\*' must not be negative, not -1.0"),
  ],
)
def test_bad_values_are_named(change, match):
  with pytest.raises(ValueError, match=match):
    OptimizerConfig(**{'steps': 10, 'learning_rate': 0.1, **change})
