"""Which keys a query may see: causality, a sliding window and segments, kept as positions.

An `AttentionMask` is two or four small integer arrays. `dense` makes the [B, T, S] booleans for the
readable form; a kernel that masks by position never needs them. Segments (several documents packed
into one row) are numbers that must agree; any integers will do.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops import axes


@dataclasses.dataclass(frozen=True)
class AttentionMask:
  """Query t sees key s if k <= q and q - k < window for their positions, in the same segment.

  `window` counts the query itself; None means no window. `contiguous` promises that queries and
  keys are both at the positions 0..T-1 and that there are no segments, so that a kernel's own
  causal flag and window say it all; it cannot be checked under jit, and `causal` sets it.
  """

  q_positions_BT: jax.Array
  k_positions_BS: jax.Array
  q_segments_BT: jax.Array | None = None
  k_segments_BS: jax.Array | None = None
  window: int | None = None
  contiguous: bool = False

  def __post_init__(self):
    if (self.q_segments_BT is None) != (self.k_segments_BS is None):
      raise ValueError('queries and keys must both have segments, or neither')
    if self.contiguous and self.q_segments_BT is not None:
      raise ValueError('a mask with segments is not contiguous')
    if self.window is not None and self.window < 1:
      raise ValueError(f'a window holds at least one key, not {self.window}')

  def dense(self) -> jax.Array:
    """The mask as booleans [B, T, S]: True where the query sees the key."""
    axes.check('BT,BS,BT,BS', *self._arrays())
    distance_BTS = self.q_positions_BT[:, :, None] - self.k_positions_BS[:, None, :]
    seen_BTS = distance_BTS >= 0
    if self.window is not None:
      seen_BTS &= distance_BTS < self.window
    if self.q_segments_BT is not None:
      seen_BTS &= self.q_segments_BT[:, :, None] == self.k_segments_BS[:, None, :]
    return seen_BTS

  def _arrays(self):
    return self.q_positions_BT, self.k_positions_BS, self.q_segments_BT, self.k_segments_BS


jax.tree_util.register_dataclass(
  AttentionMask,
  data_fields=['q_positions_BT', 'k_positions_BS', 'q_segments_BT', 'k_segments_BS'],
  meta_fields=['window', 'contiguous'],
)


def causal(batch: int, length: int, *, window: int | None = None) -> AttentionMask:
  """Makes the mask of whole sequences that attend to themselves, from position 0 on."""
  positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
  return AttentionMask(positions_BT, positions_BT, window=window, contiguous=True)


def packed(
  positions_BT: jax.Array, segments_BT: jax.Array, *, window: int | None = None
) -> AttentionMask:
  """Makes the mask of rows that hold several documents, each seen by itself alone."""
  axes.check('BT,BT', positions_BT, segments_BT)
  return AttentionMask(positions_BT, positions_BT, segments_BT, segments_BT, window=window)


def over_cache(
  q_positions_BT: jax.Array, cache_length: int, *, window: int | None = None
) -> AttentionMask:
  """Makes the mask of queries over a cache whose slot s holds the key of position s.

  Slots that are not written yet lie after every query, so causality hides them.
  """
  batch = axes.check('BT', q_positions_BT)['B']
  k_positions_BS = jnp.broadcast_to(
    jnp.arange(cache_length, dtype=q_positions_BT.dtype)[None], (batch, cache_length)
  )
  return AttentionMask(q_positions_BT, k_positions_BS, window=window)
