"""The compiled programs of an engine: parts of prompts, decode steps, and rows that move.

There are few shapes: the lengths of parts of prompts and the widths of batches are powers of two.
The settings of a row are entries of arrays, so no kind of request needs a program of its own. The
caches are donated and written in place.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from model import kv_cache
from model.infer.generate import TOKENS_PER_CALL, Structure
from model.infer.request import MOST_LOGPROBS, Request
from model.transformer import Caches
from ops import rows, sampling
from ops.sampling import History, Sampling

Kept = tuple[Caches, History]  # what the device keeps of the rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """The settings of each row that the host passes at each call, in numpy.

  `tokens_B` are the tokens at `positions_B`, which were not run yet. `words_B_` has the bits of the
  tokens that are allowed next; zeros allow all.
  """

  tokens_B: np.ndarray
  positions_B: np.ndarray
  sampling: Sampling
  keys_B_: np.ndarray  # uint32 [B, 2]
  logprobs_B: np.ndarray  # bool: whether they are asked for
  words_B_: np.ndarray  # uint32 [B, ceil(V / 32)]
  plain: np.ndarray  # bool: every row takes its likeliest token, and no scores


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
  """Tokens, and if asked for their log-probabilities and those of the likeliest tokens."""

  tokens_B: jax.Array
  logprobs_B: jax.Array
  likeliest_B_: jax.Array  # float32 [B, MOST_LOGPROBS]
  ids_B_: jax.Array


def told_of(requests: Sequence[Request | None], vocabulary: int) -> Rows:
  """The settings of the requests of some rows; tokens, positions and words are zeros."""
  some = [request or NOBODY for request in requests]
  seeds = np.asarray([request.seed for request in some], np.uint64)
  # As jax.random.key has it for a seed of 32 bits.
  keys_B_ = np.stack([seeds >> np.uint64(32), seeds & np.uint64(0xFFFFFFFF)], 1).astype(np.uint32)
  logprobs_B = np.asarray([request.logprobs is not None for request in some])
  configs = [request.sampling for request in some]
  drawn = any(config.temperature > 0 or config.remembers for config in configs)
  guided = any(request.guide is not None for request in some)
  return Rows(
    tokens_B=np.zeros(len(some), np.int32),
    positions_B=np.zeros(len(some), np.int32),
    sampling=sampling.settings(configs, np.asarray),
    keys_B_=keys_B_,
    logprobs_B=logprobs_B,
    words_B_=np.zeros((len(some), -(-vocabulary // 32)), np.uint32),
    plain=np.asarray(not (drawn or guided or logprobs_B.any())),
  )


NOBODY = Request(prompt=(0,), max_new_tokens=1)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(static: Structure, leaves, caches: Caches, tokens_BT, start, length):
  """Runs `length` tokens of one prompt, and padding: (logits_BV after the last token, caches)."""
  x_BTD, caches, model = _run(static, leaves, caches, tokens_BT, start, length)
  x_BD = jax.lax.dynamic_index_in_dim(x_BTD, length - 1, axis=1, keepdims=False)
  return model.logits(x_BD), caches


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def score(static: Structure, leaves, caches: Caches, tokens_BT, start, length, next_T):
  """Does what `read` does, and also returns the following tokens as `Chosen`."""
  x_BTD, caches, model = _run(static, leaves, caches, tokens_BT, start, length)
  logits_TV = model.logits(x_BTD)[0]
  last_BV = jax.lax.dynamic_slice_in_dim(logits_TV, length - 1, 1)
  return last_BV, caches, _with_logprobs(logits_TV, next_T)


def _run(static, leaves, caches, tokens_BT, start, length):
  model = static.model(leaves)
  positions_BT = start + jnp.minimum(jnp.arange(tokens_BT.shape[1])[None], length - 1)
  return *model.hidden(tokens_BT, positions_BT=positions_BT, cache=caches), model


@jax.jit
def choose(logits_BV, history: History, told: Rows) -> Chosen:
  """Chooses the tokens at the positions of the rows."""
  likeliest = lambda logits_BV: _blank(sampling.sample(logits_BV, sampling.GREEDY, None))
  by_settings = lambda logits_BV: _by_settings(logits_BV, history, told)
  return jax.lax.cond(told.plain, likeliest, by_settings, logits_BV)


def _by_settings(logits_BV, history: History, told: Rows) -> Chosen:
  adjusted_BV = sampling.adjust(logits_BV, told.sampling, history)
  guided_B = (told.words_B_ != 0).any(1)

  def allowed(adjusted_BV):
    words_B_ = jnp.where(guided_B[:, None], told.words_B_, jnp.uint32(0xFFFFFFFF))
    return sampling.allow(adjusted_BV, words_B_)

  adjusted_BV = jax.lax.cond(guided_B.any(), allowed, lambda x: x, adjusted_BV)
  keys_B = jax.random.wrap_key_data(told.keys_B_, impl='threefry2x32')
  keys_B = jax.vmap(jax.random.fold_in)(keys_B, told.positions_B)
  tokens_B = sampling.sample(adjusted_BV, told.sampling, keys_B)
  absent = lambda logits_BV, tokens_B: _blank(tokens_B)
  return jax.lax.cond(told.logprobs_B.any(), _with_logprobs, absent, logits_BV, tokens_B)


def _with_logprobs(logits_BV, tokens_B) -> Chosen:
  own_B, likeliest_B_, ids_B_ = sampling.logprobs(logits_BV, tokens_B, MOST_LOGPROBS)
  missing = MOST_LOGPROBS - ids_B_.shape[1]  # of a vocabulary as small as that
  wide = lambda a, value: jnp.pad(a, ((0, 0), (0, missing)), constant_values=value)
  return Chosen(
    tokens_B=tokens_B,
    logprobs_B=own_B,
    likeliest_B_=wide(likeliest_B_, -jnp.inf),
    ids_B_=wide(ids_B_, 0),
  )


def _blank(tokens_B) -> Chosen:
  shape = (*tokens_B.shape, MOST_LOGPROBS)
  return Chosen(
    tokens_B=tokens_B,
    logprobs_B=jnp.zeros(tokens_B.shape),
    likeliest_B_=jnp.zeros(shape),
    ids_B_=jnp.zeros(shape, jnp.int32),
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(static: Structure, leaves, batch: Kept, told: Rows, count) -> tuple[Kept, Chosen]:
  """Runs `count` tokens of every row, each chosen after those before it.

  Returns the batch, and the tokens of each step, with an axis of `TOKENS_PER_CALL` steps before the
  rows. `told.words_B_` holds for all steps, so rows with a guide decode one token per call.
  """

  def step(i, carry):
    (caches, history), tokens_B, positions_B, steps = carry
    # Without the barrier, XLA moves what does not change out of the loop: whole widened matrices.
    held, tokens_B = jax.lax.optimization_barrier((leaves, tokens_B))
    model = static.model(held)
    x_BTD, caches = model.hidden(tokens_B[:, None], positions_BT=positions_B[:, None], cache=caches)
    positions_B = positions_B + 1
    here = dataclasses.replace(told, tokens_B=tokens_B, positions_B=positions_B)
    chosen = choose(model.logits(x_BTD[:, 0]), history, here)
    steps = jax.tree.map(lambda all_, one: all_.at[i].set(one), steps, chosen)
    history = history.counted(chosen.tokens_B)
    return (caches, history), chosen.tokens_B, positions_B, steps

  tokens_B, positions_B = jnp.asarray(told.tokens_B), jnp.asarray(told.positions_B)
  steps = _blank(jnp.zeros((TOKENS_PER_CALL, len(tokens_B)), jnp.int32))
  start = batch, tokens_B, positions_B, steps
  batch, _, _, steps = jax.lax.fori_loop(0, count, step, start)
  return batch, steps


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def draft(static: Structure, leaves, caches: Caches, told: Rows, count: int, history: History):
  """Proposes the next `count` tokens of every row: (caches, tokens [B, count])."""

  def step(i, carry):
    caches, tokens_B, history, proposed_BT = carry
    held, tokens_B = jax.lax.optimization_barrier((leaves, tokens_B))
    model = static.model(held)
    positions_B = jnp.asarray(told.positions_B) + i
    x_BTD, caches = model.hidden(tokens_B[:, None], positions_BT=positions_B[:, None], cache=caches)
    here = dataclasses.replace(
      told, positions_B=positions_B + 1, logprobs_B=np.zeros(len(tokens_B), bool)
    )
    tokens_B = choose(model.logits(x_BTD[:, 0]), history, here).tokens_B
    return caches, tokens_B, history.counted(tokens_B), proposed_BT.at[:, i].set(tokens_B)

  tokens_B = jnp.asarray(told.tokens_B)
  proposed_BT = jnp.zeros((len(tokens_B), count + 1), jnp.int32)
  # One step more than there are proposals: the last one has to be in the cache too.
  start = caches, tokens_B, history, proposed_BT
  caches, _, _, proposed_BT = jax.lax.fori_loop(0, count + 1, step, start)
  return caches, proposed_BT[:, :count]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def verify(static: Structure, leaves, batch: Kept, told: Rows, proposed_BT):
  """Runs the last token of every row and the proposals after it.

  Returns the batch, the tokens that the model chooses at each of these positions as `Chosen` with
  an axis of steps before the rows, and how many of them count, one more than it took: int32 [B].
  """
  (caches, history), count = batch, proposed_BT.shape[1]
  model = static.model(leaves)
  tokens_BT = jnp.concatenate([told.tokens_B[:, None], proposed_BT], axis=1)
  positions_BT = told.positions_B[:, None] + jnp.arange(count + 1)[None]
  x_BTD, caches = model.hidden(tokens_BT, positions_BT=positions_BT, cache=caches)
  logits_TBV = jnp.moveaxis(model.logits(x_BTD), 1, 0)
  # After the last one, nothing was proposed.
  wanted_TB = jnp.pad(proposed_BT.T, ((0, 1), (0, 0)), constant_values=-1)

  def step(carry, inputs):
    history, good_B = carry
    logits_BV, positions_B, wanted_B = inputs
    here = dataclasses.replace(told, positions_B=positions_B + 1)
    chosen = choose(logits_BV, history, here)
    history = history.counted(chosen.tokens_B, good_B)
    return (history, good_B & (chosen.tokens_B == wanted_B)), (chosen, good_B)

  start = history, jnp.ones(len(tokens_BT), bool)
  inputs = logits_TBV, positions_BT.T, wanted_TB
  (history, _), (chosen, good_TB) = jax.lax.scan(step, start, inputs)
  return (caches, history), chosen, good_TB.sum(0, dtype=jnp.int32)


@functools.partial(jax.jit, donate_argnums=0)
def admit(caches: Caches, row, one: Caches) -> Caches:
  """Replaces a row by the only row of other caches."""
  return kv_cache.insert(caches, row, one)


@functools.partial(jax.jit, donate_argnums=0)
def remember(history: History, row, one: History) -> History:
  """Replaces the history of a row by that of one row."""
  put = lambda all_, one: jax.lax.dynamic_update_slice_in_dim(all_, one, row, 0)
  return jax.tree.map(put, history, one)


@jax.jit
def rearrange(tree, order_B):
  """Selects these rows of caches or of a history."""
  return jax.tree.map(lambda all_: rows.take(all_, order_B), tree)


@functools.partial(jax.jit, donate_argnums=0)
def keep(blocks: Caches, caches: Caches, row, places_P) -> Caches:
  """Copies the blocks of a row to these places; a place past the last one drops the block."""

  def put(all_, source):
    own = jax.lax.dynamic_index_in_dim(source, row, keepdims=False)
    return rows.put_rows(all_, own.reshape(-1, *all_.shape[1:]), places_P)

  return jax.tree.map(put, blocks, caches)


@functools.partial(jax.jit, donate_argnums=1)
def fetch(blocks: Caches, caches: Caches, places_P) -> Caches:
  """Builds the only row of some caches from the blocks in these places."""
  take = lambda all_, own: rows.take(all_, places_P).reshape(own.shape)
  return jax.tree.map(take, blocks, caches)
