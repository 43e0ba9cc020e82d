import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax._src.cudnn import fused_attention_stablehlo

from ops import attention, masks
from ops.kernels import cpu
from ops.masks import AttentionMask
from ops.patterns import Window

FLOAT32 = 2e-6  # sums of at most 64 products of order one
GRADIENT = 2e-5
BFLOAT16 = 2**-7  # weights and result are rounded to 8 bits each
SCALE = 0.3

attend = jax.jit(attention.attention, static_argnames=('scale', 'softcap', 'impl'))


def draw(rng, shape, dtype=jnp.float32):
  return jnp.asarray(rng.standard_normal(shape), dtype)


def qkv(rng, batch=2, queries=7, keys=7, heads=6, kv_heads=3, width=8, dtype=jnp.float32):
  """Draws queries, keys and values: odd lengths by default, and grouped queries."""
  q = draw(rng, (batch, queries, heads, width), dtype)
  return q, *(draw(rng, (batch, keys, kv_heads, width), dtype) for _ in range(2))


def loops(q, k, v, mask, *, scale, softcap=None, sinks=None):
  """Computes attention by its definition, one query at a time, in float64."""
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  seen, group = np.asarray(mask.dense()), q.shape[2] // k.shape[2]
  out = np.zeros_like(q)
  for b, t, n in np.ndindex(q.shape[:3]):
    visible = np.flatnonzero(seen[b, t])
    if not visible.size:
      continue
    scores = k[b, visible, n // group] @ q[b, t, n] * scale
    if softcap is not None:
      scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores)
    total = weights.sum() + (0.0 if sinks is None else np.exp(float(sinks[n])))
    out[b, t, n] = weights / total @ v[b, visible, n // group]
  return out


def late(*, window=None, keys=11):
  """Returns the mask of three queries at late positions, different in two rows of a cache."""
  return masks.over_cache(
    jnp.asarray([[6, 7, 8], [1, 2, 3]]), keys, pattern=window and Window(window)
  )


def documents(*, window=None):
  positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 0, 1]])
  segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2], [5, 5, 3, 3, 3, 4, 4]])
  return masks.packed(positions, segments, pattern=window and Window(window))


MASKS = {
  'causal': lambda: masks.causal(2, 7),
  'window': lambda: masks.causal(2, 7, pattern=Window(3)),
  'window of one': lambda: masks.causal(2, 7, pattern=Window(1)),
  'window past the text': lambda: masks.causal(2, 7, pattern=Window(20)),
  'late': late,
  'late, window': functools.partial(late, window=4),
  'late, more window than keys': functools.partial(late, window=64),
  'documents': documents,
  'documents, window': functools.partial(documents, window=2),
}


def is_the_definition(rng, mask, heads, softcap=None, sinks=None):
  lengths = {'queries': mask.q_positions_BT.shape[1], 'keys': mask.k_positions_BS.shape[1]}
  q, k, v = qkv(rng, heads=heads[0], kv_heads=heads[1], **lengths)
  expected = loops(q, k, v, mask, scale=SCALE, softcap=softcap, sinks=sinks)
  actual = attend(q, k, v, mask, scale=SCALE, softcap=softcap, sinks_N=sinks)
  np.testing.assert_allclose(actual, expected, atol=FLOAT32)


@pytest.mark.parametrize('name', MASKS)
def test_every_mask_matches_the_definition(rng, name):
  is_the_definition(rng, MASKS[name](), (6, 3))


@pytest.mark.parametrize('heads', [(6, 3), (4, 4), (5, 1)])
@pytest.mark.parametrize('name', ['window', 'late'])
@pytest.mark.parametrize('softcap', [None, 0.8])
@pytest.mark.parametrize('sunk', [False, True])
@pytest.mark.quick(softcap=(0.8,), sunk=(True,))
def test_grouping_soft_cap_and_sinks_match_the_definition(rng, name, heads, softcap, sunk):
  sinks = draw(rng, heads[:1]) if sunk else None
  is_the_definition(rng, MASKS[name](), heads, softcap, sinks)


