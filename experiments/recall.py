"""A synthetic task: recall the value that a key had earlier in the text, near or far.

After Arora et al. (2023), multi-query associative recall, https://arxiv.org/abs/2312.04927. Some
tokens of a text tell the value of a key, one asks for the value of each of these keys later, and
the rest is filler. Only the answers are learned, and they can only be known from the text. The
distance between telling and asking is drawn evenly on a logarithmic scale, so that a text asks for
near and for far ones alike.

Differs from the paper, so that small models learn it in minutes: one token tells both a key and its
value, where the paper has two, so no layer has to join them first; and there is filler.
"""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.train.data import NO_LABEL, Batch
from model.transformer import Transformer

HELD_OUT = 1 << 30  # the first row of those that training never sees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
  """The task, as training data: batch n is a function of the seed and n alone.

  seq_len: tokens of a text.  pairs: keys that are told and asked for in a text.
  kinds: how many keys, values and filler tokens there are, each.
  """

  seq_len: int
  batch_size: int
  pairs: int
  kinds: int = 32
  seed: int = 0

  def __post_init__(self):
    if 2 * self.pairs > self.seq_len // 2:
      raise ValueError(
        f'{self.pairs} keys, told and asked for, would fill more than half of {self.seq_len} tokens'
      )
    if self.pairs > self.kinds:
      raise ValueError(f'{self.pairs} different keys are needed, but there are {self.kinds}')

  @property
  def vocabulary(self) -> int:
    """Values, keys that are asked for, filler, and what tells a key and a value."""
    return (3 + self.kinds) * self.kinds

  @property
  def highest(self) -> int:
    return self.vocabulary - 1

  @property
  def fingerprint(self) -> str:
    return hashlib.sha256(repr(self).encode()).hexdigest()

  def batch(self, step: int) -> Batch:
    """The rows of update `step`."""
    rows = [self.row(step * self.batch_size + i) for i in range(self.batch_size)]
    tokens, labels, _ = (np.stack(arrays) for arrays in zip(*rows))
    return Batch(tokens, labels, None, None)

  def row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, labels, and the distance to what is recalled where there is a label: [T], int32."""
    rng = np.random.default_rng([self.seed, number])
    tokens = 2 * self.kinds + rng.integers(self.kinds, size=self.seq_len)
    labels, distance = np.full(self.seq_len, NO_LABEL), np.zeros(self.seq_len, int)
    free = np.ones(self.seq_len, bool)
    for key in rng.permutation(self.kinds)[: self.pairs]:
      told, asked = _places(rng, free)
      value = rng.integers(self.kinds)
      tokens[told] = (3 + key) * self.kinds + value
      tokens[asked] = self.kinds + key
      labels[asked], distance[asked] = value, asked - told
      free[[told, asked]] = False
    return tuple(a.astype(np.int32) for a in (tokens, labels, distance))


def _places(rng: np.random.Generator, free: np.ndarray) -> tuple[int, int]:
  """Two free places, whose distance is drawn evenly on a logarithmic scale where it can be."""
  places = np.flatnonzero(free)
  while True:
    wanted = int(np.exp(rng.uniform(0, np.log(len(free)))))
    later = places[free[np.maximum(places - wanted, 0)] & (places >= wanted)]
    if len(later):
      second = int(rng.choice(later))
      return second - wanted, second


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """What a model recalls of held-out texts: whether it is right, by distance, and its loss."""

  right: np.ndarray  # bool, for each label
  distance: np.ndarray  # tokens
  nll: np.ndarray  # nats

  def accuracy(self, low: int = 0, high: int | None = None) -> tuple[float, int]:
    """The share that is right at distances from `low` to below `high`, and how many these are."""
    there = (self.distance >= low) & (self.distance < (high or self.distance.max() + 1))
    return float(self.right[there].mean()), int(there.sum())


def measure(model: Transformer, task: Recall, rows: int = 256) -> Found:
  """Asks a model for what held-out texts let it recall; only values count as answers."""
  texts = [task.row(HELD_OUT + i) for i in range(rows)]
  tokens, labels, distance = (np.stack(arrays) for arrays in zip(*texts))
  graphdef, state = nnx.split(model)

  @jax.jit
  def answers(state, tokens, labels):
    logits = nnx.merge(graphdef, state)(tokens)[..., : task.kinds]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], 2)[..., 0]
    return logits.argmax(-1) == labels, nll

  found = []
  for i in range(0, rows, task.batch_size):
    now = slice(i, i + task.batch_size)
    found.append(answers(state, tokens[now], np.maximum(labels[now], 0)))
  right, nll = (np.concatenate(parts) for parts in zip(*found))
  asked = labels != NO_LABEL
  return Found(right=right[asked], distance=distance[asked], nll=nll[asked])
