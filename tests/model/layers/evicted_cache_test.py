"""Caches that give tokens up, against lists of tokens in float64 numpy, head by head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.evicted import EvictedCache
from model.layers.mixers.policies import METHODS, UNSCORED, HeavyHitters, KeyNorms, SnapKV, pyramid
from model.layers.mixers.slots import NOWHERE, RollingCache
from ops import masks

B, N, K, H, LENGTH = 2, 4, 2, 8, 40
HEADS = AttentionConfig(query_heads=N, kv_heads=K, head_width=H)
SCALE = 1.5 * H**-0.5
FLOAT32, CODED = 1e-5, 0.05  # an int8 code is off by at most half of 1/127 of the largest number
POLICIES = {
  'h2o': HeavyHitters(12, first=2),
  'snapkv': SnapKV(15, window=4, pool=3, first=2),
  'knorm': KeyNorms(12, first=2),
}
policies = pytest.mark.parametrize('name', POLICIES)


@functools.partial(jax.jit, static_argnames='softcap')
def _attend(cache, q, k, v, positions_BT, sinks_N=None, softcap=None):
  mask = masks.packed(positions_BT, jnp.zeros_like(positions_BT))
  return cache.attend(q, k, v, mask, scale=SCALE, softcap=softcap, sinks_N=sinks_N)


def _cache(policy, batch=B, format='float'):
  slots = jax.eval_shape(lambda: HEADS.cache(batch, 99, jnp.float32, format))
  return EvictedCache.of(slots, policy)


def _draw(rng, length=LENGTH, batch=B):
  draw = lambda heads: rng.normal(size=(batch, length, heads, H)).astype(np.float32)
  return draw(N), draw(K), draw(K)


def _feed(cache, q, k, v, lengths, **scores):
  """Feeds all rows, so many tokens at a time, and joins what their queries find."""
  start, found = 0, []
  for length in lengths:
    now = slice(start, start + length)
    positions_BT = jnp.broadcast_to(jnp.arange(start, start + length), (len(q), length))
    cache, y = _attend(cache, q[:, now], k[:, now], v[:, now], positions_BT, **scores)
    found.append(np.asarray(y))
    start += length
  return cache, np.concatenate(found, 1)


class _Head:
  """One key head of one row: the positions that stay, with their scores, as the papers say."""

  def __init__(self, policy, q_TGH, k_TH, v_TH, softcap=None, sinks_G=None):
    self.policy, self.q, self.k, self.v = policy, q_TGH, k_TH.astype(float), v_TH.astype(float)
    self.softcap, self.sinks, self.scores = softcap, sinks_G, {}

  def feed(self, start, length):
    """What the queries find, [T, G, H]."""
    policy, new = self.policy, range(start, start + length)
    if length == 1 and len(self.scores) == policy.budget:
      del self.scores[min(self.scores, key=lambda s: self._rank(s, start))]
    arrival = {
      HeavyHitters: lambda s: 0.0,
      SnapKV: lambda s: UNSCORED,
      KeyNorms: lambda s: -np.linalg.norm(self.k[s]),
    }[type(policy)]
    self.scores |= {s: arrival(s) for s in new}
    y, received = self._attend(new)
    if isinstance(policy, HeavyHitters):
      for s in self.scores:
        self.scores[s] += received[:, :, s].sum(0).mean()
    if isinstance(policy, SnapKV) and length > 1:
      window = policy.window
      sums = received[-window:].sum(0).mean(0)
      held, last = sorted(self.scores), start + length - 1
      prefix = [sums[s] if s <= last - window else 0.0 for s in held]
      side = policy.pool // 2
      for i, s in enumerate(held):
        near = prefix[max(0, i - side) : i + side + 1]
        self.scores[s] = sum(near) / policy.pool if s <= last - window else np.inf
    while len(self.scores) > policy.budget:
      del self.scores[min(self.scores, key=lambda s: self._rank(s, start + length - 1))]
    return y

  def _attend(self, new):
    y, received = np.zeros((len(new), *self.q.shape[1:])), []
    for t, g in np.ndindex(y.shape[:2]):
      weights = np.zeros(len(self.k))
      for s in self.scores:
        if s <= new[t]:
          score = self.k[s] @ self.q[new[t], g] * SCALE
          weights[s] = np.exp(
            score if self.softcap is None else self.softcap * np.tanh(score / self.softcap)
          )
      weights /= weights.sum() + (0 if self.sinks is None else np.exp(self.sinks[g]))
      y[t, g] = weights @ self.v
      received.append(weights)
    return y, np.reshape(received, (len(new), -1, len(self.k)))

  def _rank(self, s, last):
    """The least goes first."""
    policy = self.policy
    if s < policy.first:
      return (3, 0)
    if isinstance(policy, SnapKV):
      later = [one for one, score in self.scores.items() if score == UNSCORED]
      room = (policy.budget - policy.window - policy.first) // 4
      if s in later:
        return (0, s) if len(later) >= room else (2, 0)
      return (1, self.scores[s])
    recent = policy.budget // (2 if isinstance(policy, HeavyHitters) else 4)
    return (2, 0) if s > last - recent else (1, self.scores[s])


def _by_hand(policy, q, k, v, lengths, softcap=None, sinks_N=None):
  """What each query finds, and the positions that stay [B][K]."""
  y, kept, groups = np.zeros(q.shape), [], N // K
  for b in range(len(q)):
    kept.append([])
    for head in range(K):
      of = slice(head * groups, (head + 1) * groups)
      sinks = None if sinks_N is None else sinks_N[of]
      one = _Head(policy, q[b, :, of], k[b, :, head], v[b, :, head], softcap, sinks)
      start = 0
      for length in lengths:
        y[b, start : start + length, of] = one.feed(start, length)
        start += length
      kept[-1].append(sorted(one.scores))
  return y, kept


def _held(cache):
  positions = np.sort(np.asarray(cache.tokens.positions_BS), -1)
  return [[[s for s in head if s != NOWHERE] for head in row] for row in positions.tolist()]


FEEDS = {
  'a prompt, then one by one': [25] + [1] * 15,
  'one by one': [1] * LENGTH,
  'prompts between': [9, 1, 1, 1, 1, 9, 1, 1, 1, 3, 6, 1, 1, 1, 1, 1, 1],
}


@policies
@pytest.mark.parametrize('feed', FEEDS)
@pytest.mark.quick(feed=('a prompt, then one by one', 'prompts between'))
def test_it_keeps_what_the_papers_keep(rng, name, feed):
  (q, k, v), policy, lengths = _draw(rng), POLICIES[name], FEEDS[feed]
  cache, found = _feed(_cache(policy), q, k, v, lengths)
  expected, kept = _by_hand(policy, q, k, v, lengths)
  assert _held(cache) == kept
  np.testing.assert_allclose(found, expected, atol=FLOAT32)
  if (
    feed == 'a prompt, then one by one'
  ):  # it sees itself whole, and no head keeps what another does
    exact = _by_hand(KeyNorms(99), q, k, v, lengths)[0]
    np.testing.assert_allclose(found[:, :25], exact[:, :25], atol=FLOAT32)
    assert np.abs(found - exact)[:, 25:].max() > 100 * FLOAT32
    assert len({tuple(head) for row in kept for head in row}) == B * K


def test_sinks_and_a_soft_cap_count(rng):
  (q, k, v), policy, lengths = _draw(rng), POLICIES['h2o'], FEEDS['a prompt, then one by one']
  scores = {'sinks_N': rng.normal(size=N).astype(np.float32), 'softcap': 2.0}
  cache, found = _feed(_cache(policy), q, k, v, lengths, **scores)
  expected, kept = _by_hand(policy, q, k, v, lengths, **scores)
  assert _held(cache) == kept
  np.testing.assert_allclose(found, expected, atol=FLOAT32)


@policies
def test_int8_chooses_by_what_is_stored(rng, name):
  (q, k, v), policy, lengths = _draw(rng), POLICIES[name], FEEDS['a prompt, then one by one']
  cache, found = _feed(_cache(policy, format='int8'), q, k, v, lengths)
  side = cache.tokens.keys
  stored = [np.asarray(side.of(jnp.asarray(x)).floats(jnp.float32)) for x in (k, v)]
  expected, kept = _by_hand(policy, q, *stored, lengths)
  np.testing.assert_allclose(found[:, :25], expected[:, :25], atol=FLOAT32)
  if name == 'knorm':  # norms are of the keys before they are coded
    expected, kept = _by_hand(policy, q, k, v, lengths)
  assert _held(cache) == kept
  np.testing.assert_allclose(found, expected, atol=CODED if name == 'knorm' else FLOAT32)


@pytest.mark.parametrize(
  'name, format', [('h2o', 'float'), ('h2o', 'int8'), ('snapkv', 'int8'), ('knorm', 'float')]
)
def test_a_budget_for_all_tokens_changes_nothing(rng, name, format):
  (q, k, v), lengths = _draw(rng), [9, 1, 1, 1, 9, 1]
  slots = HEADS.cache(B, LENGTH, jnp.float32, format)
  roomy = dataclasses.replace(POLICIES[name], budget=LENGTH)
  _, expected = _feed(slots, q, k, v, lengths)
  _, found = _feed(_cache(roomy, format=format), q, k, v, lengths)
  np.testing.assert_allclose(found, expected, atol=1e-6)  # in another order
  _, expected = _feed(slots, q, k, v, [1] * 3)
  _, found = _feed(_cache(roomy, format=format), q, k, v, [1] * 3)
  np.testing.assert_array_equal(found, expected)


@policies
@pytest.mark.quick(name=('h2o', 'snapkv'))
def test_padded_rows_of_different_lengths_equal_the_same_rows_alone(rng, name):
  (q, k, v), policy = _draw(rng), POLICIES[name]
  lengths, padded = np.array([3, 22]), 25
  spoilt = [np.array(x[:, :padded]) for x in (q, k, v)]
  for x in spoilt:
    x[np.arange(padded)[None] >= lengths[:, None]] = 3
  positions = np.minimum(np.arange(padded)[None], lengths[:, None] - 1)
  cache, first = _attend(_cache(policy), *spoilt, jnp.asarray(positions))
  rows = [
    _by_hand(policy, *(x[b : b + 1] for x in (q, k, v)), [lengths[b]] + [1] * 15) for b in range(B)
  ]
  for b, (expected, _) in enumerate(rows):
    np.testing.assert_allclose(first[b, : lengths[b]], expected[0, : lengths[b]], atol=FLOAT32)
  for step in range(15):
    at = (lengths + step)[:, None]
    token = [np.take_along_axis(x, at[..., None, None], 1) for x in (q, k, v)]
    cache, y = _attend(cache, *token, jnp.asarray(at))
    for b, (expected, _) in enumerate(rows):
      np.testing.assert_allclose(y[b, 0], expected[0, at[b, 0]], atol=FLOAT32)
  assert _held(cache) == [kept[0] for _, kept in rows]


@policies
@pytest.mark.quick(name=('snapkv',))
def test_a_row_of_another_cache_is_inserted(rng, name):
  (q, k, v), policy = _draw(rng), POLICIES[name]
  many, _ = _feed(_cache(policy), q, k, v, [25])
  one, _ = _feed(_cache(policy, 1), *(x[1:] for x in (q, k, v)), [9])
  joined = many.insert(0, one)
  assert _held(joined) == [_held(one)[0], _held(many)[1]]
  now = np.array([[9], [25]])
  token = [np.stack([x[1, 9:10], x[1, 25:26]]) for x in (q, k, v)]
  _, y = _attend(joined, *token, jnp.asarray(now))
  rows = [_by_hand(policy, *(x[1:] for x in (q, k, v)), [length, 1]) for length in (9, 25)]
  expected = np.stack([rows[0][0][0, 9], rows[1][0][0, 25]])
  np.testing.assert_allclose(y[:, 0], expected, atol=FLOAT32)


@policies
def test_no_token_finds_what_comes_after_it(rng, name):
  (q, k, v), (other_q, other_k, other_v) = _draw(rng), _draw(rng)
  policy, lengths, t = POLICIES[name], [9, 16, 1, 1, 9], 20
  mixed = [
    np.concatenate([x[:, :t], y[:, t:]], 1) for x, y in zip((q, k, v), (other_q, other_k, other_v))
  ]
  _, found = _feed(_cache(policy), q, k, v, lengths)
  _, other = _feed(_cache(policy), *mixed, lengths)
  np.testing.assert_array_equal(found[:, :t], other[:, :t])
  assert np.abs(found - other)[:, t:].min(axis=(0, 2, 3)).max() > FLOAT32
  # The suffix does decide what stays of the tokens before it: attention to these alone would leak.
  before = [_feed(_cache(policy), *(x[:, :25] for x in one), [25])[0] for one in ((q, k, v), mixed)]
  early = [[[s for s in head if s < t] for head in _held(cache)[0]] for cache in before]
  assert early[0] != early[1]


@pytest.mark.parametrize('name', ['h2o', 'snapkv'])
def test_a_row_that_is_set_back_forgets_what_came_after(rng, name):
  (q, k, v), policy = _draw(rng), dataclasses.replace(POLICIES[name], budget=30)
  cache, _ = _feed(_cache(policy), q, k, v, [25])
  for length in (1, 3):
    now = slice(20, 20 + length)
    positions_BT = jnp.broadcast_to(jnp.arange(20, 20 + length), (B, length))
    after, y = _attend(cache, q[:, now], k[:, now], v[:, now], positions_BT)
    expected, _ = _by_hand(KeyNorms(99), q, k, v, [20 + length])
    np.testing.assert_allclose(y, expected[:, now], atol=FLOAT32)
    assert _held(after) == [[list(range(20 + length))] * K] * B


def test_streaming_keeps_the_first_tokens_and_the_last(rng):
  q, k, v = _draw(rng)
  slots = jax.eval_shape(lambda: HEADS.cache(B, 99, jnp.float32, 'float'))
  cache = METHODS['streaming'].make(slots, 12)
  assert isinstance(cache, RollingCache) and cache.keys.slots == 12
  _, found = _feed(cache, q, k, v, [25] + [1] * 15)
  for t in (10, 24, 25, 39):
    seen = range(t + 1) if t < 25 else [*range(4), *range(t - 7, t + 1)]
    for b, n in np.ndindex(B, N):
      keys, values = (x[b, list(seen), n * K // N].astype(float) for x in (k, v))
      weights = np.exp(keys @ q[b, t, n] * SCALE)
      np.testing.assert_allclose(found[b, t, n], weights / weights.sum() @ values, atol=FLOAT32)


@pytest.mark.parametrize('format, slot', [('float', 2 * 4 * H), ('int8', 2 * (H + 2))])
def test_the_bytes_are_those_of_the_budget(format, slot):
  cache = _cache(POLICIES['h2o'], format=format)
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == B * K * 12 * (slot + 8)
  letters = cache.letters().tokens
  assert letters.positions_BS == letters.scores_BS == 'BKS'
  assert jax.tree.leaves(letters.keys)[0] == 'BKSH'
  assert [len(a) for a in jax.tree.leaves(letters)] == [a.ndim for a in jax.tree.leaves(cache)]


def test_a_donated_cache_is_written_in_place(rng):
  cache = _cache(dataclasses.replace(POLICIES['snapkv'], budget=999))
  token = [x[:, :1] for x in _draw(rng)]
  arguments = cache, *token, jnp.full((B, 1), 50)
  compiled = jax.jit(_attend.__wrapped__, donate_argnums=0).lower(*arguments).compile()
  side = cache.tokens.keys.x_BSKH.nbytes
  assert compiled.memory_analysis().temp_size_in_bytes < side


@pytest.mark.parametrize('budget, layers', [(1024, 30), (45, 4), (41, 7), (500, 1), (40, 3)])
def test_a_pyramid_falls_and_has_the_flat_total(budget, layers):
  found = pyramid(budget, layers)
  assert sum(found) == budget * layers and min(found) >= METHODS['pyramidkv'].least
  steps = -np.diff(found)
  assert (steps >= 0).all() and (not len(steps) or steps.max() - steps.min() <= 2)
  if budget == 1024:
    assert found[0] > 1.9 * 1000 and found[-1] == pytest.approx(40 + 984 / 20, abs=1)