def test_causal_attention_and_its_gradients_match_torch(rng):
  arrays = qkv(rng)
  cotangent = draw(rng, arrays[0].shape)
  leaves = [torch.tensor(np.array(a), requires_grad=True) for a in arrays]
  q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
  expected = torch.nn.functional.scaled_dot_product_attention(
    *(q, k, v), is_causal=True, scale=SCALE, enable_gqa=True
  ).transpose(1, 2)
  (expected * torch.tensor(np.array(cotangent))).sum().backward()

  fn = functools.partial(attend, mask=masks.causal(2, 7), scale=SCALE)
  actual, pullback = jax.vjp(fn, *arrays)
  np.testing.assert_allclose(actual, expected.detach().numpy(), atol=FLOAT32)
  for mine, leaf in zip(pullback(cotangent), leaves):
    np.testing.assert_allclose(mine, leaf.grad.numpy(), atol=GRADIENT)


def effective_mask(mask):
  """Draws which keys each query of row 0 sees, found by one-hot values: one string per query."""
  queries, keys = mask.q_positions_BT.shape[1], mask.k_positions_BS.shape[1]
  q, k = jnp.ones((1, queries, 1, keys)), jnp.ones((1, keys, 1, keys))
  out = attend(q, k, jnp.eye(keys)[None, :, None], mask, scale=1.0)
  return [''.join('.X'[int(weight > 0)] for weight in row) for row in np.asarray(out)[0, :, 0]]


def test_a_window_has_the_given_width():
  assert effective_mask(masks.causal(1, 5, pattern=Window(2))) == [
    *('X....', 'XX...', '.XX..', '..XX.', '...XX')
  ]


def test_a_window_wider_than_the_number_of_keys():
  assert effective_mask(masks.causal(1, 3, pattern=Window(4))) == ['X..', 'XX.', 'XXX']


def test_queries_late_in_a_cache_see_all_earlier_keys():
  mask = masks.over_cache(jnp.asarray([[4, 5]]), 7, pattern=Window(3))
  assert effective_mask(mask) == ['..XXX..', '...XXX.']


def test_decoding_token_by_token_equals_one_pass(rng):
  q, k, v = qkv(rng)
  whole = attend(q, k, v, masks.causal(2, 7, pattern=Window(3)), scale=SCALE)
  for t in range(7):
    mask = masks.over_cache(jnp.full((2, 1), t), 7, pattern=Window(3))
    step = attend(q[:, t : t + 1], k, v, mask, scale=SCALE)
    np.testing.assert_allclose(step[:, 0], whole[:, t], atol=FLOAT32)


@pytest.mark.parametrize('sinks', [None, jnp.asarray([0.5, -1.0])])
@pytest.mark.parametrize('softcap', [None, 1.0])
@pytest.mark.quick(softcap=(1.0,))
def test_a_query_without_keys_gives_zeros_and_zero_gradients(rng, softcap, sinks):
  q, k, v = qkv(rng, batch=1, queries=2, keys=3, heads=2, kv_heads=1)
  mask = AttentionMask(jnp.asarray([[0, 6]]), jnp.asarray([[5, 6, 7]]))  # the first sees none

  def fn(q, k, v):
    return attend(q, k, v, mask, scale=SCALE, softcap=softcap, sinks_N=sinks)

  out, pullback = jax.vjp(fn, q, k, v)
  np.testing.assert_array_equal(out[0, 0], 0.0)
  cotangent = jnp.ones_like(out)
  gradients = pullback(cotangent)
  assert all(np.isfinite(g).all() for g in gradients)
  np.testing.assert_array_equal(gradients[0][0, 0], 0.0)
  only_second = pullback(cotangent.at[:, 0].set(0.0))
  for all_rows, second in zip(gradients, only_second):
    np.testing.assert_array_equal(all_rows, second)
  assert np.abs(gradients[2]).max() > 0


def test_sink_gradients_match_finite_differences(rng):
  q, k, v = qkv(rng, batch=1, queries=3, keys=3, heads=4, kv_heads=2)
  weights, mask = draw(rng, q.shape), masks.causal(1, 3)
  sinks = np.asarray(rng.standard_normal(4), np.float32)
  loss = lambda s: jnp.sum(weights * attend(q, k, v, mask, scale=SCALE, sinks_N=s))
  step, numeric = 1e-5, []
  for n in range(4):
    moved = [sinks.astype(np.float64) + sign * step * (np.arange(4) == n) for sign in (1, -1)]
    ends = [np.sum(np.asarray(weights) * loops(q, k, v, mask, scale=SCALE, sinks=s)) for s in moved]
    numeric.append((ends[0] - ends[1]) / (2 * step))
  np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(sinks)), numeric, atol=GRADIENT)


