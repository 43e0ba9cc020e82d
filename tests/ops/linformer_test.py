"""Attention to summaries, against its definition in float64; and who sees the future."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from ops import linformer, masks
from ops.linformer import Sums
from ops.patterns import Window

B, T, N, K, H, CHUNK, R = 2, 22, 4, 2, 8, 4, 2
WINDOW, SCALE = 6, 0.4
FLOAT32 = 1e-5


def _arrays(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  return draw(B, T, N, H), draw(B, T, K, H), draw(B, T, K, H)


def _softmax(scores):
  weights = np.exp(scores - scores.max())
  return weights / weights.sum()


def _in_chunks(x):
  padded = np.pad(x, ((0, 0), (0, -T % CHUNK), *((0, 0),) * (x.ndim - 2)))
  return jnp.asarray(padded.reshape(B, -1, CHUNK, *x.shape[2:]))


def _causal(q, k, v, make, late=0):
  """`late` > 0 shows a query chunks that are not over yet: the usual mistake."""
  real = _in_chunks(np.ones((B, T), bool))
  sums = make(_in_chunks(k), _in_chunks(v), real)
  sums = Sums(*(x[:, late:] for x in jax.tree.leaves(sums)))
  mask = masks.causal(B, T, pattern=Window(WINDOW))
  return linformer.attend(
    *map(jnp.asarray, (q, k, v)), mask, sums, CHUNK, None, scale=SCALE, softcap=None
  )


def _static(keys, values):
  return lambda k, v, real: linformer.static_sums(k, v, real, keys, values)


def _by_hand(q, k, v, weights_of):
  """`weights_of(b, j)` are those of chunk j for keys and for values, [CHUNK, R] each."""
  y = np.zeros(q.shape)
  for b, t, n in np.ndindex(q.shape[:3]):
    keys = [k[b, s, n // 2] for s in range(max(0, t - WINDOW + 1), t + 1)]
    values = [v[b, s, n // 2] for s in range(max(0, t - WINDOW + 1), t + 1)]
    for j in range(t // CHUNK):
      now, (of_keys, of_values) = slice(j * CHUNK, (j + 1) * CHUNK), weights_of(b, j)
      keys += list(of_keys.T @ k[b, now, n // 2])
      values += list(of_values.T @ v[b, now, n // 2])
    shares = _softmax(SCALE * np.asarray(keys, np.float64) @ q[b, t, n])
    y[b, t, n] = shares @ np.asarray(values, np.float64)
  return y


def test_static_sums():
  q, k, v = _arrays()
  rng = np.random.default_rng(2)
  weights = [rng.standard_normal((CHUNK, R)).astype(np.float32) for _ in range(2)]
  y = _causal(q, k, v, _static(*weights))
  np.testing.assert_allclose(y, _by_hand(q, k, v, lambda b, j: weights), atol=FLOAT32)


def test_dynamic_sums():
  q, k, v = _arrays()
  logits = 3 * np.random.default_rng(2).standard_normal((B, T, R)).astype(np.float32)
  y = _causal(q, k, v, lambda *new: linformer.dynamic_sums(*new, _in_chunks(logits)))

  def weights_of(b, j):
    w = np.exp(logits[b, j * CHUNK : (j + 1) * CHUNK].astype(np.float64))
    return (w / w.sum(0),) * 2

  np.testing.assert_allclose(y, _by_hand(q, k, v, weights_of), atol=FLOAT32)


def test_gradients_are_those_of_finite_differences():
  q, k, v = (x[:1, :, :2] for x in _arrays())
  k, v = k[:, :, :1], v[:, :, :1]
  logits = np.random.default_rng(2).standard_normal((1, T, R)).astype(np.float32)
  cut = lambda x: jnp.pad(x, ((0, 0), (0, -T % CHUNK), *((0, 0),) * (x.ndim - 2))).reshape(
    1, -1, CHUNK, *x.shape[2:]
  )
  real = cut(jnp.ones((1, T), jnp.int8)) > 0
  mask = masks.causal(1, T, pattern=Window(WINDOW))

  @jax.jit
  def loss(q, k, v, logits):
    sums = linformer.dynamic_sums(cut(k), cut(v), real, cut(logits))
    y = linformer.attend(q, k, v, mask, sums, CHUNK, None, scale=SCALE, softcap=None)
    return jnp.sum(jnp.sin(3 * y))

  arrays = tuple(map(jnp.asarray, (q, k, v, logits)))
  jax.test_util.check_grads(loss, arrays, order=1, modes=['rev'], atol=0.02, rtol=0.02)


def test_sums_of_every_token_by_itself_are_dense_attention():
  q, k, v = _arrays()
  each = np.eye(CHUNK, dtype=np.float32)
  sums = _static(each, each)(_in_chunks(k), _in_chunks(v), _in_chunks(np.ones((B, T), bool)))
  # A window of one chunk has tokens of the chunk before as well, so each row is cut to its chunk.
  position = np.arange(T)
  segments = jnp.asarray(np.broadcast_to(position // CHUNK, (B, T)), jnp.int32)
  mask = masks.packed(jnp.asarray(np.broadcast_to(position, (B, T)), jnp.int32), segments)
  y = linformer.attend(
    *map(jnp.asarray, (q, k, v)), mask, sums, CHUNK, None, scale=SCALE, softcap=None
  )
  for b, t, n in np.ndindex(B, T, N):
    shares = _softmax(SCALE * k[b, : t + 1, n // 2].astype(np.float64) @ q[b, t, n])
    np.testing.assert_allclose(y[b, t, n], shares @ v[b, : t + 1, n // 2], atol=FLOAT32)


def _leaks(attend) -> bool:
  """Whether other tokens after position 9 change what the tokens up to it find."""
  (q, k, v), (_, k2, v2) = _arrays(), _arrays(1)
  join = lambda a, b: np.concatenate([a[:, :10], b[:, 10:]], 1)
  y, other = attend(q, k, v), attend(q, join(k, k2), join(v, v2))
  assert np.abs(np.asarray(y[:, 10:] - other[:, 10:])).max() > 0.01
  return bool(np.any(np.asarray(y[:, :10]) != np.asarray(other[:, :10])))


def test_the_causal_form_sees_no_future_and_the_test_would_tell():
  weights = [np.full((CHUNK, R), 0.5, np.float32)] * 2
  causal = lambda q, k, v, **more: _causal(q, k, v, _static(*weights), **more)
  assert not _leaks(causal)
  assert _leaks(lambda q, k, v: causal(q, k, v, late=1))  # the chunk of the query itself
  assert _leaks(lambda q, k, v: _published(q, k, v, np.full(B, T)))


def _published(q, k, v, lengths):
  rng = np.random.default_rng(2)
  weights = [rng.standard_normal((T, 5)).astype(np.float32) for _ in range(2)]
  return linformer.published(*map(jnp.asarray, (q, k, v, *weights, lengths)), scale=SCALE)


def test_the_published_form_and_its_padding():
  q, k, v = _arrays()
  lengths = np.array([T, 13])
  y = _published(q, k, v, lengths)
  rng = np.random.default_rng(2)
  of_keys, of_values = (rng.standard_normal((T, 5)) for _ in range(2))
  for b, t, n in np.ndindex(B, T, N):
    real = slice(0, lengths[b])
    keys, values = of_keys[real].T @ k[b, real, n // 2], of_values[real].T @ v[b, real, n // 2]
    expected = _softmax(SCALE * keys @ q[b, t, n]) @ values
    np.testing.assert_allclose(y[b, t, n], expected, atol=5 * FLOAT32)
  k[1, 13:], v[1, 13:] = 9.0, 9.0
  np.testing.assert_array_equal(_published(q, k, v, lengths)[1], y[1])


def test_memory_grows_with_the_length_and_not_its_square():
  held = []
  for length in (512, 1024):
    mask = masks.causal(1, length, pattern=Window(64))
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def loss(q, k, v, mask=mask, shape=(1, length // 64, 64)):
      cut = lambda new: new.reshape(*shape, *new.shape[2:])
      real, weights = jnp.ones(shape, bool), jnp.ones((64, 4))
      sums = linformer.static_sums(cut(k), cut(v), real, weights, weights)
      y = linformer.attend(q, k, v, mask, sums, 64, None, scale=SCALE, softcap=None)
      return jnp.sum(y**2)

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    held.append(compiled.memory_analysis().temp_size_in_bytes)
  assert held[1] < 2.2 * held[0]


def test_shapes_are_checked():
  q, k, v = _arrays()
  with pytest.raises(ValueError, match='S'):
    linformer.published(
      *map(jnp.asarray, (q, k, v, np.ones((T + 1, 5)), np.ones((T, 5)), np.full(B, T))), scale=1.0
    )
