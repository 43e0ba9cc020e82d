"""Native attention: of a few queries over a cache, and of many queries at once.

`attend` is for a few queries a row, up to `MOST_QUERIES`. XLA:CPU copies keys and values to have
their heads in front, over the whole capacity, and multiplies zeros by what a query does not see.
The native form (attend.h) reads from the first slot that a query sees to the last, each number
once.

`prefill` is for more. It goes over the blocks of keys that some query of a block sees, and keeps no
scores but those of 128 keys by some dozen rows in the nearest cache (prefill.h). It returns the
logarithms of the sums of exponentials, from which a backward pass can compute the scores anew.

Both compute in float32 whatever the cache holds: float32, bfloat16, or int8 with a scale for each
token and head.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ops.kernels import cpu
from ops.masks import AttentionMask

MOST_QUERIES = 8  # a row, of `attend`
MOST_SHARING = 480  # query heads that read one key/value head, of `prefill`
DTYPES = (jnp.float32, jnp.bfloat16)
NO_SINKS = np.zeros((0,), np.float32)
NO_SCALES = np.zeros((0, 0, 0), np.float16)
NO_SEGMENTS = np.zeros((0, 0), np.int32)


def obstacle(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask) -> str | None:
  """Says in words why there is no native form of this attention, or None if there is.

  Only shapes and dtypes are looked at.
  """
  if not cpu.available():
    return cpu.why_not()
  stored = (*DTYPES, jnp.int8)
  if q_BTNH.dtype not in DTYPES or k_BSKH.dtype not in stored or v_BSKH.dtype != k_BSKH.dtype:
    return (
      'native attention takes float32 and bfloat16, and keys and values in int8, '
      f'not {q_BTNH.dtype} with {k_BSKH.dtype} and {v_BSKH.dtype}'
    )
  if mask.recent is None:
    return f'native attention has windows and first tokens, but no {mask.pattern}'
  sharing = q_BTNH.shape[2] // k_BSKH.shape[2]
  if sharing > MOST_SHARING:
    return f'native attention takes up to {MOST_SHARING} query heads a key head, not {sharing}'
  if {a.dtype for a in jax.tree.leaves(mask)} != {jnp.dtype(jnp.int32)}:
    return 'native attention takes positions and segments in int32'
  return None


def attention(q_BTNH: jax.Array, k_BSKH, v_BSKH, mask: AttentionMask, sinks_N, **options):
  """y_BTNH of `attend` or, for more queries than that takes and for segments, of `prefill`."""
  arrays = q_BTNH, k_BSKH, v_BSKH, mask, sinks_N
  if q_BTNH.shape[1] <= MOST_QUERIES and mask.q_segments_BT is None:
    return attend(*arrays, **options)
  return prefill(*arrays, **options)[0]


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: AttentionMask,
  sinks_N: jax.Array | None,
  *,
  scale: float,
  softcap: float | None,
  scales_BSK: tuple[jax.Array, jax.Array] = (NO_SCALES, NO_SCALES),
  instruction_set: str | None = None,
  threads: int = 0,
) -> jax.Array:
  """Computes `ops.attention.attention` where there is no `obstacle`, on a CPU alone.

  Positions below `first` are seen by every later query, besides its window. `scales_BSK` are those
  of keys and of values in int8, as float16. `instruction_set` and `threads` are for tests: None and
  0 take the best set and all threads.
  """
  call = jax.ffi.ffi_call(
    cpu.ATTENTION,
    jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
    vmap_method='sequential',
  )
  arrays = q_BTNH, k_BSKH, v_BSKH, *scales_BSK, mask.q_positions_BT, mask.k_positions_BS
  return call(
    *arrays,
    _sinks(sinks_N),
    instruction_set=cpu.number(instruction_set),
    threads=np.int64(threads),
    **_numbers(scale, softcap, mask),
  )


def prefill(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: AttentionMask,
  sinks_N: jax.Array | None,
  *,
  scale: float,
  softcap: float | None,
  scales_BSK: tuple[jax.Array, jax.Array] = (NO_SCALES, NO_SCALES),
  instruction_set: str | None = None,
  threads: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Computes what `attend` does for any number of queries, and the logarithms of the sums.

  Returns y_BTNH, and logs_BNT in float32: log(sum of exp(score)) over the keys that a query sees,
  with its sink; -5e29 if there are none. The mask may have segments.
  """
  results = (
    jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
    jax.ShapeDtypeStruct((q_BTNH.shape[0], *q_BTNH.shape[2:0:-1]), jnp.float32),
  )
  call = jax.ffi.ffi_call(cpu.PREFILL, results, vmap_method='sequential')
  segments = (mask.q_segments_BT, mask.k_segments_BS)
  if mask.q_segments_BT is None:
    segments = (NO_SEGMENTS, NO_SEGMENTS)
  arrays = q_BTNH, k_BSKH, v_BSKH, *scales_BSK, mask.q_positions_BT, mask.k_positions_BS
  return tuple(
    call(
      *arrays,
      *segments,
      _sinks(sinks_N),
      instruction_set=cpu.number(instruction_set),
      threads=np.int64(threads),
      **_numbers(scale, softcap, mask),
    )
  )


def _sinks(sinks_N):
  return NO_SINKS if sinks_N is None else sinks_N.astype(jnp.float32)


def _numbers(scale, softcap, mask: AttentionMask) -> dict:
  window, first = mask.recent
  return {
    'first': np.int64(first),
    'scale': np.float32(scale),
    'softcap': np.float32(softcap or 0),
    'window': np.int64(window or 0),
  }
