"""Attention by sparse patterns, against dense attention under the same mask, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import attention, blocked, layouts, masks, patterns

B, N, K, H = 2, 4, 2, 8
SCALE = 0.3
FLOAT32 = 1e-5
TEXTS = [
  'window3x4',
  'window3+global6',
  'window4+random4x2',
  'window2x3+window3+first1+every5',
]


def _arrays(length, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return draw(B, length, N, H), draw(B, length, K, H), draw(B, length, K, H), draw(N)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _with_gradients(impl, softcap, q, k, v, mask, sinks):
  fn = lambda q, k, v, sinks: attention.attention(
    q, k, v, mask, scale=SCALE, softcap=softcap, sinks_N=sinks, impl=impl
  )
  y, pull = jax.vjp(fn, q, k, v, sinks)
  return y, pull(jnp.cos(y))


@pytest.mark.parametrize('text', TEXTS)
def test_results_and_gradients_are_those_of_dense_attention(text):
  length = 37
  mask = masks.causal(B, length, pattern=patterns.parse(text))
  q, k, v, sinks = _arrays(length)
  found = _with_gradients('blocked', None, q, k, v, mask, sinks)
  expected = _with_gradients('reference', None, q, k, v, mask, sinks)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=FLOAT32 * float(jnp.abs(b).max()))


def test_parts_are_computed_natively_where_nothing_else_is_asked_for():
  length, pattern = 150, 'window20+every7+first3'  # long enough to be picked
  mask = masks.causal(B, length, pattern=patterns.parse(pattern))
  q, k, v, sinks = _arrays(length)
  shapes = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, k))
  assert attention.pick(*shapes, mask, platform='cpu') == 'blocked'
  found = _with_gradients('auto', None, q, k, v, mask, sinks)
  expected = _with_gradients('reference', None, q, k, v, mask, sinks)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=FLOAT32 * float(jnp.abs(b).max()))


def test_queries_that_see_nothing_and_a_soft_cap():
  mask = masks.causal(B, 21, pattern=patterns.parse('every4'))
  q, k, v, _ = _arrays(21)
  found = _with_gradients('blocked', 0.7, q, k, v, mask, None)
  expected = _with_gradients('reference', 0.7, q, k, v, mask, None)
  assert not np.asarray(found[0][:, :3]).any()
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=FLOAT32)


@pytest.mark.parametrize('text', ['window3x4', 'window4+first2+every5'])
def test_documents_that_are_packed_are_computed_as_they_lie(text):
  positions = jnp.asarray([[*range(15), *range(8)], [*range(3), *range(20)]], jnp.int32)
  segments = jnp.asarray([[0] * 15 + [1] * 8, [0] * 3 + [1] * 20], jnp.int32)
  mask = masks.packed(positions, segments, pattern=patterns.parse(text))
  q, k, v, _ = _arrays(23)
  found = _with_gradients('blocked', None, q, k, v, mask, None)
  expected = _with_gradients('reference', None, q, k, v, mask, None)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=FLOAT32)


@pytest.mark.parametrize('text', TEXTS)
def test_the_effective_mask_is_the_picture(text):
  """With equal scores and one-hot values, a result is positive where a key is seen."""
  length, pattern = 24, patterns.parse(text)
  q = jnp.zeros((1, length, 1, length))
  v = jnp.eye(length)[None, :, None]
  y = attention.attention(
    q, q, v, masks.causal(1, length, pattern=pattern), scale=1.0, impl='blocked'
  )
  drawn = [''.join('.#'[int(one > 0)] for one in row) for row in np.asarray(y[0, :, 0])]
  assert drawn == pattern.picture(length)


@pytest.mark.parametrize('text', TEXTS)
def test_what_follows_changes_nothing(text):
  mask = masks.causal(B, 37, pattern=patterns.parse(text))
  (q, k, v, _), (_, k2, v2, _) = _arrays(37), _arrays(37, seed=1)
  join = lambda a, b: jnp.concatenate([a[:, :20], b[:, 20:]], 1)
  attend = jax.jit(functools.partial(attention.attention, scale=SCALE, impl='blocked'))
  y, other = (attend(q, *kv, mask) for kv in ((k, v), (join(k, k2), join(v, v2))))
  np.testing.assert_array_equal(y[:, :20], other[:, :20])
  assert np.abs(np.asarray(y[:, 20:] - other[:, 20:])).max() > 0.1


@pytest.mark.parametrize('text', ['window64', 'window16x8+first4', 'window64+random64x2'])
@pytest.mark.quick(text=('window16x8+first4',))
def test_cost_grows_with_the_length_and_not_its_square(text):
  """The memory of a program, and the blocks that its loops visit, with gradients."""
  held, visited = [], []
  for length in (512, 1024):
    mask = masks.causal(1, length, pattern=patterns.parse(text))
    q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    call = functools.partial(layouts.attention, sinks_N=None, scale=SCALE, softcap=None)
    loss = lambda q, k, v, call=call, mask=mask: jnp.sum(call(q, k, v, mask) ** 2)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile()
    held.append(compiled.memory_analysis().temp_size_in_bytes)
    visited.append(_visited(mask))
  assert held[1] < 2.2 * held[0]
  assert visited[1] < 2.5 * visited[0]  # the first queries have fewer keys; dense: 4
  assert visited[1] < 0.35 * 1024 * 1024  # pairs that are computed; dense causal: 0.5 of all


def _visited(mask) -> int:
  """The pairs of queries and keys in all blocks that are visited."""
  pairs = 0

  def count(q, k, v, mask, sinks, *, sizes=None, **_):
    nonlocal pairs
    del sinks
    seen = mask.pattern.seen(k.shape[1])
    default = next((s for most, s in blocked.SIZES.items() if seen <= most), blocked.LARGEST)
    rows, columns = sizes or default
    columns = min(columns, k.shape[1])
    keys = blocked._Keys.of(k, v, (mask.k_positions_BS, None), columns)
    _, (positions, _) = blocked._query_blocks(
      jnp.zeros((q.shape[0], 1, 1, q.shape[1], 1)), (mask.q_positions_BT, None), rows
    )
    for block in positions:
      pairs += q.shape[0] * rows * columns * int(keys.seen(mask.pattern, (block, None))[1])
    return jnp.zeros(q.shape), jnp.zeros(q.shape[:3])

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(blocked, 'partial', count)
    arrays = [jnp.zeros((1, mask.q_positions_BT.shape[1], 1, 1))] * 3
    layouts.attention(*arrays, mask, None, scale=1.0, softcap=None)
  return pairs
