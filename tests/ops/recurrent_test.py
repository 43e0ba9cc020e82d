"""Recurrences in chunks against loops over tokens: in numpy, and by the definitions in jax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import recurrent

B, N, H, Z, CHUNK = 2, 2, 5, 3, 8
FLOAT32 = 1e-5  # sums in another order, of values of order 1
KINDS = ('head', 'channel', 'delta')
LENGTHS = (1, 29)
kinds = pytest.mark.parametrize('kind', KINDS)


def _draw(rng, kind, length, strong=0.3):
  """The tokens of one kind; `strong` is the largest of the mean logarithms of the decays."""
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  q, k, v = (draw(B, length, N, size) for size in (H, H, Z))
  last = H if kind == 'channel' else 1
  decay = -strong * rng.exponential(size=(B, length, N, last)).astype(np.float32)
  if kind != 'delta':
    return q, k, v, decay
  k = k / np.linalg.norm(k, axis=-1, keepdims=True)
  return q, k, v, decay[..., 0], rng.uniform(size=decay.shape[:-1]).astype(np.float32)


def _starts(length):
  starts = np.zeros((B, length), bool)
  starts[0, [t for t in (3, 4, 8, 21) if t < length]] = True
  starts[1, 0] = True
  return starts


def _state(rng):
  return rng.normal(size=(B, N, H, Z)).astype(np.float32)


def _by_hand(kind, tokens, state, starts):
  """The formulas of the module, in float64."""
  q, k, v, decay, *strength = (np.float64(x) for x in tokens)
  state, y = np.array(state, np.float64), np.zeros(v.shape)
  for b, t, n in np.ndindex(v.shape[:3]):
    S = np.zeros((H, Z)) if starts[b, t] else state[b, n]
    key, value = k[b, t, n], v[b, t, n]
    a = np.diag(np.exp(np.broadcast_to(decay[b, t, n], H)))
    if kind == 'delta':
      beta = strength[0][b, t, n]
      a, value = a @ (np.eye(H) - beta * np.outer(key, key)), beta * value
    state[b, n] = a @ S + np.outer(key, value)
    y[b, t, n] = state[b, n].T @ q[b, t, n]
  return y, state


@functools.cache
def _run(kind, steps=False):
  name = ('delta' if kind == 'delta' else 'linear') + ('_steps' if steps else '')
  fn = getattr(recurrent, name)
  return jax.jit(fn if steps else functools.partial(fn, chunk=CHUNK))


def _assert_near(found, expected, atol=FLOAT32):
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=atol * max(1, np.abs(other).max()))


@kinds
@pytest.mark.parametrize('length', LENGTHS)
def test_both_forms_are_the_formulas(rng, kind, length):
  tokens, state, starts = _draw(rng, kind, length), _state(rng), _starts(length)
  expected = _by_hand(kind, tokens, state, starts)
  for steps in (False, True):
    _assert_near(_run(kind, steps)(*tokens, state, starts), expected)


@kinds
def test_without_a_state_it_begins_with_zeros(rng, kind):
  tokens = _draw(rng, kind, 29)
  zeros = np.zeros((B, N, H, Z), np.float32), np.zeros((B, 29), bool)
  for steps in (False, True):
    found, expected = _run(kind, steps)(*tokens), _run(kind, steps)(*tokens, *zeros)
    _assert_near(found, expected, 0)


@kinds
def test_a_later_token_changes_nothing_before_it(rng, kind):
  tokens, length = _draw(rng, kind, 29), 29
  y = np.asarray(_run(kind)(*tokens)[0])
  for cut in (1, 8, 13, 24):
    others = _draw(rng, kind, length)
    mixed = [np.concatenate([a[:, :cut], b[:, cut:]], 1) for a, b in zip(tokens, others)]
    changed = np.asarray(_run(kind)(*mixed)[0])
    np.testing.assert_array_equal(changed[:, :cut], y[:, :cut])
    assert np.abs(changed[:, cut:] - y[:, cut:]).min(axis=(0, 2, 3)).min() > 0


@kinds
def test_pieces_of_any_length_carry_the_state(rng, kind):
  tokens, state = _draw(rng, kind, 29), _state(rng)
  expected = _run(kind)(*tokens, state)
  at, parts, state = 0, [], jnp.asarray(state)
  for length in (1, 13, 1, 13, 1):
    y, state = _run(kind)(*(x[:, at : at + length] for x in tokens), state)
    parts.append(y)
    at += length
  _assert_near((np.concatenate(parts, 1), state), expected)


@kinds
@pytest.mark.parametrize('strong', [20.0, 1e4])
def test_strong_decays_neither_overflow_nor_lose_the_token_itself(rng, kind, strong):
  tokens = _draw(rng, kind, 29, strong)
  expected = _by_hand(kind, tokens, np.zeros((B, N, H, Z)), np.zeros((B, 29), bool))
  # Sums of logarithms up to `strong * CHUNK` are subtracted from each other in float32.
  _assert_near(_run(kind)(*tokens), expected, max(FLOAT32, 2e-7 * strong * CHUNK))
  assert all(np.isfinite(slope).all() for slope in _slopes(kind)(*tokens))


@functools.cache
def _slopes(kind):
  return jax.jit(jax.grad(lambda *tokens: _run(kind)(*tokens)[0].sum(), tuple(range(4))))


def test_equal_keys_at_full_strength_replace_each_other(rng):
  """The worst case of the triangular system: every token writes what the last one has written."""
  q, k, v, decay, strength = _draw(rng, 'delta', 64)
  k[:] = k[:, :1]
  tokens = q, k, v, 0 * decay, np.ones_like(strength)
  found, state = jax.jit(recurrent.delta)(*tokens)
  read = np.einsum('BTNH,BTNH->BTN', q, k)
  np.testing.assert_allclose(found, read[..., None] * v, atol=FLOAT32)
  written = np.einsum('BNH,BNZ->BNHZ', k[:, 0], v[:, -1])
  np.testing.assert_allclose(state, written, atol=FLOAT32)


@kinds
def test_gradients_are_those_of_the_definition(rng, kind):
  tokens, state, starts = _draw(rng, kind, 29), _state(rng), _starts(29)
  weights = rng.normal(size=(B, 29, N, Z)).astype(np.float32), _state(rng)

  def slopes(steps):
    def loss(tokens, state):
      found = _run(kind, steps)(*tokens, state, starts)
      return sum(jnp.sum(jnp.sin(x) * w) for x, w in zip(found, weights))

    return jax.jit(jax.grad(loss, (0, 1)))(tokens, state)

  _assert_near(*(jax.tree.leaves(slopes(steps)) for steps in (False, True)))


@kinds
@pytest.mark.quick(kind=('delta',))
def test_memory_grows_with_the_length_and_not_with_its_square(kind):
  def temporary(length):
    shapes = jax.eval_shape(lambda: tuple(map(jnp.asarray, _draw(_FIXED, kind, length))))
    fn = getattr(recurrent, 'delta' if kind == 'delta' else 'linear')
    run = jax.value_and_grad(lambda *tokens: fn(*tokens)[0].sum(), tuple(range(4)))
    return jax.jit(run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  assert temporary(4096) <= 2.2 * temporary(2048)


_FIXED = np.random.default_rng(0)


def test_arguments_that_do_not_fit_are_named(rng):
  q, k, v, decay = _draw(rng, 'channel', 4)
  with pytest.raises(ValueError, match='last axis of their logarithms is 1 or 5, not 4'):
    recurrent.linear(q, k, v, decay[..., :4])
  with pytest.raises(ValueError, match='axis T of BTNZ'):
    recurrent.linear(q, k, v[:, :3], decay)
  with pytest.raises(ValueError, match='a power of two of tokens, not 6'):
    recurrent.linear(q, k, v, decay, chunk=6)
