"""What a cache of keys and values does for attention."""

import abc
from typing import Self

import jax

from model.layers.cache import Cache
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

    Of the mask, the positions of the queries and the pattern count. Returns the cache and what
    `ops.attention.attention` returns for these queries, y_BTNH.
    """
