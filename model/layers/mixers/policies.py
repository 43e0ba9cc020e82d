"""Policies: which tokens stay in a cache of limited size. Each is a class or function and a row.

  streaming   the first 4 and the last tokens (Xiao et al., 2023, StreamingLLM,
              https://arxiv.org/abs/2309.17453)
  h2o         those that all queries so far gave most attention, and the recent half
              (Zhang et al., 2023, https://arxiv.org/abs/2306.14048)
  snapkv      those that the last 32 queries of a prompt attend to, with their neighbours
              (Li et al., 2024, https://arxiv.org/abs/2404.14469)
  pyramidkv   as snapkv, of which lower layers keep more and higher layers less (Cai et al., 2024,
              https://arxiv.org/abs/2406.02069)
  knorm       those with the smallest keys, and the recent quarter; no query is looked at (Devoto et
              al., 2024, https://arxiv.org/abs/2406.11430)

All of them keep the first 4 tokens, without which attention is disturbed (StreamingLLM), also where
the papers leave that to the scores. Differs from the papers: streaming keeps the rotations of the
tokens' places in the text, so it does not carry a model beyond the positions it was trained for; in
decoding, the new token is part of the budget. SnapKV and PyramidKV let the cache grow in decoding;
here tokens after the prompt take the slots of the prompt's least important ones, up to a quarter
of those that are not protected, and then the slots of the oldest of themselves.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from model.layers.mixers.evicted import EvictedCache, Policy, Queries, Tokens
from model.layers.mixers.kv import KVCache
from model.layers.mixers.slots import RollingCache, SlotCache

FIRST = 4
WINDOW, POOL = 32, 5  # of SnapKV: the queries that choose, and the neighbours of a score's mean
STEEPNESS = 20  # of PyramidKV: the last layer has this part of what a layer has on average
UNSCORED = -1.0  # below any attention received


@dataclasses.dataclass(frozen=True)
class HeavyHitters(Policy):
  """Sums all attention received (H2O). Each call computes the scores a second time."""

  budget: int
  first: int = FIRST

  def arrival(self, k_BTKH):
    return jnp.zeros(k_BTKH.shape[:2], jnp.float32)

  def scores(self, queries: Queries, tokens: Tokens):
    return tokens.scores_BS + queries.received(tokens)

  def ranks(self, tokens, last_B1):
    return _with_recent(tokens, last_B1, self.first, self.budget // 2)


@dataclasses.dataclass(frozen=True)
class KeyNorms(Policy):
  """Keeps the smallest keys."""

  budget: int
  first: int = FIRST

  def arrival(self, k_BTKH):
    return -jnp.linalg.norm(k_BTKH.astype(jnp.float32), axis=-1)[:, :, 0]

  def scores(self, queries, tokens):
    return tokens.scores_BS

  def ranks(self, tokens, last_B1):
    return _with_recent(tokens, last_B1, self.first, self.budget // 4)


@dataclasses.dataclass(frozen=True)
class SnapKV(Policy):
  """The last queries of a call with several tokens choose, and their own tokens stay."""

  budget: int
  window: int = WINDOW
  pool: int = POOL
  first: int = FIRST

  def arrival(self, k_BTKH):
    return jnp.full(k_BTKH.shape[:2], UNSCORED, jnp.float32)

  def scores(self, queries: Queries, tokens: Tokens):
    length = queries.q_BTNH.shape[1]
    if length == 1:
      return tokens.scores_BS
    ends_B1 = queries.positions_BT[:, -1:]
    recent_BS = tokens.held_BS & (tokens.positions_BS > ends_B1 - self.window)
    received_BS = queries.last(min(self.window, length)).received(tokens)
    received_BS = jnp.where(recent_BS | ~tokens.held_BS, 0.0, received_BS)
    return jnp.where(recent_BS, jnp.inf, _pooled(received_BS, tokens.positions_BS, self.pool))

  def ranks(self, tokens, last_B1):
    del last_B1
    later_BS = tokens.held_BS & (tokens.scores_BS == UNSCORED)
    room = max(1, (self.budget - self.window - self.first) // 4)
    full_B1 = later_BS.sum(1, keepdims=True) >= room
    # Below all scores, and the older the lower.
    age_BS = -1 / (1 + tokens.positions_BS.astype(jnp.float32))
    ranks_BS = jnp.where(later_BS, jnp.where(full_B1, age_BS, jnp.inf), tokens.scores_BS)
    return _protected(tokens, tokens.positions_BS < self.first, ranks_BS)


def _with_recent(tokens: Tokens, last_B1, first: int, recent: int):
  positions_BS = tokens.positions_BS
  safe_BS = (positions_BS < first) | (positions_BS > last_B1 - recent)
  return _protected(tokens, safe_BS, tokens.scores_BS)


def _protected(tokens: Tokens, safe_BS, ranks_BS):
  return jnp.where(tokens.held_BS, jnp.where(safe_BS, jnp.inf, ranks_BS), -jnp.inf)


def _pooled(scores_BS, positions_BS, width: int):
  """The mean over neighbours in the order of positions; zeros beyond the ends."""
  order_BS = jnp.argsort(positions_BS, axis=1)
  sorted_BS = jnp.take_along_axis(scores_BS, order_BS, 1)
  side = width // 2
  padded = jnp.pad(sorted_BS, ((0, 0), (side, side)))
  sums = sum(padded[:, i : i + scores_BS.shape[1]] for i in range(width))
  return jnp.take_along_axis(sums / width, jnp.argsort(order_BS, axis=1), 1)


def flat(budget: int, layers: int) -> list[int]:
  """The same budget for each of the layers."""
  return [budget] * layers


def pyramid(budget: int, layers: int) -> list[int]:
  """Budgets that fall linearly from layer to layer, of the same sum as the flat ones."""
  shared, least = budget - LEAST_SNAP, 1 / STEEPNESS
  ends = [0]
  for i in range(layers):
    share = 2 - least - i * (2 - 2 * least) / (layers - 1) if layers > 1 else 1
    ends.append(ends[-1] + share * shared)
  return [LEAST_SNAP + round(end) - round(begin) for begin, end in zip(ends, ends[1:])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """A row of the table.

  `make` makes an empty cache for a number of tokens, with the shapes and types of another one.
  """

  make: Callable[[SlotCache, int], KVCache]
  least: int  # the smallest budget
  budgets: Callable[[int, int], list[int]] = flat  # (budget, layers) -> one for each layer


def _by(policy: Callable[[int], Policy]) -> Callable[[SlotCache, int], KVCache]:
  return lambda slots, budget: EvictedCache.of(slots, policy(budget))


def _streaming(slots: SlotCache, budget: int) -> KVCache:
  def empty(a):  # [B, S, K, ...]
    return jnp.zeros((a.shape[0], budget, *a.shape[2:]), a.dtype)

  return RollingCache.of(*(jax.tree.map(empty, one) for one in (slots.keys, slots.values)), FIRST)


LEAST_SNAP = FIRST + WINDOW + 4
METHODS = {
  'streaming': Method(make=_streaming, least=FIRST + 1),
  'h2o': Method(make=_by(HeavyHitters), least=4 * FIRST),
  'snapkv': Method(make=_by(SnapKV), least=LEAST_SNAP),
  'pyramidkv': Method(make=_by(SnapKV), least=LEAST_SNAP, budgets=pyramid),
  'knorm': Method(make=_by(KeyNorms), least=4 * FIRST),
}
