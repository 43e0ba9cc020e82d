"""Native attention of many queries against its definition in float64, and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import attention, masks
from ops.kernels import cpu
from ops.kernels.cpu import attend
from ops.masks import AttentionMask
from ops.patterns import First, Window

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or 'available')
instruction_sets = pytest.mark.parametrize('name', cpu.instruction_sets() or [None])

FLOAT32 = 5e-6  # scores of order ten have as many rounding errors as their terms
GRADIENT = 1e-5  # relative to the largest
BFLOAT16 = 2**-7
SCALE = 0.3
NOWHERE = np.iinfo(np.int32).max  # the position of a slot without a key

STATIC = ('scale', 'softcap', 'instruction_set', 'threads')
run = jax.jit(attend.prefill, static_argnames=STATIC)


def _ranges(starts, length):
  return jnp.asarray(np.asarray(starts)[:, None] + np.arange(length), jnp.int32)


def _documents(pattern=None):
  """Rows of documents of odd lengths, of which some end within a span of keys."""
  positions, segments = [], []
  for lengths in ((150, 3, 120), (17, 200, 56)):
    positions.append(np.concatenate([np.arange(n) for n in lengths]))
    segments.append(np.repeat(np.arange(len(lengths)), lengths))
  return masks.packed(
    *(jnp.asarray(np.stack(a), jnp.int32) for a in (positions, segments)), pattern=pattern
  )


def _shuffled(starts, length, *, holes):
  """Slots in any order, of which some hold no key."""
  rng = np.random.default_rng(0)
  positions = np.stack([rng.permutation(length) + start for start in starts])
  return jnp.asarray(np.where(rng.random(positions.shape) < holes, NOWHERE, positions), jnp.int32)


# name -> mask of two rows
MASKS = {
  'causal': masks.causal(2, 131),
  'a window': masks.causal(2, 300, pattern=Window(33)),
  'a window of one': masks.causal(2, 40, pattern=Window(1)),
  'a window and the first': masks.causal(2, 400, pattern=Window(33) | First(5)),
  'documents': _documents(),
  'documents in windows, and their first': _documents(Window(20) | First(2)),
  'rows over a cache': masks.over_cache(_ranges([0, 333], 21), 390),
  'a window over a cache': masks.over_cache(
    _ranges([3, 290], 70), 390, pattern=Window(50) | First(1)
  ),
  'slots in any order': AttentionMask(_ranges([5, 90], 50), _shuffled([0, 0], 200, holes=0.3)),
  'windows of slots': AttentionMask(
    _ranges([5, 90], 50), _shuffled([0, 9], 200, holes=0.3), pattern=Window(9) | First(3)
  ),
  'queries without keys': AttentionMask(_ranges([0, -1], 30), _ranges([14, 40], 30)),
}
HEADS = {'one': (2, 2, 8), 'groups': (6, 2, 20), 'many': (9, 1, 70)}  # N, K and H


def _arrays(mask, heads=(4, 2, 16), dtype=jnp.float32):
  (batch, queries), keys = mask.q_positions_BT.shape, mask.k_positions_BS.shape[1]
  n, k, h = heads
  rng = np.random.default_rng((queries, keys, *heads))
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  sinks = jnp.asarray(rng.standard_normal(n), jnp.float32)
  return draw(batch, queries, n, h), draw(batch, keys, k, h), draw(batch, keys, k, h), sinks


def _definition(q, k, v, mask, sinks=None, softcap=None):
  """The softmax by its definition, in float64, and the logarithms of its sums."""
  q, k, v = (np.asarray(jnp.asarray(a, jnp.float32), np.float64) for a in (q, k, v))
  groups = q.shape[2] // k.shape[2]
  k, v = (np.repeat(a, groups, axis=2) for a in (k, v))
  scores = SCALE * np.einsum('btnh,bsnh->bnts', q, k)
  if softcap is not None:
    scores = softcap * np.tanh(scores / softcap)
  weights = np.where(np.asarray(mask.dense())[:, None], np.exp(scores), 0.0)
  total = weights.sum(-1) + (0 if sinks is None else np.exp(np.asarray(sinks))[None, :, None])
  weights = weights / np.where(total == 0, 1, total)[..., None]
  logs = np.where(total == 0, -5e29, np.log(np.where(total == 0, 1, total)))
  return np.einsum('bnts,bsnh->btnh', weights, v), logs


def _check(found, expected, bound=FLOAT32):
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(np.asarray(one, np.float64), other, atol=bound, rtol=bound)


@instruction_sets
@pytest.mark.parametrize('mask', MASKS)
def test_masks(mask, name):
  mask = MASKS[mask]
  for softcap, sunk in ((None, False), (0.8, True)):
    *arrays, sinks = _arrays(mask)
    sinks = sinks if sunk else None
    options = {'softcap': softcap, 'instruction_set': name}
    found = run(*arrays, mask, sinks, scale=SCALE, **options)
    _check(found, _definition(*arrays, mask, sinks, softcap))


@instruction_sets
@pytest.mark.parametrize('heads', HEADS)
def test_heads(heads, name):
  mask = MASKS['a window and the first']
  *arrays, sinks = _arrays(mask, HEADS[heads])
  found = run(*arrays, mask, sinks, scale=SCALE, softcap=None, instruction_set=name)
  _check(found, _definition(*arrays, mask, sinks))


@instruction_sets
def test_a_wide_head_and_many_that_share(name):
  mask = masks.causal(1, 29)
  for heads in ((1, 1, 300), (attend.MOST_SHARING, 1, 6)):
    *arrays, _ = _arrays(mask, heads)
    found = run(*arrays, mask, None, scale=SCALE, softcap=None, instruction_set=name)
    _check(found, _definition(*arrays, mask), 2 * FLOAT32)


@instruction_sets
def test_bfloat16_and_int8(name):
  mask = MASKS['rows over a cache']
  q, k, v, _ = _arrays(mask, (6, 2, 40))
  options = {'scale': SCALE, 'softcap': None, 'instruction_set': name}
  small = [a.astype(jnp.bfloat16) for a in (q, k, v)]
  y, logs = run(*small, mask, None, **options)
  expected = _definition(*small, mask)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(logs, expected[1], atol=FLOAT32, rtol=FLOAT32)
  np.testing.assert_allclose(np.asarray(y, np.float64), expected[0], atol=BFLOAT16, rtol=BFLOAT16)
  _check(run(q, *small[1:], mask, None, **options), _definition(q, *small[1:], mask))
  scales = [(jnp.abs(a).max(-1) / 127).astype(jnp.float16) for a in (k, v)]
  wide = [scale.astype(jnp.float32)[..., None] for scale in scales]
  codes = [jnp.round(a / scale).astype(jnp.int8) for a, scale in zip((k, v), wide)]
  found = run(q, *codes, mask, None, scales_BSK=tuple(scales), **options)
  rounded = [a.astype(jnp.float32) * scale for a, scale in zip(codes, wide)]
  _check(found, _definition(q, *rounded, mask))


def test_a_soft_cap_is_exact_where_scores_are_small():
  mask = masks.causal(1, 20)
  *arrays, _ = _arrays(mask)
  capped, plain = (run(*arrays, mask, None, scale=1e-3, softcap=cap) for cap in (100.0, None))
  np.testing.assert_allclose(capped[1], plain[1], atol=1e-6)


def test_scores_of_any_size():
  mask = masks.causal(1, 50)
  *arrays, _ = _arrays(mask)
  y, logs = run(*arrays, mask, None, scale=1e6, softcap=None)
  assert np.isfinite(y).all() and np.isfinite(logs).all()
  np.testing.assert_allclose(y[:, 0], np.repeat(arrays[2][:, 0], 2, axis=1), atol=FLOAT32)


def test_neither_threads_nor_chunks_change_a_bit():
  keys = 700
  mask = masks.over_cache(_ranges([0, 50], 600), keys)
  *arrays, sinks = _arrays(mask, (6, 2, 24))
  whole = run(*arrays, mask, sinks, scale=SCALE, softcap=None, threads=1)[0]
  for threads in (2, 5):
    shared = run(*arrays, mask, sinks, scale=SCALE, softcap=None, threads=threads)[0]
    np.testing.assert_array_equal(shared, whole)
  q, k, v = arrays
  for begin, end in ((0, 9), (9, 211), (211, 600)):
    part = masks.over_cache(mask.q_positions_BT[:, begin:end], keys)
    found = run(q[:, begin:end], k, v, part, sinks, scale=SCALE, softcap=None)[0]
    np.testing.assert_array_equal(found, whole[:, begin:end])


def test_later_tokens_change_nothing():
  mask = masks.causal(1, 200)
  q, k, v, _ = _arrays(mask)
  before = run(q, k, v, mask, None, scale=SCALE, softcap=None)[0]
  later = [a.at[:, 111:].set(-3.0) for a in (q, k, v)]
  after = run(*later, mask, None, scale=SCALE, softcap=None)[0]
  np.testing.assert_array_equal(before[:, :111], after[:, :111])
  assert np.abs(before[:, 111:] - after[:, 111:]).max() > 0


def test_blocks_that_no_query_sees_are_never_read():
  mask = masks.over_cache(_ranges([300], 20), 1024, pattern=Window(30) | First(2))
  q, k, v, _ = _arrays(mask)
  expected = run(q, k, v, mask, None, scale=SCALE, softcap=None)
  k, v = (a.at[:, 384:].set(jnp.nan).at[:, 128:256].set(jnp.nan) for a in (k, v))
  _check(run(q, k, v, mask, None, scale=SCALE, softcap=None), expected, 0)


def test_what_is_not_finite_stays_so():
  mask = masks.causal(1, 40)
  q, k, v, _ = _arrays(mask)
  for broken in ((q.at[0, 20, 3].set(jnp.nan), k, v), (q, k.at[0, 20, 1].set(jnp.nan), v)):
    y, _ = run(*broken, mask, None, scale=SCALE, softcap=None)
    assert np.isnan(y[0, 20, 3]).all() and np.isfinite(y[0, :20]).all()


# Below and above the number of queries from which gradients are those of blocks.
GRADIENTS = {
  'short': (masks.causal(2, 37, pattern=Window(11)), None, False),
  'causal': (masks.causal(2, 203), None, False),
  'documents': (_documents(), 0.9, True),
  'over a cache': (masks.over_cache(_ranges([0, 61], 150), 230, pattern=Window(40)), None, True),
}


@pytest.mark.parametrize('name', GRADIENTS)
def test_gradients_are_those_of_the_readable_form(name):
  mask, softcap, sunk = GRADIENTS[name]
  q, k, v, sinks = _arrays(mask)

  def of(impl, q, k, v, sinks):
    options = {'scale': SCALE, 'softcap': softcap, 'sinks_N': sinks if sunk else None}
    return attention.attention(q, k, v, mask, impl=impl, **options)

  @functools.partial(jax.jit, static_argnums=0)
  def both(impl):
    y, pull = jax.vjp(functools.partial(of, impl), q, k, v, sinks)
    return y, pull(jnp.cos(y))

  expected = both('reference')
  for impl in ('native', 'auto'):
    for one, other in zip(*map(jax.tree.leaves, (both(impl), expected)), strict=True):
      np.testing.assert_allclose(one, other, atol=GRADIENT * float(jnp.abs(other).max()))


def test_it_is_picked_on_a_cpu_and_holds_no_scores():
  mask = masks.causal(1, 1024)
  q, k = (jax.ShapeDtypeStruct((1, 1024, heads, 16), jnp.float32) for heads in (4, 2))
  assert attention.pick(q, k, mask, platform='cpu') == 'native'
  assert attention.pick(q, k, mask, platform='tpu') == 'reference'
  loss = lambda q, k, v: jnp.sum(attention.attention(q, k, v, mask, scale=SCALE) ** 2)
  lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k)
  assert cpu.PREFILL in lowered.as_text()
  scores = 4 * 1024 * 1024 * 4
  assert lowered.compile().memory_analysis().temp_size_in_bytes < scores / 4


def test_what_does_not_fit_is_refused():
  mask = masks.causal(1, 20)
  q, k, v, _ = _arrays(mask)
  wrong = AttentionMask(*(mask.q_positions_BT,) * 3, mask.k_positions_BS[:, :5])
  with pytest.raises(jax.errors.JaxRuntimeError, match=r'segments are \[B, T\] and \[B, S\]'):
    run(q, k, v, wrong, None, scale=SCALE, softcap=None)
  with pytest.raises(jax.errors.JaxRuntimeError, match='none for floats'):
    run(
      q,
      k,
      v,
      mask,
      None,
      scale=SCALE,
      softcap=None,
      scales_BSK=(jnp.ones((1, 20, 2), jnp.float16),) * 2,
    )
