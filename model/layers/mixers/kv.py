"""Caches of keys and values as attention uses them, and what a layer lends of them to others.

A `KVCache` attends for the layer that it belongs to. A `LendingCache` returns the keys and values
that the tokens of a pass see as a `Held`, which queries of later layers can read too. A `Pass` does
so without a cache.
"""

import abc
import dataclasses
from typing import Self

import jax

from model.layers import cache
from model.layers.cache import Cache
from ops.attention import attention
from ops.masks import AttentionMask


class KVCache(Cache):
  """The keys and values of past tokens, which it attends to by itself."""

  @abc.abstractmethod
  def attend(
    self,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None,
    sinks_N: jax.Array | None,
  ) -> tuple[Self, jax.Array]:
    """Adds T new tokens to each row, and attends from them to all tokens of their row so far.

    Only the positions of the queries and the pattern are read from the mask. Returns the cache and
    what `ops.attention.attention` returns for these queries, y_BTNH.
    """


class Held(abc.ABC):
  """The keys and values that the tokens of one pass see."""

  @abc.abstractmethod
  def read(self, q_BTNH: jax.Array, mask: AttentionMask, **scores) -> jax.Array:
    """Attends from the tokens of the pass, with queries of any layer; as `KVCache.attend`."""


class LendingCache(KVCache):
  """A cache in which what tokens see does not depend on their queries."""

  @abc.abstractmethod
  def taken(
    self, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array
  ) -> tuple[Self, Held]:
    """Stores new tokens; returns the cache, and all that the new tokens see."""

  def attend(self, q_BTNH, k_BTKH, v_BTKH, mask, **scores):
    new, held = self.taken(k_BTKH, v_BTKH, mask.q_positions_BT)
    return new, held.read(q_BTNH, mask, **scores)


@cache.register
@dataclasses.dataclass(frozen=True)
class Pass(Held):
  """The keys and values of a pass that has no cache."""

  k_BTKH: jax.Array = cache.array('BTKH')
  v_BTKH: jax.Array = cache.array('BTKH')

  def read(self, q_BTNH, mask, **scores):
    return attention(q_BTNH, self.k_BTKH, self.v_BTKH, mask, **scores)


@cache.register
@dataclasses.dataclass(frozen=True)
class Lent:
  """What a layer that lends returns in place of its cache: the cache, and what later ones read."""

  cache: Cache | None
  held: Held
