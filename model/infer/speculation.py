"""Speculative decoding: a cheap draft proposes tokens, and the model verifies them in one pass.

The model chooses its own token at each position, as it does without a draft, and a proposal is
taken if it is the same token. So the answer is the same, token by token, greedy or drawn. A draft
model draws with the same key per position as the model, and so often draws the same token; after
Daliri et al. (2024), "Coupling without Communication and Drafter-Invariant Speculative Decoding",
https://arxiv.org/abs/2408.07978. Speculation itself after Leviathan et al. (2022),
https://arxiv.org/abs/2211.17192; without a draft model, tokens are proposed that came after the
last ones earlier in the text (prompt lookup decoding, Saxena 2023).

Whether speculation pays depends on the text, the width of the batch and the machine, so `Governor`
times both ways while they run, and takes the faster one.
"""

import collections
import dataclasses
from collections.abc import Sequence

from model.transformer import Transformer

LONGEST = 8  # proposals; a window can be set back by as many tokens
ROUNDS = 4  # that are timed before a way counts as known
AGAIN = 64  # rounds of the faster way, before the other is tried again
LONG_AGAIN = 512  # as AGAIN, where the other took more than twice as long
FADING = 0.9  # the weight of what was measured before, at each new measurement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation:
  """How tokens are proposed."""

  draft: Transformer | None = None  # a model of the same tokens; None: n-grams of the text
  tokens: int = 4  # proposals at a time
  longest: int = 3  # last tokens that an n-gram begins with, at most
  always: bool = False  # also where it loses time

  def __post_init__(self):
    if not 1 <= self.tokens < LONGEST:
      raise ValueError(f'a draft proposes 1 to {LONGEST - 1} tokens, not {self.tokens}')
    if self.longest < 1:
      raise ValueError(f'an n-gram begins with at least one token, not {self.longest}')


def propose(tokens: Sequence[int], count: int, longest: int = 3) -> list[int]:
  """Up to `count` tokens that came after the last occurrence of the longest n-gram at the end."""
  for n in range(min(longest, len(tokens) - 1), 0, -1):
    end = tuple(tokens[-n:])
    for start in range(len(tokens) - n - 1, -1, -1):
      if tokens[start] == end[0] and tuple(tokens[start : start + n]) == end:
        return list(tokens[start + n : start + n + count])
  return []


@dataclasses.dataclass
class _Way:
  """The time that one way takes; newer measurements weigh more."""

  rounds: int = 0
  seconds: float = 0.0
  tokens: float = 0.0
  idle: int = 0  # rounds of the other way since

  def add(self, seconds: float, tokens: int) -> None:
    self.rounds, self.idle = self.rounds + 1, 0
    if self.rounds > 1:  # the first one may compile
      self.seconds = FADING * self.seconds + seconds
      self.tokens = FADING * self.tokens + tokens

  @property
  def known(self) -> bool:
    return self.rounds > ROUNDS and self.tokens > 0

  @property
  def pace(self) -> float:
    """Seconds per token."""
    return self.seconds / self.tokens


class Governor:
  """Decides, for each width of the batch, whether to speculate, by the time of both ways."""

  def __init__(self):
    self._ways = collections.defaultdict(lambda: {True: _Way(), False: _Way()})

  def wants(self, width: int, returns: bool = True) -> bool:
    """Whether the next round should speculate.

    `returns` says whether a row can speculate again after a round without, which it cannot after a
    draft model has missed tokens.
    """
    ways = self._ways[width]
    for speculate in (True, False):
      if not ways[speculate].known:
        return speculate
    faster = ways[True].pace < ways[False].pace
    slower, best = ways[not faster], ways[faster]
    often = slower.pace < 2 * best.pace and (returns or not faster)
    patience = AGAIN if often else LONG_AGAIN
    return faster if slower.idle < patience else not faster

  def took(self, width: int, speculated: bool, seconds: float, tokens: int) -> None:
    """Records the time of a round, and how many tokens all rows got from it."""
    ways = self._ways[width]
    ways[speculated].add(seconds, tokens)
    ways[not speculated].idle += 1