def test_huge_scores_do_not_overflow(rng):
  q, k, v = qkv(rng)
  expected = np.asarray(attend(q, k, v, masks.causal(2, 7), scale=1e6))
  assert np.isfinite(expected).all()
  np.testing.assert_allclose(expected[:, 0], np.repeat(v[:, 0], 2, axis=1), atol=FLOAT32)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_scores_of_low_precision_inputs_are_float32(rng, dtype):
  q, k, v = qkv(rng, width=64, dtype=dtype)
  expected = loops(q, k, v, masks.causal(2, 7), scale=SCALE)
  actual = attend(q, k, v, masks.causal(2, 7), scale=SCALE, impl='reference')
  assert actual.dtype == dtype
  np.testing.assert_allclose(actual.astype(np.float32), expected, atol=BFLOAT16 * np.abs(v).max())


def shapes(width=64, dtype=jnp.bfloat16, length=16):
  return [jax.ShapeDtypeStruct((2, length, heads, width), dtype) for heads in (4, 2)]


@pytest.fixture
def cudnn(monkeypatch):
  """Pretends to JAX that cuDNN is installed, which is enough to lower for a GPU."""
  attention._library_obstacle.cache_clear()
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  yield
  attention._library_obstacle.cache_clear()


def test_auto_picks_cudnn_only_on_a_gpu(cudnn):
  q, k = shapes()
  picks = [
    attention.pick(q, k, masks.causal(2, 16, pattern=Window(3)), platform=p)
    for p in ('gpu', 'cuda')
  ]
  assert picks == ['cudnn', 'cudnn']
  others = {
    'cpu': 'native' if cpu.available() else 'reference',
    'tpu': 'reference',
    'rocm': 'reference',
  }
  for platform, expected in others.items():
    assert attention.pick(q, k, masks.causal(2, 16), platform=platform) == expected


@pytest.mark.parametrize(
  ('shape', 'options', 'reason'),
  [
    ({'dtype': jnp.float32}, {}, 'bfloat16 or float16, not float32'),
    ({'width': 60}, {}, 'head widths up to 256 that divide by 8, not 60'),
    ({'width': 512}, {}, 'not 512'),
    ({}, {'softcap': 30.0}, 'no soft cap'),
    ({}, {'sinks_N': jnp.zeros(4)}, 'no sinks'),
  ],
)
def test_cudnn_says_why_it_does_not_apply(cudnn, shape, options, reason):
  q, k = shapes(**shape)
  mask = masks.causal(2, 16)
  assert attention.pick(q, k, mask, platform='gpu', **options) == 'reference'
  arrays = [jnp.zeros(a.shape, a.dtype) for a in (q, k, k)]
  with pytest.raises(ValueError, match=reason):
    attention.attention(*arrays, mask, scale=SCALE, impl='cudnn', **options)


def test_cudnn_refuses_masks_by_position(cudnn):
  mask = masks.over_cache(jnp.broadcast_to(jnp.arange(16)[None], (2, 16)), 16)
  assert attention.pick(*shapes(), mask, platform='gpu') == 'reference'
  assert 'arbitrary positions' in attention.cudnn_obstacle(*shapes(), mask)


def test_without_cudnn_auto_uses_the_reference_and_requiring_cudnn_fails(rng, monkeypatch):
  def missing():
    raise RuntimeError('cuDNN is not detected.')

  attention._library_obstacle.cache_clear()
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', missing)
  arrays, mask = qkv(rng, dtype=jnp.bfloat16), masks.causal(2, 7)
  assert attention.pick(*arrays[:2], mask, platform='gpu') == 'reference'
  with pytest.raises(ValueError, match='cuDNN is not detected; use'):
    attention.attention(*arrays, mask, scale=SCALE, impl='cudnn')
  attention._library_obstacle.cache_clear()


def lowered(fn, platform, length):
  q, k = shapes(length=length)
  return jax.jit(fn).trace(q, k, k).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('length', [16, 13])
