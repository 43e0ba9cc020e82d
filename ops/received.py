"""How much attention keys receive: what caches that give tokens up choose by.

Queries come in blocks, so the scores of all pairs are never in memory: it is O(`BLOCK` * S) for
each head. The products of queries and keys are computed a second time, beside those of the
attention itself.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from ops import axes
from ops.masks import AttentionMask

BLOCK = 64  # queries
_MASKED = -1e30  # far below any score, but finite


def received(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  mask: AttentionMask,
  counted_BT: jax.Array,
  *,
  scale: float,
  softcap: float | None = None,
  sinks_BN: jax.Array | None = None,
) -> jax.Array:
  """Sums the attention that each key receives from the counted queries: float32 [B, K, S].

  Of the query heads that share a key head it is the mean. The weights are those by which
  `ops.attention.attention` averages values; `sinks_BN` are its sinks, for each row.
  """
  axes.check(
    'BTNH,BSKH,BT,BS,BT,BN',
    *(q_BTNH, k_BSKH, mask.q_positions_BT, mask.k_positions_BS, counted_BT, sinks_BN),
  )
  heads, length = k_BSKH.shape[2], q_BTNH.shape[1]
  size = min(BLOCK, length)
  sinks_BKG = None
  if sinks_BN is not None:
    sinks_BKG = rearrange(sinks_BN.astype(jnp.float32), 'B (K G) -> B K G', K=heads)

  def add(sums_BKS, block):
    q_BTKGH, positions_BT, counted_BT = block
    scores = scale * jnp.einsum(
      'BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    if softcap is not None:
      scores = softcap * jnp.tanh(scores / softcap)
    seen = AttentionMask(positions_BT, mask.k_positions_BS, pattern=mask.pattern).dense()
    weights = _softmax(jnp.where(seen[:, None, None], scores, _MASKED), sinks_BKG)
    counted = counted_BT.astype(jnp.float32)
    return sums_BKS + jnp.einsum('BKGTS,BT->BKS', weights, counted) / weights.shape[2], None

  cut = lambda a: rearrange(_filled(a, size), 'B (i T) ... -> i B T ...', T=size)
  dtype = jnp.promote_types(q_BTNH.dtype, k_BSKH.dtype)
  q_BTNH, k_BSKH = q_BTNH.astype(dtype), k_BSKH.astype(dtype)
  q_BTKGH = rearrange(q_BTNH, 'B T (K G) H -> B T K G H', K=heads)
  blocks = tuple(map(cut, (q_BTKGH, mask.q_positions_BT, counted_BT)))
  nothing = jnp.zeros((k_BSKH.shape[0], heads, k_BSKH.shape[1]), jnp.float32)
  return jax.lax.scan(add, nothing, blocks)[0]


def _softmax(scores_BKGTS, sinks_BKG):
  # The peak is at least _MASKED / 2, so a query without keys gives exactly zero.
  peak = scores_BKGTS.max(-1, keepdims=True, initial=_MASKED / 2)
  if sinks_BKG is not None:
    peak = jnp.maximum(peak, sinks_BKG[..., None, None])
  weights = jnp.exp(scores_BKGTS - peak)
  total = weights.sum(-1, keepdims=True)
  if sinks_BKG is not None:
    total = total + jnp.exp(sinks_BKG[..., None, None] - peak)
  return weights / jnp.where(total == 0, 1.0, total)


def _filled(a, size: int):
  """Fills the queries up to whole blocks; what is added does not count."""
  return jnp.pad(a, [(0, 0), (0, -a.shape[1] % size)] + [(0, 0)] * (a.ndim - 2))
