"""Attention to blocks of keys that each query chooses: mixture of block attention (MoBA).

Lu et al. (2025), https://arxiv.org/abs/2502.13189. The keys of a text are cut into P blocks of S.
A query sees its own block, up to itself, and of the blocks before it the `top_k` whose mean key has
the largest inner product with the query, in one softmax. A block is chosen after its last token, so
no mean tells of tokens to come. No gradient goes through the choice.

Every query head chooses by itself. The paper defines the choice for one head, and its code repeats
key/value heads for their query heads before it; here grouped heads are read where they are.
Differs from the paper: its k counts the query's own block, `top_k` does not, and `Blocks.first`.

The pairs of a query and a block are sorted by block, as in the paper, and each block is multiplied
with tiles of its queries, so T queries cost T (top_k + 1) S products and as much memory as there
are pairs. No keys are gathered query by query, unless there are few queries (decoding), and then
no others are read. Products with the means, T T / S, are all that grows faster than the text. The
backward pass computes the scores of each tile anew, as in `ops.blocked`.

A row can hold several documents. Blocks are cut by the row, and of a block that has tokens of two
documents the later queries see those of their own; the mean is over these. So no document depends
on another, but its first block may be shorter than it would be alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange

from ops import axes, grouped, moe
from ops.blocked import MASKED

MOST_ROWS = 128  # queries of a tile
AT_ONCE = 2**19  # scores that are held at a time, of one row of the batch
NONE = -1  # the choice of a query that has fewer blocks before it than it may choose


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """How long blocks are, and how many of those before its own a query chooses.

  first: one of the chosen is the first block of the text, whatever its mean. The paper does not
    have it; models that were trained without chosen blocks rest on their first tokens.
  """

  size: int
  top_k: int
  first: bool = False

  def __post_init__(self):
    for name, value in (('block', self.size), ('top_k', self.top_k)):
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f'{name} must be an integer of at least 1, not {value!r}')


def means(k_BSKH: jax.Array, blocks: int, segments_BS: jax.Array | None = None) -> jax.Array:
  """The mean key of each block in float32: [B, P, K, H].

  With segments, the mean is over the tokens of the document that the block ends with.
  """
  k_BPSKH = _cut(k_BSKH, blocks).astype(jnp.float32)
  if segments_BS is None:
    return k_BPSKH.mean(2)
  segments_BPS = _cut(segments_BS, blocks)
  own_BPS = (segments_BPS == segments_BPS[:, :, -1:]).astype(jnp.float32)
  return jnp.einsum('BPSKH,BPS->BPKH', k_BPSKH, own_BPS) / own_BPS.sum(2)[..., None, None]


def choose(
  q_BTNH: jax.Array,
  means_BPKH: jax.Array,
  places_BT: jax.Array,
  blocks: Blocks,
  segments: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
  """The blocks that each query sees, its own one last: int32 [B, T, N, X], with NONE for no block.

  `places_BT` are the slots of the queries' own keys. `segments` are (q_BT, k_BS).
  """
  sizes = axes.check('BTNH,BPKH,BT', q_BTNH, means_BPKH, places_BT)
  most = min(blocks.top_k, sizes['P'] - 1)
  own_BT = (places_BT // blocks.size).astype(jnp.int32)
  own_BTN1 = jnp.broadcast_to(own_BT[..., None, None], (*q_BTNH.shape[:3], 1))
  if not most:
    return own_BTN1
  means_BPKH = jax.lax.stop_gradient(means_BPKH)

  def some(part):
    q_BTNH, own_BT, segments_BT = part
    q_BTKGH = rearrange(q_BTNH, 'B T (K G) H -> B T K G H', K=sizes['K']).astype(jnp.float32)
    scores_BTKGP = jnp.einsum('BTKGH,BPKH->BTKGP', q_BTKGH, means_BPKH)
    open_BTP = jnp.arange(sizes['P'], dtype=jnp.int32)[None, None] < own_BT[..., None]
    if segments is not None:
      ends_BP = segments[1][:, blocks.size - 1 :: blocks.size]
      open_BTP &= ends_BP[:, None] == segments_BT[..., None]
    scores_BTKGP = jnp.where(open_BTP[:, :, None, None], scores_BTKGP, -jnp.inf)
    if blocks.first:
      first_BTP = open_BTP & ~jnp.pad(open_BTP[..., :-1], ((0, 0), (0, 0), (1, 0)))
      scores_BTKGP = jnp.where(first_BTP[:, :, None, None], jnp.inf, scores_BTKGP)
    # XLA:CPU has a program for the largest numbers of a matrix, and sorts arrays of other ranks.
    best, at = jax.lax.top_k(scores_BTKGP.reshape(-1, sizes['P']), most)
    return jnp.where(best > -jnp.inf, at, NONE).reshape(*q_BTNH.shape[:3], most)

  parts = jax.lax.stop_gradient(q_BTNH), own_BT, None if segments is None else segments[0]
  earlier_BTNX = _by_parts(some, parts, AT_ONCE // (sizes['N'] * sizes['P']))
  return jnp.concatenate([earlier_BTNX, own_BTN1], -1)


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  means_BPKH: jax.Array,
  places_BT: jax.Array,
  blocks: Blocks,
  segments: tuple[jax.Array, jax.Array] | None = None,
  *,
  scale: float,
  softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """Attends to the blocks that each query chooses: (y_BTNH, logs_BTN).

  S is P blocks, slot s of a row has the key of place s, and query t stands at places_BT[b, t],
  whose key is there. `logs_BTN` are the logarithms of the sums that normalise the softmax, for
  `ops.blocked.merged`.

  Raises:
    ValueError: the shapes disagree, or the keys are not P whole blocks.
  """
  spec = 'BTNH,BSKH,BSKH,BPKH,BT'
  sizes = axes.check(spec, q_BTNH, k_BSKH, v_BSKH, means_BPKH, places_BT)
  count = sizes['P']
  if sizes['S'] != count * blocks.size:
    raise ValueError(f'{sizes["S"]} keys are not {count} blocks of {blocks.size}')
  choices_BTNX = choose(q_BTNH, means_BPKH, places_BT, blocks, segments)
  of_queries, of_keys = (None, None) if segments is None else segments
  if of_keys is not None:
    of_keys = _cut(of_keys, count)
  marks = places_BT, of_queries, of_keys
  row = functools.partial(_attend, _Scores(scale=scale, softcap=softcap))
  return jax.vmap(row)(q_BTNH, _cut(k_BSKH, count), _cut(v_BSKH, count), choices_BTNX, marks)


def whole(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  blocks: Blocks,
  segments_BT: jax.Array | None = None,
  *,
  scale: float,
  softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """`attend` within whole rows, which begin at place 0 and may hold several documents."""
  sizes = axes.check('BTNH,BSKH,BSKH,BT', q_BTNH, k_BSKH, v_BSKH, segments_BT)
  if sizes['T'] != sizes['S']:
    raise ValueError(f'a whole row has as many queries as keys, not {sizes["T"]} and {sizes["S"]}')
  fill = lambda x: jnp.pad(x, [(0, 0), (0, -sizes['T'] % blocks.size), *[(0, 0)] * (x.ndim - 2)])
  k_BSKH, v_BSKH = fill(k_BSKH), fill(v_BSKH)
  segments = None if segments_BT is None else (segments_BT, fill(segments_BT))
  means_BPKH = means(k_BSKH, k_BSKH.shape[1] // blocks.size, segments and segments[1])
  places = jnp.arange(sizes['T'], dtype=jnp.int32)
  places_BT = jnp.broadcast_to(places[None], q_BTNH.shape[:2])
  scores = {'scale': scale, 'softcap': softcap}
  return attend(q_BTNH, k_BSKH, v_BSKH, means_BPKH, places_BT, blocks, segments, **scores)


def _cut(x_BS: jax.Array, blocks: int) -> jax.Array:
  return rearrange(x_BS, 'B (P S) ... -> B P S ...', P=blocks)


def _by_parts(fn, arrays, size: int):
  """Calls fn on arrays [B, T, ...], for at most `size` of T at a time."""
  length, size = jax.tree.leaves(arrays)[0].shape[1], max(size, 1)
  if length <= size:
    return fn(arrays)
  rest = lambda x: [(0, 0)] * (x.ndim - 2)
  fill = lambda x: jnp.pad(x, [(0, 0), (0, -length % size), *rest(x)])
  cut = lambda x: rearrange(fill(x), 'B (i T) ... -> i B T ...', T=size)
  found = jax.lax.map(fn, jax.tree.map(cut, arrays))
  return rearrange(found, 'i B T ... -> B (i T) ...')[:, :length]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scores:
  """How scores are made."""

  scale: float
  softcap: float | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tiles:
  """The pairs of queries and blocks, those of one block and key head in tiles of equal size.

  pair: their numbers, [steps, tiles, M], in order of query and choice.  real: whether a tile has so
  many.  block, head: those of a tile, [steps, tiles].  slot_TNX: where a pair is in all tiles, if
  it is in one.
  """

  pair: jax.Array
  real: jax.Array
  block: jax.Array
  head: jax.Array
  slot_TNX: jax.Array

  @classmethod
  def of(cls, choices_TNX: jax.Array, blocks: int, kv_heads: int, block: int) -> '_Tiles':
    pairs, (tokens, heads, choices) = choices_TNX.size, choices_TNX.shape
    head_N1 = (jnp.arange(heads, dtype=jnp.int32) // (heads // kv_heads))[:, None]
    groups = kv_heads * blocks
    # The pairs without a block come last, after all groups, and into no tile.
    group_TNX = jnp.where(choices_TNX == NONE, groups, head_N1[None] * blocks + choices_TNX)
    plan = moe.dispatch(group_TNX.reshape(tokens * heads, choices), groups)
    size = min(1 << (-(-pairs // groups) - 1).bit_length(), MOST_ROWS)
    found = grouped.blocks(plan.sizes_E, pairs, size)
    count = len(found.start)
    steps = -(-count * size * block // AT_ONCE)
    more = -count % steps
    fill = lambda x, value: jnp.pad(x, (0, more), constant_values=value)
    start, end, group = (
      fill(found.start, pairs),
      fill(found.end, pairs),
      fill(found.expert, 0),
    )
    row = start[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    real = row < end[:, None]
    pair = plan.pair_M[jnp.minimum(row, pairs - 1)]
    place = jnp.arange(row.size, dtype=jnp.int32)
    at = jnp.where(real.reshape(-1), pair.reshape(-1), pairs + place)
    slot_M = jnp.zeros(pairs, jnp.int32).at[at].set(place, mode='drop', unique_indices=True)
    cut = lambda x: x.reshape(steps, -1, *x.shape[1:])
    return cls(
      pair=cut(pair),
      real=cut(real),
      block=cut(group % blocks),
      head=cut(group // blocks),
      slot_TNX=slot_M.reshape(choices_TNX.shape),
    )

  @property
  def steps(self):
    """What a loop over all tiles goes through."""
    return self.pair, self.real, self.block, self.head


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scores: _Scores, q_TNH, k_PSKH, v_PSKH, choices_TNX, marks):
  return _forward(scores, q_TNH, k_PSKH, v_PSKH, choices_TNX, marks)[0]


def _forward(scores, q_TNH, k_PSKH, v_PSKH, choices_TNX, marks):
  blocks, block, kv_heads = k_PSKH.shape[:3]
  tiles = _Tiles.of(choices_TNX, blocks, kv_heads, block)

  def step(_, tile):
    _, found = _scored(scores, q_TNH, k_PSKH, choices_TNX, marks, tile)
    peak = jnp.maximum(found.max(-1), MASKED / 2)  # so that the weight of what is masked is zero
    weights = jnp.exp(found - peak[..., None])
    total = weights.sum(-1)
    total = jnp.where(total == 0, 1.0, total)
    v = v_PSKH[tile[2], :, tile[3]]
    y = _product('iMS,iSH->iMH', weights.astype(v.dtype), v) / total[..., None]
    return None, (y, peak + jnp.log(total))

  _, (y, logs) = jax.lax.scan(step, None, tiles.steps)
  logs_TNX = jnp.where(choices_TNX == NONE, MASKED, logs.reshape(-1)[tiles.slot_TNX])
  logs_TN = jax.nn.logsumexp(logs_TNX, -1)
  y_TNXH = y.reshape(-1, y.shape[-1])[tiles.slot_TNX]
  shares_TNX = jnp.exp(logs_TNX - logs_TN[..., None])
  y_TNH = jnp.einsum('TNX,TNXH->TNH', shares_TNX, y_TNXH).astype(q_TNH.dtype)
  return (y_TNH, logs_TN), (q_TNH, k_PSKH, v_PSKH, choices_TNX, marks, tiles, y_TNH, logs_TN)


def _backward(scores, saved, bars):
  q_TNH, k_PSKH, v_PSKH, choices_TNX, marks, tiles, y_TNH, logs_TN = saved
  y_bar_TNH, logs_bar_TN = (bar.astype(jnp.float32) for bar in bars)
  delta_TN = jnp.sum(y_bar_TNH * y_TNH.astype(jnp.float32), -1) - logs_bar_TN
  by_query = lambda x, query: x.reshape(-1, *x.shape[2:])[query]

  def step(sums, tile):
    pair, _, block, head = tile
    (q, k), found = _scored(scores, q_TNH, k_PSKH, choices_TNX, marks, tile)
    query, v = pair // choices_TNX.shape[-1], v_PSKH[block, :, head]
    bar = by_query(y_bar_TNH, query)
    weights = jnp.exp(found - by_query(logs_TN, query)[..., None])
    new_v = _product('iMS,iMH->iSH', weights, bar)
    found_bar = _product('iMH,iSH->iMS', bar, v) - by_query(delta_TN, query)[..., None]
    found_bar = weights * found_bar
    if scores.softcap is not None:
      found_bar = found_bar * (1 - jnp.square(jnp.clip(found / scores.softcap, -1, 1)))
    found_bar = found_bar * scores.scale
    new_k = _product('iMS,iMH->iSH', found_bar, q)
    sums = [one.at[block, :, head].add(new) for one, new in zip(sums, (new_k, new_v))]
    return tuple(sums), _product('iMS,iSH->iMH', found_bar, k)

  nothing = jnp.zeros(k_PSKH.shape, jnp.float32)
  (k_bar, v_bar), q_bar = jax.lax.scan(step, (nothing, nothing), tiles.steps)
  q_bar_TNXH = q_bar.reshape(-1, q_bar.shape[-1])[tiles.slot_TNX]
  q_bar_TNH = jnp.where((choices_TNX == NONE)[..., None], 0.0, q_bar_TNXH).sum(2)
  cast = (bar.astype(x.dtype) for bar, x in zip((q_bar_TNH, k_bar, v_bar), saved))
  return *cast, None, None


_attend.defvjp(_forward, _backward)


def _scored(scores: _Scores, q_TNH, k_PSKH, choices_TNX, marks, tile):
  """The queries [tiles, M, H] and keys [tiles, S, H] of some tiles, and their masked scores."""
  pair, real, block, head = tile
  places_T, of_queries_T, of_keys_PS = marks
  query = pair // choices_TNX.shape[-1]
  q, k = q_TNH.reshape(-1, q_TNH.shape[-1])[query], k_PSKH[block, :, head]
  dtype = jnp.promote_types(q.dtype, k.dtype)
  found = scores.scale * _product('iMH,iSH->iMS', q.astype(dtype), k.astype(dtype))
  if scores.softcap is not None:
    found = scores.softcap * jnp.tanh(found / scores.softcap)
  token, size = query // q_TNH.shape[1], k_PSKH.shape[1]
  key_places = block[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None]
  seen = real[..., None] & (key_places[:, None] <= places_T[token][..., None])
  if of_keys_PS is not None:
    seen &= of_keys_PS[block][:, None] == of_queries_T[token][..., None]
  return (q, k), jnp.where(seen, found, MASKED)


def _product(form: str, a, b):
  return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)