@pytest.mark.parametrize('window', [None, 5])
@pytest.mark.quick(length=(13,))
def test_the_kernel_is_chosen_when_the_program_is_lowered(cudnn, window, length):
  fn = lambda q, k, v: attention.attention(
    q, k, v, masks.causal(2, length, pattern=window and Window(window)), scale=SCALE
  )
  loss = lambda *arrays: jnp.sum(fn(*arrays).astype(jnp.float32))
  scores = f'2x2x2x{length}x{length}xf32'
  for program in (fn, jax.grad(loss, (0, 1, 2))):
    gpu, host, tpu = (lowered(program, name, length) for name in ('cuda', 'cpu', 'tpu'))
    assert '__cudnn$fmhaSoftmax' in gpu and scores not in gpu and cpu.PREFILL not in gpu
    assert '__cudnn' not in tpu and scores in tpu and cpu.PREFILL not in tpu
    native = cpu.available() and program is fn
    assert '__cudnn' not in host and (cpu.PREFILL in host) == native != (scores in host)
  flags = lowered(fn, 'cuda', length).replace('\\22', '').replace(' ', '')
  assert f'sliding_window_length:{window or 0}' in flags
  assert 'mask_type:CAUSAL' in flags


@pytest.mark.parametrize('length', [6, 7])
@pytest.mark.parametrize('window', [None, 1, 3, 20])
@pytest.mark.quick(length=(7,), window=(None, 3))
def test_the_arguments_for_cudnn_describe_the_same_attention(
  rng, monkeypatch, cudnn, window, length
):
  # JAX's own jnp form takes the same arguments as the kernel and replaces it here.
  kernel = jax.nn.dot_product_attention
  monkeypatch.setattr(
    jax.nn, 'dot_product_attention', lambda *a, **k: kernel(*a, **(k | {'implementation': 'xla'}))
  )
  arrays, mask = (
    qkv(rng, queries=length, keys=length),
    masks.causal(2, length, pattern=window and Window(window)),
  )
  arrays = [a.astype(jnp.bfloat16) for a in arrays]
  expected = loops(*arrays, mask, scale=SCALE)
  actual = attention.attention(*arrays, mask, scale=SCALE, impl='cudnn')
  tolerance = BFLOAT16 * np.abs(np.asarray(arrays[2], np.float32)).max()
  np.testing.assert_allclose(actual.astype(np.float32), expected, atol=tolerance)


def test_auto_runs_on_a_cpu_where_cudnn_could_be_lowered(rng, cudnn):
  arrays, mask = qkv(rng, dtype=jnp.bfloat16), masks.causal(2, 7, pattern=Window(3))
  assert attention.pick(*arrays[:2], mask, platform='gpu') == 'cudnn'
  run = lambda impl: jax.value_and_grad(
    lambda q: jnp.sum(attention.attention(q, *arrays[1:], mask, scale=SCALE, impl=impl) ** 2)
  )
  for auto, reference in zip(jax.jit(run('auto'))(arrays[0]), jax.jit(run('reference'))(arrays[0])):
    np.testing.assert_allclose(
      *(np.asarray(a, np.float32) for a in (auto, reference)), rtol=BFLOAT16, atol=BFLOAT16
    )


def test_bad_input_is_refused(rng):
  q, k, v = qkv(rng)
  call = functools.partial(attention.attention, scale=SCALE)
  with pytest.raises(ValueError, match='axis S'):
    call(q, k, v[:, :5], masks.causal(2, 7))
  with pytest.raises(ValueError, match='4 query heads do not divide into 3'):
    call(q[:, :, :4], k, v, masks.causal(2, 7))
  with pytest.raises(ValueError, match='axis T'):
    call(q, k, v, masks.causal(2, 6))
  with pytest.raises(ValueError, match="'flash' is not one of"):
    call(q, k, v, masks.causal(2, 7), impl='flash')
  positions = jnp.zeros((2, 7), jnp.int32)
  with pytest.raises(ValueError, match='needs T = S, not 7 and 6'):
    mask = AttentionMask(positions, positions[:, :6], contiguous=True)
    call(q, k[:, :6], v[:, :6], mask)


@pytest.mark.parametrize('impl', ['auto', 'reference'])
@pytest.mark.parametrize('queries', [7, 12])
@pytest.mark.quick(queries=(12,))
def test_queries_and_keys_of_different_dtypes_use_the_wider_one(rng, impl, queries):
  arrays, mask = qkv(rng, queries=queries, keys=queries), masks.causal(2, queries)
  rounded = [a.astype(jnp.bfloat16) for a in arrays]
  for dtype, q, keys in ((jnp.float32, arrays[0], rounded), (jnp.bfloat16, rounded[0], arrays)):
    y = attention.attention(q, *keys[1:], mask, scale=SCALE, impl=impl)
    assert y.dtype == dtype
    expected = loops(q, *keys[1:], mask, scale=SCALE)
    tolerance = 1e-5 if dtype == jnp.float32 else BFLOAT16 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=tolerance)
