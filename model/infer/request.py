"""Requests to an engine, and the progress that it reports."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from ops.sampling import SamplingConfig

Finish = Literal['stop', 'length', 'cancelled']
MOST_LOGPROBS = 20  # alternatives beside a token, as OpenAI's API has them


class Guide(Protocol):
  """Says which tokens may come next: the state of a grammar for one continuation."""

  def mask(self) -> np.ndarray:
    """Bit t % 32 of word t // 32 tells whether token t may come next: uint32 [ceil(V / 32)]."""

  def advance(self, token: int) -> None:
    """Moves on by the token that was chosen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A prompt to continue, and how."""

  prompt: Sequence[int]
  max_new_tokens: int
  sampling: SamplingConfig = SamplingConfig()
  seed: int = 0  # of what is drawn; what a row draws follows from it and the position alone
  stop_ids: frozenset[int] = frozenset()  # tokens that end it, beside those of the config
  ignore_eos: bool = False  # the end tokens of the config do not end it
  logprobs: int | None = None  # of each new token, and of this number of likeliest ones; None: none
  prompt_logprobs: int | None = None  # the same for each token of the prompt but the first
  priority: int = 0  # a higher one comes first, and takes the place of a lower one
  guide: Guide | None = None
  adapter: str | None = None  # the name of one that the engine holds

  def __post_init__(self):
    if len(self.prompt) == 0:
      raise ValueError('a prompt has at least one token')
    least = 0 if self.prompt_logprobs is not None else 1
    if self.max_new_tokens < least:
      raise ValueError(f'max_new_tokens must be at least {least}, not {self.max_new_tokens}')
    for name in ('logprobs', 'prompt_logprobs'):
      count = getattr(self, name)
      if count is not None and not 0 <= count <= MOST_LOGPROBS:
        raise ValueError(f'{name} must be within 0 and {MOST_LOGPROBS}, not {count}')
    if not 0 <= self.seed < 2**63:
      raise ValueError(f'a seed is within 0 and 2**63 - 1, not {self.seed}')


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
  """The natural logarithm of a token's probability, before any setting of the sampling."""

  token: int
  logprob: float
  likeliest: tuple[tuple[int, float], ...]  # (token, logprob), the likeliest first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
  """The new progress of one request."""

  request: int  # as `Engine.add` returned it
  tokens: tuple[int, ...] = ()  # without the token that ended it
  logprobs: tuple[TokenLogprobs, ...] = ()  # of `tokens`, if they were asked for
  prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # once, before the first token
  cached_tokens: int = 0  # of the prompt, once: those whose keys and values were there already
  finish: Finish | None = None  # None: more will come
