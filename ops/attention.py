"""Computes grouped-query attention, by a readable reference form or by a fused kernel.

Vaswani et al. (2017), https://arxiv.org/abs/1706.03762, with heads grouped after Ainslie et al.
(2023), https://arxiv.org/abs/2305.13245: query head n reads key/value head n // G. Scores may be
capped (Gemma 2, https://arxiv.org/abs/2408.00118). Each head may have an attention sink, a logit
that counts in the denominator and has no value (gpt-oss, https://arxiv.org/abs/2508.10925).

The implementations differ in memory and in scope:

  reference  stores all scores, [B, N, T, S] in float32, for the forward and the backward pass; a
             sparse pattern saves neither work nor memory
  blocked    stores no scores, and computes only blocks that some query sees (ops/blocked.py, and
             ops/layouts.py for sparse patterns); 'auto' picks it from `LONG` queries on, where a
             loop over blocks pays on the platform, and then has the native kernel compute the
             parts of a sparse pattern that it supports
  cudnn      stores no scores; NVIDIA GPUs, causal or windowed self-attention in bfloat16 or float16
  native     stores no scores; CPUs, in float32 or bfloat16, and over caches in int8. Its gradients
             are those of the reference below `LONG` queries, and those of blocks from there on
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange

from ops import axes, blocked, layouts
from ops.kernels.cpu import attend
from ops.masks import AttentionMask

Implementation = Literal['auto', 'reference', 'blocked', 'cudnn', 'native']

PLATFORMS = {'cpu': 'native', 'cuda': 'cudnn', 'rocm': None, 'tpu': None}  # with its kernel
# Queries; as timed on CPUs with gradients, and elsewhere so that scores do not fill the memory.
LONG = {'cpu': 128, 'cuda': 4096, 'rocm': 4096, 'tpu': 4096}

# Far below any score, but finite: with -inf, a query that sees no key would give NaN.
_MASKED = -1e30


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: AttentionMask,
  *,
  scale: float,
  softcap: float | None = None,
  sinks_N: jax.Array | None = None,
  q_first_BTNH: jax.Array | None = None,
  impl: Implementation = 'auto',
) -> jax.Array:
  """Averages the values that each query sees, weighted by softmax(scale * <query, key>).

  With `softcap`, a score s becomes softcap * tanh(s / softcap) before masking; `sinks_N` is not
  capped. A query that sees no key gives zeros and zero gradients. If queries and keys have
  different dtypes (a cache may have its own), the products use the wider one.

  `q_first_BTNH` are the queries as rotated for the first tokens, where the pattern is a window with
  first tokens. This case has one implementation, so `impl` has no effect.

  `impl` is 'reference', 'blocked', 'cudnn' or 'native' to require one of these; 'auto' uses the one
  that `pick` names for the platform that the program is lowered for. Returns [B, T, N, H] in the
  dtype of q.

  Raises:
    ValueError: the shapes disagree, or the required kernel does not apply (the message says why).
  """
  _check(q_BTNH, k_BSKH, v_BSKH, mask, sinks_N)
  if q_first_BTNH is not None:
    queries = q_BTNH, q_first_BTNH
    return layouts.to_first(queries, k_BSKH, v_BSKH, mask, sinks_N, scale=scale, softcap=softcap)
  reference = functools.partial(_reference, scale=scale, softcap=softcap)
  arguments = (q_BTNH, k_BSKH, v_BSKH, mask, sinks_N)
  if impl == 'reference':
    return reference(*arguments)
  long = q_BTNH.shape[1] >= LONG['cpu']
  kernels = {
    'blocked': functools.partial(
      layouts.attention, scale=scale, softcap=softcap, native=impl == 'auto'
    ),
    'cudnn': functools.partial(_cudnn, window=_window(mask), scale=scale),
    'native': functools.partial(_native_long if long else _native, scale, softcap),
  }
  if impl not in ('auto', *kernels):
    raise ValueError(f'impl {impl!r} is not one of {", ".join(get_args(Implementation))}')
  obstacles = _obstacles(q_BTNH, k_BSKH, v_BSKH, mask, softcap, sinks_N)
  if impl != 'auto':
    if obstacles.get(impl):
      raise ValueError(f"{obstacles[impl]}; use impl='auto' or 'reference'")
    return kernels[impl](*arguments)
  picked = {platform: _picked(platform, obstacles, q_BTNH.shape[1]) for platform in PLATFORMS}
  branches = {platform: kernels[name] for platform, name in picked.items() if name != 'reference'}
  if not branches:
    return reference(*arguments)
  # All branches must save the same arrays for the backward pass, so JAX pads each branch with zeros
  # for what only another one saves. Checkpointing makes the reference save only its arguments;
  # otherwise the cuDNN branch would allocate the reference's scores.
  return jax.lax.platform_dependent(*arguments, **branches, default=jax.checkpoint(reference))


def attention_over_codes(
  q_BTNH: jax.Array,
  codes_BSKH: tuple[jax.Array, jax.Array],
  scales_BSK: tuple[jax.Array, jax.Array],
  mask: AttentionMask,
  *,
  scale: float,
  softcap: float | None = None,
  sinks_N: jax.Array | None = None,
  q_first_BTNH: jax.Array | None = None,
) -> jax.Array:
  """Computes `attention` over int8 keys and values with a scale for each token and head.

  Codes and scales are pairs: those of the keys and those of the values. On CPUs the codes are read
  as they are stored; elsewhere they are widened first.
  """
  arguments = (q_BTNH, codes_BSKH, scales_BSK, mask, sinks_N)
  widened = functools.partial(_widened, scale=scale, softcap=softcap)
  if q_first_BTNH is not None:
    return widened(*arguments, q_first_BTNH=q_first_BTNH)
  if attend.obstacle(q_BTNH, *codes_BSKH, mask):
    return widened(*arguments)
  native = functools.partial(_native_over_codes, scale=scale, softcap=softcap)
  return jax.lax.platform_dependent(*arguments, cpu=native, default=widened)


def _widened(q_BTNH, codes_BSKH, scales_BSK, mask, sinks_N, **scores):
  k_BSKH, v_BSKH = (
    (codes.astype(jnp.float32) * scales.astype(jnp.float32)[..., None]).astype(q_BTNH.dtype)
    for codes, scales in zip(codes_BSKH, scales_BSK)
  )
  return attention(q_BTNH, k_BSKH, v_BSKH, mask, sinks_N=sinks_N, **scores)


def _native_over_codes(q_BTNH, codes_BSKH, scales_BSK, mask, sinks_N, **scores):
  return attend.attention(q_BTNH, *codes_BSKH, mask, sinks_N, scales_BSK=scales_BSK, **scores)


def pick(
  q_BTNH: jax.ShapeDtypeStruct,
  k_BSKH: jax.ShapeDtypeStruct,
  mask: AttentionMask,
  *,
  platform: str,
  softcap: float | None = None,
  sinks_N: jax.ShapeDtypeStruct | None = None,
) -> Implementation:
  """Names the implementation that `impl='auto'` uses on 'cpu', 'gpu' (or 'cuda') or 'tpu'.

  Reads shapes and dtypes only, so arrays may be passed too. Values are assumed to have the shape
  and dtype of the keys. `cudnn_obstacle` and `ops.kernels.cpu.attend.obstacle` give the reasons.
  """
  obstacles = _obstacles(q_BTNH, k_BSKH, k_BSKH, mask, softcap, sinks_N)
  return _picked('cuda' if platform == 'gpu' else platform, obstacles, q_BTNH.shape[1])


def _picked(platform, obstacles, queries) -> Implementation:
  kernel = PLATFORMS[platform]
  if kernel is not None and not obstacles[kernel]:
    return kernel
  return 'blocked' if queries >= LONG[platform] else 'reference'


def _obstacles(q_BTNH, k_BSKH, v_BSKH, mask, softcap, sinks_N) -> dict[str, str | None]:
  return {
    'cudnn': cudnn_obstacle(q_BTNH, k_BSKH, mask, softcap=softcap, sinks_N=sinks_N),
    'native': attend.obstacle(q_BTNH, k_BSKH, v_BSKH, mask),
  }


def cudnn_obstacle(q_BTNH, k_BSKH, mask, *, softcap=None, sinks_N=None) -> str | None:
  """Returns the reason why cuDNN cannot compute this attention, or None if it can."""
  width = q_BTNH.shape[-1]
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16) or k_BSKH.dtype != q_BTNH.dtype:
    return f'cuDNN takes bfloat16 or float16, not {q_BTNH.dtype} with {k_BSKH.dtype}'
  if not mask.contiguous:
    return 'cuDNN takes whole sequences from position 0 on, not arbitrary positions or segments'
  if mask.recent is None or mask.recent[1]:
    return f'cuDNN has windows, but no {mask.pattern}'
  if softcap is not None:
    return f'cuDNN has no soft cap (asked for: {softcap})'
  if sinks_N is not None:
    return 'cuDNN has no sinks'
  if width > 256 or width % 8:
    return f'cuDNN takes head widths up to 256 that divide by 8, not {width}'
  return _library_obstacle(q_BTNH.shape, k_BSKH.shape, jnp.dtype(q_BTNH.dtype))


@functools.cache
def _library_obstacle(q_shape, k_shape, dtype):
  """Returns JAX's own objection: cuDNN is missing or too old, or the GPU is too old for the width.

  JAX raises it while tracing, and it checks more when gradients are traced. The check is needed
  because `lax.platform_dependent` traces the branches of all platforms: without it, a program for
  a CPU would fail on a machine without cuDNN.
  """
  q, k = jax.ShapeDtypeStruct(q_shape, dtype), jax.ShapeDtypeStruct(k_shape, dtype)
  fn = lambda q, k: _cudnn(q, k, k, None, None, window=None, scale=1.0)
  try:
    jax.eval_shape(lambda *arrays: jax.vjp(fn, *arrays)[0], q, k)
  except (RuntimeError, NotImplementedError) as error:
    return str(error).rstrip('.')
  return None


def _check(q_BTNH, k_BSKH, v_BSKH, mask, sinks_N):
  sizes = axes.check(
    'BTNH,BSKH,BSKH,BT,BS,N',
    *(q_BTNH, k_BSKH, v_BSKH, mask.q_positions_BT, mask.k_positions_BS, sinks_N),
  )
  if sizes['N'] % sizes['K']:
    raise ValueError(f'{sizes["N"]} query heads do not divide into {sizes["K"]} key/value heads')
  if mask.contiguous and sizes['T'] != sizes['S']:
    raise ValueError(f'a contiguous mask needs T = S, not {sizes["T"]} and {sizes["S"]}')


def _reference(q_BTNH, k_BSKH, v_BSKH, mask, sinks_N, *, scale, softcap):
  # A dozen forms were timed on XLA:CPU (float32, N=9, K=3, H=64, 2 cores). At T=S=512 this one was
  # among the fastest: 1.5 to 2 times faster (4 times with gradients) than mapping over G or
  # dividing before the product with V. At T=1, S=1024 it equals the fastest within noise.
  # Only the queries are transposed; the products write the BKGT order, so scores are not
  # transposed; and dividing after the product with V touches S/H times fewer numbers. XLA still
  # copies K and V to put their heads first. Forms without these copies (one block-diagonal product,
  # sums of elementwise products) were no faster at T=1, where the native form is used.
  dtype = jnp.promote_types(q_BTNH.dtype, k_BSKH.dtype)
  k_BSKH, v_BSKH = k_BSKH.astype(dtype), v_BSKH.astype(dtype)
  q_BKGTH = rearrange(q_BTNH.astype(dtype), 'B T (K G) H -> B K G T H', K=k_BSKH.shape[2])
  scores_BKGTS = scale * jnp.einsum(
    'BKGTH,BSKH->BKGTS', q_BKGTH, k_BSKH, preferred_element_type=jnp.float32
  )
  if softcap is not None:
    scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
  scores_BKGTS = jnp.where(mask.dense()[:, None, None], scores_BKGTS, _MASKED)
  weights_BKGTS, total_BKGT1 = _exponentials(scores_BKGTS, sinks_N)
  out_BKGTH = jnp.einsum(
    'BKGTS,BSKH->BKGTH',
    weights_BKGTS.astype(v_BSKH.dtype),
    v_BSKH,
    preferred_element_type=jnp.float32,
  )
  out_BKGTH = (out_BKGTH / total_BKGT1).astype(q_BTNH.dtype)
  return rearrange(out_BKGTH, 'B K G T H -> B T (K G) H')


def _exponentials(scores_BKGTS, sinks_N):
  """Returns the numerators of the softmax over S and their sum (1 for a query without keys)."""
  # The peak is at least _MASKED / 2, so the numerators of a query without keys are exactly zero.
  peak = jnp.max(scores_BKGTS, axis=-1, keepdims=True, initial=_MASKED / 2)
  if sinks_N is not None:
    kv_heads = scores_BKGTS.shape[1]
    sinks = rearrange(sinks_N.astype(jnp.float32), '(K G) -> 1 K G 1 1', K=kv_heads)
    peak = jnp.maximum(peak, sinks)
  peak = jax.lax.stop_gradient(peak)  # it cancels in the quotient
  weights_BKGTS = jnp.exp(scores_BKGTS - peak)
  total = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
  if sinks_N is not None:
    total = total + jnp.exp(sinks - peak)
  return weights_BKGTS, jnp.where(total == 0, 1.0, total)


def _native_long(scale, softcap, *arguments):
  return blocked.partial(*arguments, scale=scale, softcap=softcap, native=True)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _native(scale, softcap, q_BTNH, k_BSKH, v_BSKH, mask, sinks_N):
  return attend.attention(q_BTNH, k_BSKH, v_BSKH, mask, sinks_N, scale=scale, softcap=softcap)


@_native.defjvp
def _native_jvp(scale, softcap, primals, tangents):
  reference = jax.checkpoint(functools.partial(_reference, scale=scale, softcap=softcap))
  return jax.jvp(reference, primals, tangents)


def _window(mask: AttentionMask) -> int | None:
  return None if mask.recent is None else mask.recent[0]


def _cudnn(q_BTNH, k_BSKH, v_BSKH, mask, sinks_N, *, window, scale):
  del mask, sinks_N  # `cudnn_obstacle` admits causal masks with a window only, and no sinks
  length = q_BTNH.shape[1]
  # JAX 0.10 refuses gradients of odd lengths. An added position at the end makes the length even;
  # causality hides it from all queries before it.
  filled = [jnp.pad(x, ((0, 0), (0, length % 2), (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH)]
  # JAX's window counts the keys before the query. It does not imply causality: without `is_causal`,
  # later keys would be seen.
  local_window_size = None if window is None else (window - 1, 0)
  out_BTNH = jax.nn.dot_product_attention(
    *filled,
    scale=scale,
    is_causal=True,
    local_window_size=local_window_size,
    implementation='cudnn',
  )
  return out_BTNH[:, :length]
