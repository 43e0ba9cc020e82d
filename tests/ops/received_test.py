"""Attention that keys receive, against float64 numpy, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import masks, received
from ops.masks import AttentionMask
from ops.patterns import Window

B, N, K, H, SCALE = 2, 6, 2, 8, 0.7
ATOL = 1e-5  # float32 sums of up to a hundred weights


def _by_hand(q, k, seen, counted, softcap, sinks):
  found = np.zeros((len(q), k.shape[2], k.shape[1]))
  for b, t, n in np.ndindex(*q.shape[:3]):
    if not counted[b, t] or not seen[b, t].any():
      continue
    head = n * k.shape[2] // q.shape[2]
    scores = k[b, :, head].astype(np.float64) @ q[b, t, n] * SCALE
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    weights = np.where(seen[b, t], np.exp(scores), 0)
    total = weights.sum() + (0 if sinks is None else np.exp(sinks[b, n]))
    found[b, head] += weights / total / (q.shape[2] // k.shape[2])
  return found


@pytest.mark.parametrize('length', [1, 5, 2 * received.BLOCK + 3])
@pytest.mark.parametrize(
  'pattern, softcap, with_sinks', [(None, None, False), (Window(7), 2.0, True)]
)
def test_it_equals_the_weights_of_attention_summed(rng, length, pattern, softcap, with_sinks):
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  q, k, slots = draw(B, length, N, H), draw(B, length + 4, K, H), length + 4
  sinks = draw(B, N) if with_sinks else None
  positions_BT = jnp.asarray(np.arange(length)[None] + [[0], [3]])
  k_positions_BS = jnp.asarray(np.stack([rng.permutation(slots) for _ in range(B)]))
  counted = rng.random((B, length)) < 0.7
  mask = AttentionMask(positions_BT, k_positions_BS, pattern=pattern)
  found = received.received(
    *map(jnp.asarray, (q, k)), mask, counted, scale=SCALE, softcap=softcap, sinks_BN=sinks
  )
  expected = _by_hand(q, k, np.asarray(mask.dense()), counted, softcap, sinks)
  np.testing.assert_allclose(found, expected, atol=ATOL)


def test_a_query_that_sees_nothing_gives_nothing():
  mask = AttentionMask(jnp.zeros((1, 1), jnp.int32), jnp.full((1, 3), 9))
  x = jnp.ones((1, 3, 1, 4))
  found = received.received(x[:, :1], x, mask, jnp.ones((1, 1), bool), scale=1.0)
  np.testing.assert_array_equal(found, 0)


def test_the_memory_grows_with_the_keys_alone():
  def held(length):
    shape = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
    run = functools.partial(received.received, scale=1.0)
    lowered = jax.jit(
      lambda q, k: run(q, k, masks.causal(1, length), jnp.ones((1, length), bool))
    ).lower(shape, shape)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert held(2048) <= 2.2 * held(1024)
  assert held(2048) < 4 * 2048 * 2048 * 4 / 4
