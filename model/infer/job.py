"""A request while an engine works on it: its tokens so far, and how many were reported."""

import dataclasses

import numpy as np

from model.infer.programs import Chosen
from model.infer.request import Finish, Progress, Request, TokenLogprobs


@dataclasses.dataclass(eq=False)
class Job:
  """A request by its number, with its state."""

  id: int
  request: Request
  ends: frozenset[int]  # tokens that end it
  adapter: int = 0  # its number in the banks of the model; 0: none
  new: list[int] = dataclasses.field(default_factory=list)
  row: int | None = None  # of the batch, where it runs
  read: int = 0  # tokens whose keys and values are in a cache
  cached: int = 0  # of these, tokens that were found among the kept ones
  cancelled: bool = False
  drafted: bool = False  # whether the lane of the draft has read what that of the model has
  _mask: np.ndarray | None = None
  _told: int = 0
  _logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
  _scores: list[TokenLogprobs] = dataclasses.field(default_factory=list)

  def __post_init__(self):
    if self.request.guide is not None:
      self._mask = self.request.guide.mask()

  @property
  def tokens(self) -> list[int]:
    """The tokens of the prompt and the new ones."""
    return [*self.request.prompt, *self.new]

  @property
  def left(self) -> int:
    """How many more tokens it may get."""
    return self.request.max_new_tokens - len(self.new)

  @property
  def rank(self) -> tuple[int, int]:
    """Sort key of the queue; lower comes first."""
    return -self.request.priority, self.id

  @property
  def mask(self) -> np.ndarray | None:
    """The bits of the tokens that its guide allows next; None: it has no guide."""
    return self._mask

  def score(self, chosen: Chosen, count: int) -> None:
    """Adds the log-probabilities of `count` tokens of the prompt."""
    asked = self.request.prompt_logprobs
    self._scores += [_logprobs(chosen, i, asked) for i in range(count)]

  def take(self, chosen: Chosen, row: int) -> Finish | None:
    """Adds the token that was chosen in a row; returns why the request ends, or None."""
    token = int(chosen.tokens_B[row])
    if token in self.ends or (self._mask is not None and not self._mask.any()):
      return 'stop'
    self.new.append(token)
    if self.request.logprobs is not None:
      self._logprobs.append(_logprobs(chosen, row, self.request.logprobs))
    if self.request.guide is not None:
      self.request.guide.advance(token)
      self._mask = self.request.guide.mask()
    return None if self.left else 'length'

  def progress(self, finish: Finish | None) -> Progress:
    """The progress that was not reported yet."""
    told, logprobs, scores = self._told, self._logprobs, self._scores
    self._told, self._logprobs, self._scores = len(self.new), [], []
    return Progress(
      request=self.id,
      tokens=tuple(self.new[told:]),
      logprobs=tuple(logprobs),
      prompt_logprobs=tuple(scores),
      cached_tokens=0 if told else self.cached,
      finish=finish,
    )


def _logprobs(chosen: Chosen, i: int, count: int) -> TokenLogprobs:
  ids, logs = chosen.ids_B_[i, :count].tolist(), chosen.likeliest_B_[i, :count].tolist()
  likeliest = tuple((token, log) for token, log in zip(ids, logs) if log > -np.inf)
  return TokenLogprobs(int(chosen.tokens_B[i]), float(chosen.logprobs_B[i]), likeliest)
