"""The log-likelihoods of continuations after their contexts, exact and for many at once.

What `lm-evaluation-harness` asks of a model: the sum of the log-probabilities of a continuation's
tokens, and whether each of them is the most likely one. Beginnings that texts share are read once
(`model.eval.sharing`), and continuations that differ in their last token alone are one text.

A text is read in one call, or in two through a cache of the model's own dtype. Padding comes after
a text and changes nothing, and neither do other texts in its row, which are other segments.
Log-probabilities are in float32 and are summed in float64. Float32 products are float32 on GPU and
TPU as well, which round them further by default.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import kv_cache
from model.eval import sharing
from model.eval.sharing import Call, Plan, Stage, Text
from model.transformer import Transformer

TOKENS = 4096  # of the cache and of the texts of a call
PREDICTIONS = 128  # whose logits exist at once


@dataclasses.dataclass(frozen=True)
class Request:
  """Tokens whose likelihood is asked for, and those before them, of which there is at least one."""

  context: Sequence[int]
  continuation: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Score:
  """log_prob: of the continuation, in nats. greedy: whether all its tokens are the likeliest."""

  log_prob: float
  greedy: bool


@dataclasses.dataclass(frozen=True)
class _Prediction:
  """What is wanted after the token at a column of a row of a call: of which request and token."""

  row: int
  column: int
  target: int
  request: int


def score(
  model: Transformer,
  requests: Sequence[Request],
  *,
  max_length: int | None = None,
  tokens: int = TOKENS,
  progress: Callable[[list], Iterator] = iter,
) -> list[Score]:
  """Scores the continuation of each request after its context.

  max_length: tokens that the model reads at most; a longer context loses its first ones. The
    positions of the model if None.
  tokens: how many a call holds at once; more of them are faster on an accelerator.

  Raises:
    ValueError: an empty context or continuation, a continuation that is longer than `max_length`, a
      token outside the vocabulary, or a `max_length` beyond the positions that were learned.
  """
  limit = _limit(model, max_length)
  texts = [_text(model, request, limit) for request in requests]
  packs = all(layer.mixer.packs for layer in model.config.layers)
  plan = sharing.plan(texts, tokens, packs=packs)
  log_probs, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
  of_row = [[] for _ in plan.rows]
  for i, row in enumerate(plan.row_of):
    of_row[row].append(i)
  graphdef, state = nnx.split(model)
  with jax.default_matmul_precision('highest'):
    for stage in progress(list(plan.stages)):
      caches = None
      if stage.beginnings:
        tokens_BT, lengths_B = _padded(stage.beginnings, stage.size, stage.width)
        caches = _read(graphdef, stage.capacity, state, tokens_BT, lengths_B)
      for call in stage.calls:
        x_BTD = _run(graphdef, state, caches, plan, stage, call)
        wanted = _wanted(plan, stage, call, texts, of_row)
        for one, log_prob, likeliest in _predict(graphdef, state, x_BTD, wanted):
          log_probs[one.request] += log_prob
          greedy[one.request] &= likeliest
  return [Score(float(p), bool(g)) for p, g in zip(log_probs, greedy)]


def _limit(model: Transformer, max_length: int | None) -> int:
  learned = model.config.max_positions
  if max_length is None:
    return learned
  if max_length < 1 or (model.positions is not None and max_length > learned):
    raise ValueError(f'max_length must be within 1 and the {learned} positions, not {max_length}')
  return max_length


def _text(model: Transformer, request: Request, limit: int) -> Text:
  """What is read of a request: all but its last token, and no more than the limit."""
  count = len(request.continuation)
  if not request.context or not 0 < count <= limit:
    raise ValueError(
      f'a request has a context, and a continuation of 1 to {limit} tokens, not '
      f'{len(request.context)} and {count} tokens'
    )
  whole = tuple(map(int, (*request.context, *request.continuation)))[-(limit + 1) :]
  if not 0 <= min(whole) <= max(whole) < model.config.vocab_size:
    raise ValueError(
      f'a request has the tokens {min(whole)} to {max(whole)}, but the model has a vocabulary of '
      f'{model.config.vocab_size}'
    )
  return Text(tokens=whole[:-1], wanted=len(whole) - 1 - count, targets=whole[-count:])


def _padded(rows: Sequence[Sequence[int]], size: int, width: int):
  """Rows of `width` tokens, and the lengths; rows that are too many have one token."""
  tokens_BT, lengths_B = np.zeros((size, width), np.int32), np.ones(size, np.int32)
  for b, row in enumerate(rows):
    tokens_BT[b, : len(row)], lengths_B[b] = row, len(row)
  return tokens_BT, lengths_B


def _run(graphdef, state, caches, plan: Plan, stage: Stage, call: Call) -> jax.Array:
  """The hidden states x_BTD of the rows of a call, from the ends of their beginnings on."""
  rests = [plan.rows[place.number][stage.start(place) :] for place in call.places]
  if caches is None:
    return _whole(graphdef, state, *_laid_out(call, rests))
  tokens_BT, lengths_B = _padded(rests, call.size, call.width)
  from_B, starts_B = np.zeros(call.size, np.int32), np.zeros(call.size, np.int32)
  from_B[: len(rests)] = [place.beginning for place in call.places]
  starts_B[: len(rests)] = [stage.start(place) for place in call.places]
  return _continue(graphdef, state, caches, from_B, tokens_BT, starts_B, lengths_B)


def _laid_out(call: Call, texts: Sequence[Sequence[int]]):
  """Tokens of texts in their places, positions, and segments, which are None if none is needed."""
  shape = call.size, call.width
  tokens_BT, positions_BT, segments_BT = (np.zeros(shape, np.int32) for _ in range(3))
  for i, (place, text) in enumerate(zip(call.places, texts, strict=True), 1):
    at = place.row, slice(place.column, place.column + len(text))
    tokens_BT[at], positions_BT[at], segments_BT[at] = text, np.arange(len(text)), i
  if all(place.column == 0 for place in call.places):
    return tokens_BT, None, None
  return tokens_BT, positions_BT, segments_BT


def _wanted(plan: Plan, stage: Stage, call: Call, texts, of_row) -> list[_Prediction]:
  found = []
  for place in call.places:
    shift = place.column - stage.start(place)
    for i in of_row[place.number]:
      columns = range(texts[i].wanted + shift, len(texts[i].tokens) + shift)
      pairs = zip(columns, texts[i].targets, strict=True)
      found += [_Prediction(place.row, *pair, i) for pair in pairs]
  return found


def _predict(graphdef, state, x_BTD, wanted: Sequence[_Prediction]):
  """Yields each prediction with its log-probability, and whether it is the likeliest token."""
  parts = [wanted[i : i + PREDICTIONS] for i in range(0, len(wanted), PREDICTIONS)]
  results = []
  for part in parts:
    places = np.zeros((3, PREDICTIONS), np.int32)
    places[:, : len(part)] = np.array([(p.row, p.column, p.target) for p in part]).T
    results.append(_log_probs(graphdef, state, x_BTD, *places))
  for part, (log_probs, likeliest) in zip(parts, jax.device_get(results)):
    yield from zip(part, log_probs.astype(np.float64), likeliest)


@functools.partial(jax.jit, static_argnums=0)
def _whole(graphdef, state, tokens_BT, positions_BT, segments_BT):
  model = nnx.merge(graphdef, state)
  return model.hidden(tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(graphdef, capacity, state, tokens_BT, lengths_B):
  """The caches of beginnings, with room for what follows."""
  model = nnx.merge(graphdef, state)
  caches = kv_cache.init(model.config, len(tokens_BT), capacity, model.dtype)
  # Padding repeats the last position, as the cache requires.
  positions_BT = jnp.minimum(jnp.arange(tokens_BT.shape[1])[None], lengths_B[:, None] - 1)
  return model.hidden(tokens_BT, positions_BT=positions_BT, cache=caches)[1]


@functools.partial(jax.jit, static_argnums=0)
def _continue(graphdef, state, caches, from_B, tokens_BT, starts_B, lengths_B):
  """The hidden states of rows that go on from rows of the caches."""
  caches = jax.tree.map(lambda a: a[from_B], caches)
  positions_BT = jnp.minimum(jnp.arange(tokens_BT.shape[1])[None], lengths_B[:, None] - 1)
  positions_BT = starts_B[:, None] + positions_BT
  model = nnx.merge(graphdef, state)
  return model.hidden(tokens_BT, positions_BT=positions_BT, cache=caches)[0]


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(graphdef, state, x_BTD, rows, columns, targets):
  logits = nnx.merge(graphdef, state).logits(x_BTD[rows, columns])
  chosen = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, 1), logits.argmax(1) == targets
