"""Needles in a haystack: whether a model finds one sentence in a long text, by its depth.

Sentences such as 'The secret word of Paris is apple.' stand in a text that has nothing to do with
them, each at a depth of its own. The end of the text begins each sentence again, in random order,
and the model has to go on with its word; the right word then follows. The score is the probability
of the right word among all `WORDS`, by the logits of their first tokens, and its rank, so the model
need not follow instructions. After Kamradt (2023),
https://github.com/gkamradt/LLMTest_NeedleInAHaystack, and, for several keys that are all asked
for, Hsieh et al. (2024), RULER, https://arxiv.org/abs/2404.06654.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.eval import positions
from model.transformer import Transformer

Encode = Callable[[str], Sequence[int]]
WORDS = (
  *('apple', 'river', 'table', 'music', 'horse', 'green', 'stone', 'bread'),
  *('glass', 'paper', 'water', 'night', 'iron', 'snow', 'fire', 'milk'),
)
NAMES = (
  *('Paris', 'Rome', 'Berlin', 'Madrid', 'Vienna', 'Oslo', 'Dublin', 'Athens'),
  *('Moscow', 'Cairo', 'Delhi', 'Tokyo', 'Boston', 'Lima', 'Sydney', 'Prague'),
)
CHANCE = 1 / len(WORDS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Haystack:
  """A text with needles, and where the model has to find their words.

  places: the position where the sentence of each depth begins.
  asked: the position of the last token before the word of each depth, at the end of the text.
  answers: the number of the word of each depth.
  candidates: the first token of each of `WORDS`.
  """

  tokens_T: np.ndarray
  depths: tuple[float, ...]
  places: tuple[int, ...]
  asked: tuple[int, ...]
  answers: tuple[int, ...]
  candidates: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
  """How a model finds the needles of one depth: means over haystacks.

  probability: of the right word among all; `CHANCE` is that of guessing.
  rank: of the right word, from 1.
  found: the share of needles whose word is the most likely one.
  """

  depth: float
  probability: float
  rank: float
  found: float


def haystack(
  encode: Encode,
  filler_T: Sequence[int],
  length: int,
  depths: Sequence[float],
  *,
  seed: int,
  bos_id: int | None = None,
) -> Haystack:
  """Hides a needle at each depth, from 0 (first) to 1 (last), in a text of `length` tokens.

  Raises ValueError if the depths are out of range or too many, the filler or the length is too
  short, or the tokenizer does not tell the words apart by their first tokens.
  """
  if not 0 < len(depths) <= len(NAMES) or not all(0 <= depth <= 1 for depth in depths):
    raise ValueError(f'1 to {len(NAMES)} depths between 0 and 1 are needed, not {list(depths)}')
  words = [list(encode(f' {word}.')) for word in WORDS]
  candidates = tuple(int(word[0]) for word in words)
  if len(set(candidates)) < len(words):
    raise ValueError('the tokenizer begins several words with the same token; needles need others')
  rng = np.random.default_rng(seed)
  answers, names = (rng.permutation(len(WORDS))[: len(depths)] for _ in range(2))
  asks = [list(encode(f'\nThe secret word of {NAMES[name]} is')) for name in names]
  needles = [ask + words[answer] + list(encode('\n')) for ask, answer in zip(asks, answers)]
  questions = [ask + words[answer] for ask, answer in zip(asks, answers)]
  tokens = [] if bos_id is None else [bos_id]
  room = length - len(tokens) - sum(map(len, [*needles, *questions]))
  if room < 1 or room > len(filler_T):
    raise ValueError(
      f'a haystack of {length} tokens has {room} beside its {len(depths)} needles, and the text '
      f'has {len(filler_T)}; choose another length or a longer text'
    )
  places, asked, done = [0] * len(depths), [0] * len(depths), 0
  for i in np.argsort(depths, kind='stable'):
    place = round(depths[i] * room)
    tokens += list(filler_T[done:place])
    places[i], done = len(tokens), place
    tokens += needles[i]
  tokens += list(filler_T[done:room])
  for i in rng.permutation(len(depths)):
    asked[i] = len(tokens) + len(asks[i]) - 1
    tokens += questions[i]
  return Haystack(
    tokens_T=np.asarray(tokens, np.int32),
    depths=tuple(depths),
    places=tuple(places),
    asked=tuple(asked),
    answers=tuple(int(answer) for answer in answers),
    candidates=candidates,
  )


def scores(
  model: Transformer,
  haystacks: Sequence[Haystack],
  *,
  progress: Callable[[list], Iterator] = iter,
) -> list[Score]:
  """Scores a model at each depth. All haystacks have the same depths."""
  graphdef, state = nnx.split(model)
  logits = []
  for one in progress(list(haystacks)):
    x_BTD = positions.hidden(model, one.tokens_T[None])
    with jax.default_matmul_precision('highest'):
      logits.append(_logits(graphdef, state, x_BTD, np.array(one.asked), np.array(one.candidates)))
  answers = np.array([one.answers for one in haystacks])[..., None]
  logits = np.asarray(jnp.stack(logits), np.float64)  # [haystacks, depths, words]
  right = np.take_along_axis(logits, answers, 2)
  probability = 1 / np.exp(logits - right).sum(2)
  rank = 1 + (logits > right).sum(2)
  return [
    Score(
      depth=depth,
      probability=float(probability[:, i].mean()),
      rank=float(rank[:, i].mean()),
      found=float((rank[:, i] == 1).mean()),
    )
    for i, depth in enumerate(haystacks[0].depths)
  ]


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, x_BTD, asked, candidates):
  model = nnx.merge(graphdef, state)
  return model.logits(model.final_norm(x_BTD[0, asked]))[:, candidates]
