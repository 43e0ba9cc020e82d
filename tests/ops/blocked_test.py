"""Attention in blocks, against its definition in float64 and against gradients of the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import attention, blocked, masks
from ops.kernels import cpu
from ops.kernels.cpu import attend
from ops.masks import AttentionMask
from ops.patterns import Window

FLOAT32 = 2e-6  # sums of some dozen terms of order one, relative to the largest result
BFLOAT16 = 2**-7
SCALE, SIZES = 0.3, (8, 16)  # many blocks, the last ones filled up
B, N, K, H = 2, 6, 3, 8


def _sorted(*shape):
  return jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, shape)), jnp.int32)


def _ranges(starts, length):
  return jnp.asarray(np.asarray(starts)[:, None] + np.arange(length), jnp.int32)


def _any_order(seed, length):
  draw = np.random.default_rng(seed).permutation
  return jnp.asarray(np.stack([draw(length), draw(length)]), jnp.int32)


MASKS = {  # name -> (mask, queries, keys)
  'causal': (masks.causal(B, 37), 37, 37),
  'a window': (masks.causal(B, 37, pattern=Window(11)), 37, 37),
  'documents': (masks.packed(_ranges([0, 0], 37), _sorted(B, 37)), 37, 37),
  'documents in windows': (
    masks.packed(_ranges([0, 0], 37), _sorted(B, 37), pattern=Window(5)),
    37,
    37,
  ),
  'over a cache': (masks.over_cache(_ranges([3, 40], 10), 70), 10, 70),
  'a window over a cache': (masks.over_cache(_ranges([3, 40], 10), 70, pattern=Window(9)), 10, 70),
  'slots in any order': (AttentionMask(_ranges([5, 30], 20), _any_order(0, 50)), 20, 50),
  'queries without keys': (AttentionMask(_ranges([0, 0], 9), _ranges([4, 20], 9)), 9, 9),
}
TRAITS = {'plain': (None, False), 'capped, with sinks': (0.9, True)}
cases = pytest.mark.parametrize('name', MASKS)


def _arrays(queries, keys, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  return draw(B, queries, N, H), draw(B, keys, K, H), draw(B, keys, K, H), draw(N)


def _definition(q, k, v, mask, sinks, softcap):
  """The softmax by its definition, in float64; a row that sees nothing gives zeros."""
  q, k, v = (np.asarray(jnp.asarray(a, jnp.float32), np.float64) for a in (q, k, v))
  k, v = (np.repeat(a, N // K, axis=2) for a in (k, v))
  scores = SCALE * np.einsum('btnh,bsnh->bnts', q, k)
  if softcap is not None:
    scores = softcap * np.tanh(scores / softcap)
  weights = np.where(np.asarray(mask.dense())[:, None], np.exp(scores), 0.0)
  total = weights.sum(-1) + (0 if sinks is None else np.exp(np.asarray(sinks))[None, :, None])
  return np.einsum('bnts,bsnh->btnh', weights / np.where(total == 0, 1, total)[..., None], v)


def _blocked(q, k, v, mask, sinks, softcap):
  return blocked.partial(q, k, v, mask, sinks, scale=SCALE, softcap=softcap, sizes=SIZES)[0]


def _reference(q, k, v, mask, sinks, softcap):
  traits = {'scale': SCALE, 'softcap': softcap, 'sinks_N': sinks}
  return attention.attention(q, k, v, mask, impl='reference', **traits)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _with_gradients(fn, softcap, q, k, v, mask, sinks):
  y, pull = jax.vjp(lambda q, k, v, sinks: fn(q, k, v, mask, sinks, softcap), q, k, v, sinks)
  return y, pull(jnp.cos(y))


@pytest.mark.parametrize('traits', TRAITS)
@cases
@pytest.mark.quick(traits=('capped, with sinks',))
def test_results_and_gradients(name, traits):
  mask, queries, keys = MASKS[name]
  softcap, sunk = TRAITS[traits]
  q, k, v, sinks = _arrays(queries, keys)
  sinks = sinks if sunk else None
  y, found = _with_gradients(_blocked, softcap, q, k, v, mask, sinks)
  np.testing.assert_allclose(y, _definition(q, k, v, mask, sinks, softcap), atol=FLOAT32)
  _, expected = _with_gradients(_reference, softcap, q, k, v, mask, sinks)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, atol=5 * FLOAT32 * float(jnp.abs(b).max()))


def test_bfloat16():
  mask, queries, keys = MASKS['a window']
  q, k, v, _ = _arrays(queries, keys, jnp.bfloat16)
  y, gradients = _with_gradients(_blocked, None, q, k, v, mask, None)
  expected = _definition(q, k, v, mask, None, None)
  assert {a.dtype for a in (y, *gradients[:3])} == {jnp.dtype(jnp.bfloat16)}
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=BFLOAT16)


@cases
def test_no_block_is_left_out(name):
  mask, queries, keys = MASKS[name]
  k, v = _arrays(queries, keys)[1:3]
  parts = blocked._Keys.of(k, v, (mask.k_positions_BS, mask.k_segments_BS), SIZES[1])
  positions_BT = np.asarray(mask.q_positions_BT)
  seen_BTS = np.asarray(mask.dense())
  for start in range(0, queries, SIZES[0]):
    rows = slice(start, start + SIZES[0])
    found, count = parts.seen(mask.pattern, (jnp.asarray(positions_BT[:, rows]), None))
    blocks = {int(s) // SIZES[1] for s in np.nonzero(seen_BTS[:, rows].any((0, 1)))[0]}
    assert blocks <= set(np.asarray(found[:count]).tolist())


@pytest.mark.parametrize('window, most', [(None, 3), (10, 2)])
def test_blocks_that_no_query_sees_are_skipped(window, most):
  mask = masks.causal(1, 80, pattern=window and Window(window))
  parts = blocked._Keys.of(*(jnp.zeros((1, 80, 1, 4)),) * 2, (mask.k_positions_BS, None), 16)
  found, count = parts.seen(mask.pattern, (mask.q_positions_BT[:, 32:48], None))
  assert found[:count].tolist() == [0, 1, 2][-most:]


def test_it_holds_no_scores():
  q, k = (jax.ShapeDtypeStruct((1, 1024, heads, 16), jnp.float32) for heads in (4, 2))
  mask = masks.causal(1, 1024)
  held = {}
  for impl in ('blocked', 'reference'):
    call = functools.partial(attention.attention, scale=SCALE, impl=impl)
    loss = lambda q, k, v, call=call: jnp.sum(call(q, k, v, mask) ** 2)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).compile()
    held[impl] = compiled.memory_analysis().temp_size_in_bytes
  scores = 4 * 1024 * 1024 * 4
  assert held['blocked'] < scores / 4 < scores < held['reference']


def test_it_is_picked_for_many_queries(monkeypatch):
  q, k = (jax.ShapeDtypeStruct((1, 128, heads, 16), jnp.float32) for heads in (4, 2))
  mask = masks.causal(1, 128)
  native = {p: attention.pick(q, k, mask, platform=p) for p in ('cpu', 'gpu', 'tpu')}
  assert native['cpu'] == 'native' or not cpu.available()
  monkeypatch.setattr(attend, 'obstacle', lambda *_: 'there is no native library')
  picks = {p: attention.pick(q, k, mask, platform=p) for p in ('cpu', 'gpu', 'tpu')}
  assert picks == {'cpu': 'blocked', 'gpu': 'reference', 'tpu': 'reference'}
  long = [jax.ShapeDtypeStruct((1, 4096, *a.shape[2:]), a.dtype) for a in (q, k)]
  assert attention.pick(*long, masks.causal(1, 4096), platform='tpu') == 'blocked'
  few = [jax.ShapeDtypeStruct((1, 127, *a.shape[2:]), a.dtype) for a in (q, k)]
  assert attention.pick(*few, masks.causal(1, 127), platform='cpu') == 'reference'
