"""Attention of a few queries over a cache, natively: keys and values are read where they lie, once.

XLA:CPU copies both to have their heads in front, over the whole capacity, and multiplies zeros by
what a query does not see. The native form (attend.h) reads from the first slot that a query sees to
the last, keeps no scores but of 64 slots, and computes in float32 whatever the cache holds. It
loses to XLA's matrix products where many queries share the keys: `MOST_QUERIES`. Keys and values in
int8 with a scale for each token and head are read as they are stored.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ops.kernels import cpu
from ops.masks import AttentionMask

MOST_QUERIES = 8  # a row
DTYPES = (jnp.float32, jnp.bfloat16)
NO_SINKS = np.zeros((0,), np.float32)
NO_SCALES = np.zeros((0, 0, 0), np.float16)


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
  if q_BTNH.shape[1] > MOST_QUERIES:
    return f'native attention takes up to {MOST_QUERIES} queries a row, not {q_BTNH.shape[1]}'
  if mask.recent is None or mask.recent[1]:
    return f'native attention has windows, but no {mask.pattern}'
  if mask.q_segments_BT is not None:
    return 'native attention takes no segments'
  if {mask.q_positions_BT.dtype, mask.k_positions_BS.dtype} != {jnp.dtype(jnp.int32)}:
    return 'native attention takes positions in int32'
  return None


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

  `scales_BSK` are those of keys and of values in int8, as float16.
  `instruction_set` and `threads` are for tests: None and 0 take the best set and all threads.
  """
  call = jax.ffi.ffi_call(
    cpu.ATTENTION,
    jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
    vmap_method='sequential',
  )
  return call(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    *scales_BSK,
    mask.q_positions_BT,
    mask.k_positions_BS,
    NO_SINKS if sinks_N is None else sinks_N.astype(jnp.float32),
    instruction_set=cpu.number(instruction_set),
    scale=np.float32(scale),
    softcap=np.float32(softcap or 0),
    threads=np.int64(threads),
    window=np.int64(mask.recent[0] or 0),
  )
