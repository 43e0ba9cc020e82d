"""Native attention against its definition in float64: instruction sets, shapes, masks, threads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import attention, masks
from ops.kernels import cpu
from ops.kernels.cpu import attend
from ops.masks import AttentionMask
from ops.patterns import Window

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or 'available')
instruction_sets = pytest.mark.parametrize('name', cpu.instruction_sets() or [None])

FLOAT32 = 3e-6  # sums of some hundred terms of order one
BFLOAT16 = 2**-7  # of the result, which is of order one
SCALE = 0.3
# (batch, queries, heads, kv_heads, width, keys)
SHAPES = [(1, 1, 9, 3, 64, 200), (2, 3, 6, 3, 8, 11), (2, 8, 5, 1, 21, 130), (3, 1, 4, 4, 70, 64)]
run = jax.jit(attend.attend, static_argnames=('scale', 'softcap', 'instruction_set', 'threads'))


def _arrays(shape, dtype=jnp.float32):
  batch, queries, heads, kv_heads, width, keys = shape
  rng = np.random.default_rng(shape)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  q = draw(batch, queries, heads, width)
  k, v = (draw(batch, keys, kv_heads, width) for _ in range(2))
  starts = rng.integers(0, keys - queries, (batch, 1))
  positions = jnp.asarray(starts + np.arange(queries), jnp.int32)
  return q, k, v, positions, jnp.asarray(rng.standard_normal(heads), jnp.float32)


def _definition(q, k, v, mask, sinks=None, softcap=None):
  """The softmax by its definition, in float64; a row that sees nothing gives zeros."""
  q, k, v = (np.asarray(jnp.asarray(a, jnp.float32), np.float64) for a in (q, k, v))
  groups = q.shape[2] // k.shape[2]
  k, v = (np.repeat(a, groups, axis=2) for a in (k, v))
  scores = SCALE * np.einsum('btnh,bsnh->bnts', q, k)
  if softcap is not None:
    scores = softcap * np.tanh(scores / softcap)
  weights = np.where(np.asarray(mask.dense())[:, None], np.exp(scores), 0.0)
  total = weights.sum(-1) + (0 if sinks is None else np.exp(np.asarray(sinks))[None, :, None])
  weights = weights / np.where(total == 0, 1, total)[..., None]
  return np.einsum('bnts,bsnh->btnh', weights, v)


def _check(actual, expected, dtype):
  assert actual.dtype == dtype
  bound = FLOAT32 if dtype == jnp.float32 else BFLOAT16
  np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=bound, rtol=bound)


@instruction_sets
@pytest.mark.parametrize(
  'shape, dtype', [*((s, jnp.float32) for s in SHAPES), *((s, jnp.bfloat16) for s in SHAPES[:2])]
)
def test_it_is_the_definition(shape, dtype, name):
  q, k, v, positions, sinks = _arrays(shape, dtype)
  for window, softcap, sunk in ((None, None, None), (7, None, sinks), (None, 0.8, sinks)):
    mask = masks.over_cache(positions, k.shape[1], pattern=window and Window(window))
    actual = run(q, k, v, mask, sunk, scale=SCALE, softcap=softcap, instruction_set=name)
    _check(actual, _definition(q, k, v, mask, sunk, softcap), dtype)


def _coded(x):
  """int8 codes with a scale for each token and head, and what they stand for."""
  scales = (jnp.abs(x).max(-1) / 127).astype(jnp.float16)
  wide = scales.astype(jnp.float32)[..., None]
  codes = jnp.round(x.astype(jnp.float32) / wide).astype(jnp.int8)
  return codes, scales, codes * wide


@instruction_sets
@pytest.mark.parametrize('shape', SHAPES)
def test_codes_are_read_as_they_are_stored(shape, name):
  q, k, v, positions, sinks = _arrays(shape)
  (k, k_scales, wide_k), (v, v_scales, wide_v) = _coded(k), _coded(v)
  mask = masks.over_cache(positions, k.shape[1], pattern=Window(7))
  for dtype in (jnp.float32, jnp.bfloat16):
    one, scales = q.astype(dtype), (k_scales, v_scales)
    options = {'scales_BSK': scales, 'scale': SCALE, 'softcap': 0.8, 'instruction_set': name}
    actual = run(one, k, v, mask, sinks, **options)
    _check(actual, _definition(one, wide_k, wide_v, mask, sinks, 0.8), dtype)


def test_attention_over_codes_widens_none_for_a_few_queries():
  q, k, v, positions, _ = _arrays((1, 1, 6, 3, 64, 4096))
  (k, k_scales, wide_k), (v, v_scales, wide_v) = _coded(k), _coded(v)
  mask = masks.over_cache(positions, k.shape[1])
  fn = jax.jit(functools.partial(attention.attention_over_codes, scale=SCALE))
  compiled = fn.lower(q, (k, v), (k_scales, v_scales), mask).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < k.nbytes
  found = fn(q, (k, v), (k_scales, v_scales), mask)
  _check(found, _definition(q, wide_k, wide_v, mask), jnp.float32)


def test_attention_over_codes_by_many_queries():
  q, k, v, positions, sinks = _arrays((2, 12, 4, 2, 8, 40))
  (k, k_scales, wide_k), (v, v_scales, wide_v) = _coded(k), _coded(v)
  mask = masks.over_cache(positions, k.shape[1])
  scores = {'scale': SCALE, 'softcap': 0.8, 'sinks_N': sinks}
  found = attention.attention_over_codes(q, (k, v), (k_scales, v_scales), mask, **scores)
  _check(found, _definition(q, wide_k, wide_v, mask, sinks, 0.8), jnp.float32)


def test_codes_without_scales_are_refused():
  q, k, v, positions, _ = _arrays(SHAPES[1])
  k, v = k.astype(jnp.int8), v.astype(jnp.int8)
  mask = masks.over_cache(positions, k.shape[1])
  with pytest.raises(jax.errors.JaxRuntimeError, match=r'scales are \[B, S, K\] for s8'):
    run(q, k, v, mask, None, scale=SCALE, softcap=None)


def test_queries_in_float32_over_a_cache_in_bfloat16():
  q, k, v, positions, _ = _arrays(SHAPES[0])
  mask = masks.over_cache(positions, k.shape[1])
  k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
  actual = run(q, k, v, mask, None, scale=SCALE, softcap=None)
  _check(actual, _definition(q, k, v, mask), jnp.float32)


def test_slots_in_any_order_and_queries_that_see_none():
  q, k, v, _, _ = _arrays((2, 2, 4, 2, 16, 90))
  rng = np.random.default_rng(0)
  k_positions = np.stack([rng.permutation(90), rng.permutation(90) + 50]).astype(np.int32)
  mask = AttentionMask(jnp.asarray([[3, 60], [10, 70]], jnp.int32), jnp.asarray(k_positions))
  actual = run(q, k, v, mask, None, scale=SCALE, softcap=None)
  _check(actual, _definition(q, k, v, mask), jnp.float32)
  assert not np.any(actual[1, 0])


def test_slots_past_the_query_are_never_read():
  q, k, v, _, _ = _arrays((1, 1, 4, 2, 16, 256))
  mask = masks.over_cache(jnp.asarray([[100]], jnp.int32), 256)
  expected = run(q, k, v, mask, None, scale=SCALE, softcap=None)
  k, v = (a.at[:, 101:].set(jnp.nan) for a in (k, v))
  np.testing.assert_array_equal(run(q, k, v, mask, None, scale=SCALE, softcap=None), expected)


@pytest.mark.parametrize('keys', [70, 2000])
def test_neither_threads_nor_other_rows_change_a_bit(keys):
  q, k, v, _, _ = _arrays((4, 1, 6, 2, 64, keys))
  positions = jnp.asarray([[keys - 1], [3], [keys // 2], [keys - 9]], jnp.int32)
  mask = masks.over_cache(positions, keys)
  alone = run(q, k, v, mask, None, scale=SCALE, softcap=None, threads=1)
  for threads in (2, 3, 8):
    shared = run(q, k, v, mask, None, scale=SCALE, softcap=None, threads=threads)
    np.testing.assert_array_equal(shared, alone)
  row = masks.over_cache(positions[2:3], keys)
  single = run(q[2:3], k[2:3], v[2:3], row, None, scale=SCALE, softcap=None)
  np.testing.assert_array_equal(single[0], alone[2])


def test_what_is_not_finite_stays_so():
  q, k, v, positions, _ = _arrays(SHAPES[0])
  mask = masks.over_cache(jnp.full_like(positions, 150), k.shape[1])
  for broken in ((q.at[0, 0, 4, 3].set(jnp.nan), k, v), (q, k.at[0, 7, 1].set(jnp.nan), v)):
    y = run(*broken, mask, None, scale=SCALE, softcap=None)
    assert not np.all(np.isfinite(y[0, 0, 3:6])) and np.all(np.isfinite(y[0, 0, :3]))


def test_gradients_in_both_directions_are_those_of_the_readable_form():
  q, k, v, positions, sinks = _arrays((2, 2, 4, 2, 16, 20))
  mask = masks.over_cache(positions, 20)

  def fn(impl, *arrays):
    return attention.attention(*arrays, mask, scale=SCALE, sinks_N=sinks, impl=impl)

  native, auto, reference = (
    functools.partial(fn, impl) for impl in ('native', 'auto', 'reference')
  )
  tangents = tuple(jnp.ones_like(a) for a in (q, k, v))
  for mine, theirs in zip(
    jax.jvp(native, (q, k, v), tangents), jax.jvp(reference, (q, k, v), tangents)
  ):
    np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=1e-5)
  pull = jax.jit(lambda f: jax.vjp(f, q, k, v)[1](jnp.ones_like(q)), static_argnums=0)
  for mine, theirs in zip(pull(auto), pull(reference)):
    np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=1e-5)


def test_it_is_picked_for_few_queries_on_a_cpu():
  q, k, v, positions, _ = _arrays(SHAPES[0])
  mask = masks.over_cache(positions, k.shape[1])
  assert attention.pick(q, k, mask, platform='cpu') == 'native'
  assert attention.pick(q, k, mask, platform='tpu') == 'reference'
  text = jax.jit(attention.attention, static_argnames='scale').lower(q, k, v, mask, scale=1.0)
  assert cpu.ATTENTION in text.as_text()
  assert 'float16' in attend.obstacle(q.astype(jnp.float16), k, v, mask)
  queries = jnp.zeros((1, 1, 481, 64))
  assert 'up to 480 query heads a key head, not 481' in attend.obstacle(
    queries, k[:, :, :1], v[:, :, :1], mask
  )
