"""A cache of latents: one short vector for each token, which all heads read.

The vector is a token's latent, from which the keys and values of all heads can be made, followed by
its rotated keys. It is stored once, as a single key/value head, and is key and value at the same
time; queries that are brought into the space of the latents attend to it as it is stored. In 8 bits
it has one scale, which the latent and the rotated keys share. Bytes per token and layer of
DeepSeek-V3 (512 + 64 numbers): bfloat16 1152, int8 578; its 128 heads of keys and values would take
81,920 in bfloat16.
"""

import dataclasses

import jax

from model.layers import cache
from model.layers.cache import Cache, CacheFormat
from model.layers.mixers.sides import SIDES, Side
from ops import masks, rows
from ops.masks import AttentionMask


@cache.register
@dataclasses.dataclass(frozen=True)
class LatentCache(Cache):
  """The vectors [B, S, 1, H] of as many positions as there are slots; slot s holds position s."""

  by_position = True

  tokens: Side

  @classmethod
  def empty(cls, shape: tuple[int, int, int], dtype, format: CacheFormat) -> 'LatentCache':
    """A cache for (batch, capacity, numbers of a token). Raises ValueError for 'int4'."""
    if format not in SIDES:
      raise ValueError(
        f'there is no cache of latents in the format {format!r}; use {", ".join(SIDES)}'
      )
    batch, capacity, width = shape
    return cls(SIDES[format].empty((batch, capacity, 1, width), dtype))

  @property
  def capacity(self):
    return self.tokens.slots

  def written(self, new_BTKH: jax.Array, positions_BT: jax.Array) -> 'LatentCache':
    """Stores new tokens."""
    rows.check(new_BTKH, self.capacity)
    write = lambda all_, new: rows.write(all_, new, positions_BT[:, 0])
    return LatentCache(jax.tree.map(write, self.tokens, self.tokens.of(new_BTKH)))

  def mask(self, positions_BT: jax.Array) -> AttentionMask:
    """What queries at these positions see."""
    return masks.over_cache(positions_BT, self.capacity)

  def attended(self, q_BTNH: jax.Array, positions_BT: jax.Array, *, scale: float) -> jax.Array:
    """The mean of the vectors that each query sees, weighted by its scores: [B, T, N, H]."""
    seen = self.mask(positions_BT)
    return self.tokens.attended(self.tokens, q_BTNH, seen, scale=scale)
