"""A cache of a fixed number of tokens per key/value head; a policy chooses those that stay.

Each key/value head of a text chooses by itself, so here it is a row of its own: in `Tokens` and
`Queries`, B is texts times key heads, K is 1, and N is the query heads of one key head. The result
of a text does not depend on the other texts of the batch.

In a call with several tokens, each of them attends to the kept tokens and to all new ones up to
itself, exactly; then the policy chooses among kept and new tokens. So a prompt that comes in one
call is seen whole, and a prompt that comes in several calls sees what was kept of its earlier
parts. A call with one token evicts the least important token if all slots are taken, and writes the
new one into its slot. Nothing is evicted before a text is longer than the budget. Keys stay rotated
by the positions of their tokens in the text.

Evicted tokens cannot return: a row can be set back to an earlier length, but not to what it held
then. Beside its key and value, a token takes 8 bytes for each key head: its position and its score.
"""

import abc
import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from einops import rearrange

from model.layers import cache
from model.layers.mixers.kv import KVCache
from model.layers.mixers.sides import Side
from model.layers.mixers.slots import NOWHERE, SlotCache
from ops import axes, received, rows
from ops.masks import AttentionMask
from ops.patterns import Pattern


@cache.register
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Keys and values with their positions, or NOWHERE for an empty slot, and a policy's scores."""

  keys: Side
  values: Side
  positions_BS: jax.Array = cache.array('BS')
  scores_BS: jax.Array = cache.array('BS')

  def __post_init__(self):
    axes.check_fields('...BS,...BS', self.positions_BS, self.scores_BS)

  @property
  def held_BS(self) -> jax.Array:
    """Which slots hold a token."""
    return self.positions_BS != NOWHERE

  def before(self, starts_B1: jax.Array) -> Self:
    """The tokens before a position."""
    earlier_BS = jnp.where(self.positions_BS < starts_B1, self.positions_BS, NOWHERE)
    return dataclasses.replace(self, positions_BS=earlier_BS)

  def joined(self, others: Self) -> Self:
    return jax.tree.map(lambda *both: jnp.concatenate(both, 1), self, others)

  def taken(self, slots_BS: jax.Array) -> Self:
    """The tokens in some slots."""
    lifted = lambda a: slots_BS.reshape(*slots_BS.shape, *(1,) * (a.ndim - 2))
    return jax.tree.map(lambda a: jnp.take_along_axis(a, lifted(a), axis=1), self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queries:
  """New tokens' queries, and how they score keys."""

  q_BTNH: jax.Array
  positions_BT: jax.Array
  counted_BT: jax.Array  # those that are no padding
  sinks_KG: jax.Array | None  # of the heads of one text; its key heads are rows here
  pattern: Pattern | None
  scale: float
  softcap: float | None

  def last(self, count: int) -> Self:
    """The last `count` that are not padding; if there are fewer, the others are masked out."""
    total_B1 = self.counted_BT.sum(1, keepdims=True)
    at_BT = total_B1 - count + jnp.arange(count)[None]
    take = lambda a: jnp.take_along_axis(a, jnp.maximum(at_BT, 0), 1)
    q_BTNH = jnp.take_along_axis(self.q_BTNH, jnp.maximum(at_BT, 0)[..., None, None], 1)
    positions_BT = take(self.positions_BT)
    return dataclasses.replace(
      self, q_BTNH=q_BTNH, positions_BT=positions_BT, counted_BT=at_BT >= 0
    )

  def received(self, tokens: Tokens) -> jax.Array:
    """The attention that each of the tokens receives from all of the queries: float32 [B, S]."""
    sinks_BN = None
    if self.sinks_KG is not None:
      sinks_BN = jnp.tile(self.sinks_KG, (len(self.q_BTNH) // len(self.sinks_KG), 1))
    found_BKS = received.received(
      self.q_BTNH,
      tokens.keys.floats(self.q_BTNH.dtype),
      self._over(tokens),
      self.counted_BT,
      scale=self.scale,
      softcap=self.softcap,
      sinks_BN=sinks_BN,
    )
    return found_BKS[:, 0]

  def attended(self, tokens: Tokens) -> jax.Array:
    """Attends to tokens: y_BTNH."""

    def attend(q_BTNH, tokens, mask, sinks_N):
      scores = {'scale': self.scale, 'softcap': self.softcap, 'sinks_N': sinks_N}
      return tokens.keys.attended(tokens.values, q_BTNH, mask, **scores)

    arguments = self.q_BTNH, tokens, self._over(tokens)
    if self.sinks_KG is None:
      return attend(*arguments, None)
    heads = len(self.sinks_KG)
    by_head = jax.tree.map(lambda a: a.reshape(-1, heads, *a.shape[1:]), arguments)
    y = jax.vmap(attend, in_axes=(1, 1, 1, 0), out_axes=1)(*by_head, self.sinks_KG)
    return y.reshape(self.q_BTNH.shape)

  def _over(self, tokens):
    return AttentionMask(self.positions_BT, tokens.positions_BS, pattern=self.pattern)


class Policy(abc.ABC):
  """Chooses the tokens that stay; a frozen dataclass."""

  budget: int

  @abc.abstractmethod
  def arrival(self, k_BTKH: jax.Array) -> jax.Array:
    """The scores of tokens that are new: float32 [B, T]."""

  @abc.abstractmethod
  def scores(self, queries: Queries, tokens: Tokens) -> jax.Array:
    """The scores of the tokens after the queries of a call: float32 [B, S]."""

  @abc.abstractmethod
  def ranks(self, tokens: Tokens, last_B1: jax.Array) -> jax.Array:
    """How important it is that each token stays, where the text ends at `last_B1`: float32 [B, S].

    -inf for an empty slot. Fewer than `budget` of them are infinite.
    """


@cache.register
@dataclasses.dataclass(frozen=True)
class EvictedCache(KVCache):
  """Holds as many tokens of each key/value head as the policy's budget.

  All arrays of `tokens` are [B, K, S, ...] here, where B is texts; keys have no second K.
  """

  tokens: Tokens = cache.rows('BK')
  policy: Policy = cache.static()

  @classmethod
  def of(cls, slots: SlotCache, policy: Policy) -> 'EvictedCache':
    """An empty cache with the shapes and types of another one."""

    def empty(a):  # [B, S, K, ...]
      return jnp.zeros((a.shape[0], a.shape[2], policy.budget, *a.shape[3:]), a.dtype)

    keys, values = (jax.tree.map(empty, side) for side in (slots.keys, slots.values))
    shape = jax.tree.leaves(keys)[0].shape[:3]
    positions = jnp.full(shape, NOWHERE, jnp.int32)
    return cls(Tokens(keys, values, positions, jnp.zeros(shape, jnp.float32)), policy)

  @property
  def capacity(self):
    return None

  def attend(self, q_BTNH, k_BTKH, v_BTKH, mask: AttentionMask, *, scale, softcap, sinks_N):
    heads = k_BTKH.shape[2]
    row_each = lambda x: rearrange(x, 'B T (K N) H -> (B K) T N H', K=heads)
    positions_BT = jnp.repeat(mask.q_positions_BT, heads, axis=0)
    queries = Queries(
      q_BTNH=row_each(q_BTNH),
      positions_BT=positions_BT,
      counted_BT=cache.is_token(positions_BT),
      sinks_KG=None if sinks_N is None else rearrange(sinks_N, '(K G) -> K G', K=heads),
      pattern=mask.pattern,
      scale=scale,
      softcap=softcap,
    )
    old = _folded(self.tokens).before(positions_BT[:, :1])
    new = self._arrived(old, row_each(k_BTKH), row_each(v_BTKH), queries)
    if k_BTKH.shape[1] == 1:
      slots_B = self.policy.ranks(old, positions_BT).argmin(1)
      seen = _put(old, new, slots_B, heads)
      kept = self._scored(seen, queries)
    else:
      seen = old.joined(new)
      kept = self._chosen(self._scored(seen, queries), positions_BT[:, -1:])
    y_BTNH = rearrange(queries.attended(seen), '(B K) T N H -> B T (K N) H', K=heads)
    return EvictedCache(_unfolded(kept, heads), self.policy), y_BTNH

  def _arrived(self, old: Tokens, k_BTKH, v_BTKH, queries: Queries) -> Tokens:
    positions_BT = jnp.where(queries.counted_BT, queries.positions_BT, NOWHERE)
    scores_BT = self.policy.arrival(k_BTKH)
    return Tokens(old.keys.of(k_BTKH), old.values.of(v_BTKH), positions_BT, scores_BT)

  def _scored(self, tokens: Tokens, queries: Queries) -> Tokens:
    return dataclasses.replace(tokens, scores_BS=self.policy.scores(queries, tokens))

  def _chosen(self, tokens: Tokens, last_B1) -> Tokens:
    """The most important tokens, in their present order."""
    _, slots_BS = jax.lax.top_k(self.policy.ranks(tokens, last_B1), self.policy.budget)
    return tokens.taken(jnp.sort(slots_BS, 1))


def _put(tokens: Tokens, one: Tokens, slots_B, heads: int) -> Tokens:
  """Writes one token into a slot of each row."""
  # Unfolded: a native write into a folded view would copy all of it.
  slots_BK = slots_B.reshape(-1, heads)
  put = lambda all_, new: rows.put(all_, new[:, :, 0], slots_BK)
  return _folded(jax.tree.map(put, _unfolded(tokens, heads), _unfolded(one, heads)))


def _folded(tokens: Tokens) -> Tokens:
  """Turns each key head of a text into a row; the K of keys and values is then 1."""
  side = lambda a: rearrange(a, 'B K S ... -> (B K) S 1 ...')
  return _each(tokens, side, lambda a: rearrange(a, 'B K S -> (B K) S'))


def _unfolded(tokens: Tokens, heads: int) -> Tokens:
  """Turns rows back into the key heads of a text, as tokens are stored."""
  side = lambda a: rearrange(a, '(B K) S 1 ... -> B K S ...', K=heads)
  return _each(tokens, side, lambda a: rearrange(a, '(B K) S -> B K S', K=heads))


def _each(tokens: Tokens, side, flat) -> Tokens:
  keys, values = (jax.tree.map(side, one) for one in (tokens.keys, tokens.values))
  return Tokens(keys, values, flat(tokens.positions_BS), flat(tokens.scores_BS))
