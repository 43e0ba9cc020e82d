"""Describes which keys a query may see by positions, a sparse pattern and segments.

An `AttentionMask` holds two or four small integer arrays. `dense` expands them to [B, T, S]
booleans for the reference attention; kernels that mask by position do not need these. Segments
separate the documents that are packed into one row: a query sees keys with its own segment number,
which may be any integer.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops import axes
from ops.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class AttentionMask:
  """Lets a query at position q see a key at position k <= q by the pattern, if segments agree.

  Without a pattern it sees all of these. `contiguous` states that queries and keys both have the
  positions 0..T-1 and no segments, so that the causal flag and the window of a kernel describe the
  whole mask. It cannot be checked under jit; `causal` sets it.
  """

  q_positions_BT: jax.Array
  k_positions_BS: jax.Array
  q_segments_BT: jax.Array | None = None
  k_segments_BS: jax.Array | None = None
  pattern: Pattern | None = None
  contiguous: bool = False

  def __post_init__(self):
    if (self.q_segments_BT is None) != (self.k_segments_BS is None):
      raise ValueError('queries and keys must both have segments, or neither')
    if self.contiguous and self.q_segments_BT is not None:
      raise ValueError('a mask with segments is not contiguous')

  def dense(self) -> jax.Array:
    """Returns the mask as booleans [B, T, S]: True where the query sees the key."""
    axes.check('BT,BS,BT,BS', *self._arrays())
    q_BT1, k_B1S = self.q_positions_BT[:, :, None], self.k_positions_BS[:, None, :]
    seen_BTS = k_B1S <= q_BT1
    if self.pattern is not None:
      seen_BTS &= self.pattern.sees(q_BT1, k_B1S)
    if self.q_segments_BT is not None:
      seen_BTS &= self.q_segments_BT[:, :, None] == self.k_segments_BS[:, None, :]
    return seen_BTS

  @property
  def recent(self) -> tuple[int | None, int] | None:
    """(window, first) if a query sees its last `window` keys (None: all) and the first `first`.

    None: the pattern is another one.
    """
    return (None, 0) if self.pattern is None else self.pattern.recent

  def _arrays(self):
    return self.q_positions_BT, self.k_positions_BS, self.q_segments_BT, self.k_segments_BS


jax.tree_util.register_dataclass(
  AttentionMask,
  data_fields=['q_positions_BT', 'k_positions_BS', 'q_segments_BT', 'k_segments_BS'],
  meta_fields=['pattern', 'contiguous'],
)


def causal(batch: int, length: int, *, pattern: Pattern | None = None) -> AttentionMask:
  """Builds the causal mask of whole sequences, at the positions 0..length-1."""
  positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
  return AttentionMask(positions_BT, positions_BT, pattern=pattern, contiguous=True)


def packed(
  positions_BT: jax.Array, segments_BT: jax.Array, *, pattern: Pattern | None = None
) -> AttentionMask:
  """Builds the causal mask of rows of several documents, each of which sees itself only."""
  axes.check('BT,BT', positions_BT, segments_BT)
  return AttentionMask(positions_BT, positions_BT, segments_BT, segments_BT, pattern=pattern)


def over_cache(
  q_positions_BT: jax.Array, cache_length: int, *, pattern: Pattern | None = None
) -> AttentionMask:
  """Builds the causal mask of queries over a cache whose slot s holds the key of position s.

  Slots that are not written yet come after every query, so causality hides them.
  """
  batch = axes.check('BT', q_positions_BT)['B']
  k_positions_BS = jnp.broadcast_to(
    jnp.arange(cache_length, dtype=q_positions_BT.dtype)[None], (batch, cache_length)
  )
  return AttentionMask(q_positions_BT, k_positions_BS, pattern=pattern)
