"""Caches of keys and values in slots, of which each holds one token.

  SlotCache      slot s of a row holds position s
  RollingCache   holds the last positions and, permanently, the first ones, for layers that see
                 no others: a window, with or without sinks

In both, slots past the end of a row come after every query, so causality hides them, and slots
with padding are overwritten when the row reaches them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from model.layers import cache
from model.layers.mixers.kv import Held, LendingCache
from model.layers.mixers.sides import Side
from ops import axes, masks, rows
from ops.masks import AttentionMask

SPARE = 8  # how many tokens a rolling row can be set back
NOWHERE = jnp.iinfo(jnp.int32).max  # the position of a slot without a token: after every query


@cache.register
@dataclasses.dataclass(frozen=True)
class SlotCache(LendingCache, Held):
  """Keys and values of as many positions as there are slots."""

  by_position = True

  keys: Side
  values: Side

  def __post_init__(self):
    _check(self.keys, self.values)

  @property
  def capacity(self):
    return self.keys.slots

  def taken(self, k_BTKH, v_BTKH, positions_BT):
    new = self.written(k_BTKH, v_BTKH, positions_BT)
    return new, new

  def read(self, q_BTNH, mask: AttentionMask, **scores):
    seen = masks.over_cache(mask.q_positions_BT, self.capacity, pattern=mask.pattern)
    return self.keys.attended(self.values, q_BTNH, seen, **scores)

  def written(self, k_BTKH, v_BTKH, positions_BT) -> 'SlotCache':
    """Stores new tokens."""
    rows.check(k_BTKH, self.capacity)
    write = lambda side, x_BTKH: jax.tree.map(
      lambda all_, new: rows.write(all_, new, positions_BT[:, 0]), side, side.of(x_BTKH)
    )
    return SlotCache(write(self.keys, k_BTKH), write(self.values, v_BTKH))


@cache.register
@dataclasses.dataclass(frozen=True)
class RollingCache(LendingCache, Held):
  """Keys and values of the `first` positions and of the last ones.

  Slot s < first holds position s. The other slots take turns: position p is in slot
  first + (p - first) % (slots - first). `positions_BS` are the positions that the slots hold.
  """

  spare = SPARE

  keys: Side
  values: Side
  positions_BS: jax.Array = cache.array('BS')
  first: int = cache.static(default=0)

  def __post_init__(self):
    _check(self.keys, self.values)

  @classmethod
  def of(cls, keys: Side, values: Side, first: int = 0) -> 'RollingCache':
    """An empty cache of two empty sides."""
    batch = jax.tree.leaves(keys)[0].shape[0]
    return cls(keys, values, jnp.full((batch, keys.slots), NOWHERE, jnp.int32), first)

  @property
  def capacity(self):
    return None

  def read(self, q_BTNH, mask: AttentionMask, **scores):
    seen = AttentionMask(mask.q_positions_BT, self.positions_BS, pattern=mask.pattern)
    return self.keys.attended(self.values, q_BTNH, seen, **scores)

  def taken(self, k_BTKH, v_BTKH, positions_BT) -> tuple['RollingCache', 'RollingCache']:
    new = self._written(k_BTKH, v_BTKH, positions_BT)
    # With several tokens, the last may have taken the places of what the first ones see.
    one = k_BTKH.shape[1] == 1
    return new, new if one else self._before_and(k_BTKH, v_BTKH, positions_BT)

  def _before_and(self, k_BTKH, v_BTKH, positions_BT) -> 'RollingCache':
    """The tokens before the new ones, followed by the new ones in slots of their own."""
    earlier_BS = jnp.where(self.positions_BS < positions_BT[:, :1], self.positions_BS, NOWHERE)
    new_BT = jnp.where(cache.is_token(positions_BT), positions_BT, NOWHERE)
    before = dataclasses.replace(self, positions_BS=earlier_BS)
    new = RollingCache(self.keys.of(k_BTKH), self.values.of(v_BTKH), new_BT, self.first)
    return jax.tree.map(lambda *both: jnp.concatenate(both, 1), before, new)

  def _written(self, k_BTKH, v_BTKH, positions_BT) -> 'RollingCache':
    first, turns = self.first, self.keys.slots - self.first
    new = RollingCache(self.keys.of(k_BTKH), self.values.of(v_BTKH), positions_BT, first)
    if positions_BT.shape[1] == 1:
      at_B = positions_BT[:, 0]
      at_B = jnp.where(at_B < first, at_B, first + (at_B - first) % turns)
      return jax.tree.map(lambda all_, one: rows.write(all_, one, at_B), self, new)
    # A slot takes the last new position that belongs to it, if there is one.
    begin_B1, last_B1 = positions_BT[:, :1], positions_BT[:, -1:]
    slot_BS = jnp.arange(self.keys.slots, dtype=jnp.int32)[None]
    held_BS = last_B1 - (last_B1 - slot_BS) % turns
    held_BS = jnp.where(slot_BS < first, jnp.where(slot_BS <= last_B1, slot_BS, -1), held_BS)
    belongs_BS = (held_BS >= first) | (slot_BS < first)
    token_BS = jnp.where(belongs_BS, held_BS - begin_B1, -1)
    return jax.tree.map(lambda all_, one: _taken(all_, one, token_BS), self, new)


def _taken(all_: jax.Array, new: jax.Array, token_BS: jax.Array) -> jax.Array:
  """The slots with token t of the new ones where t is not negative."""
  rest = (1,) * (all_.ndim - 2)
  at = jnp.maximum(token_BS, 0).reshape(*token_BS.shape, *rest)
  taken = jnp.take_along_axis(new.astype(all_.dtype), at, axis=1)
  return jnp.where((token_BS >= 0).reshape(at.shape), taken, all_)


def _check(keys, values):
  arrays = [jax.tree.leaves(side)[:1] for side in (keys, values)]
  if all(arrays):
    axes.check_fields('...BSKH,...BSKH', *(one for (one,) in arrays))
