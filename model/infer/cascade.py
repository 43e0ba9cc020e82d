"""A cascade: a small model answers, and a large one where the small one is unsure.

After Chen et al. (2023), "FrugalGPT", https://arxiv.org/abs/2305.05176. The confidence of the small
model in an answer is the mean over its tokens of their log-probability, or of the margin to the
next likely token; Gupta et al. (2024), https://arxiv.org/abs/2404.10136, compare such scores. A
threshold is chosen on data: `curve` has the quality and the cost of each, `threshold` takes the
cheapest that keeps a share of the large model's quality.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from model.infer.engine import Engine
from model.infer.metrics import Metrics
from model.infer.request import Progress, Request, TokenLogprobs


def logprob(scores: Sequence[TokenLogprobs]) -> float:
  """The mean logarithm of the tokens' probabilities."""
  return float(np.mean([one.logprob for one in scores])) if scores else 0.0


def margin(scores: Sequence[TokenLogprobs]) -> float:
  """The mean difference between the logarithms of the two likeliest tokens."""
  gaps = [one.likeliest[0][1] - one.likeliest[1][1] for one in scores if len(one.likeliest) > 1]
  return float(np.mean(gaps)) if gaps else 0.0


SCORES: dict[str, Callable[[Sequence[TokenLogprobs]], float]] = {
  'logprob': logprob,
  'margin': margin,
}


@dataclasses.dataclass(frozen=True)
class Point:
  """The results of a threshold: the share that the large model answers, quality and cost."""

  threshold: float
  deferred: float
  quality: float
  cost: float


def curve(
  sure: Sequence[float],
  small: Sequence[float],
  large: Sequence[float],
  *,
  small_cost: float = 1.0,
  large_cost: float = 1.0,
) -> list[Point]:
  """Every distinct threshold in increasing order, from the small model alone to the large one.

  The arguments are the confidence of the small model and the quality of both answers for each
  example, and the costs of one answer. The small model answers every request first.
  """
  sure, small, large = (np.asarray(values, float) for values in (sure, small, large))
  if not len(sure) == len(small) == len(large) > 0:
    raise ValueError(f'{len(sure)} scores, {len(small)} small and {len(large)} large answers')
  points = []
  for threshold in [-np.inf, *np.unique(sure)[1:], np.inf]:
    deferred = sure < threshold
    quality, share = np.where(deferred, large, small).mean(), deferred.mean()
    cost = small_cost + share * large_cost
    points.append(Point(float(threshold), float(share), float(quality), float(cost)))
  return points


def threshold(points: Sequence[Point], share: float = 0.99) -> Point:
  """The cheapest point with at least a share of the quality of the large model alone."""
  wanted = share * points[-1].quality
  return min((p for p in points if p.quality >= wanted), key=lambda point: point.cost)


class Cascade:
  """Two engines that answer as one; it has what a worker and a server need of an `Engine`.

  An answer of the small model is given out as a whole, once it is accepted. Requests that ask for
  the scores of their prompt, or that have a guide, go to the large model. With a `name`, so do all
  requests whose adapter does not have this name, so that a server offers both.
  """

  def __init__(
    self,
    small: Engine,
    large: Engine,
    *,
    threshold: float,
    score: str = 'logprob',
    name: str | None = None,
  ):
    if score not in SCORES:
      raise ValueError(f'{score!r} is no score; there are {", ".join(SCORES)}')
    if small.model.config.vocab_size != large.model.config.vocab_size:
      raise ValueError('the models of a cascade have the same tokens')
    self.small, self.large, self.threshold = small, large, threshold
    self._score, self._name = SCORES[score], name
    self.model = large.model
    self.slots, self.capacity = large.slots, min(small.capacity, large.capacity)
    self.answered, self.deferred = 0, 0  # answers of the small model, and those that it left
    self._next = 0
    self._jobs: dict[int, tuple[Engine, int]] = {}
    self._small: dict[int, tuple[int, Request, list[Progress]]] = {}  # by the small engine's number
    self._large: dict[int, int] = {}

  @property
  def metrics(self) -> Metrics:
    """The counts of both engines; a request that the small one passed on counts in both."""
    return self.small.metrics.with_those_of(self.large.metrics)

  @property
  def busy(self) -> bool:
    """Whether any request is running or waiting."""
    return self.small.busy or self.large.busy

  def warm(self) -> None:
    """Compiles every program that requests may need."""
    self.small.warm()
    self.large.warm()

  def add(self, request: Request) -> int:
    """Takes a request, as `Engine.add` does."""
    job, named = self._next, request.adapter == self._name
    if named:
      request = dataclasses.replace(request, adapter=None)
    if not named or request.guide is not None or request.prompt_logprobs is not None:
      self._ask_large(job, request)
    else:
      asked = dataclasses.replace(request, logprobs=max(2, request.logprobs or 0))
      own = self.small.add(asked)
      self._small[own], self._jobs[job] = (job, request, []), (self.small, own)
    self._next += 1
    return job

  def cancel(self, request: int) -> None:
    """Ends a request at once."""
    engine, own = self._jobs.pop(request, (None, None))
    if engine is not None:
      engine.cancel(own)
      (self._small if engine is self.small else self._large).pop(own, None)

  def step(self) -> list[Progress]:
    """A step of each engine that has work: what is new, by request."""
    told = []
    for progress in self.small.step() if self.small.busy else ():
      told += self._of_small(progress)
    for progress in self.large.step() if self.large.busy else ():
      job = self._large[progress.request]
      if progress.finish is not None:
        del self._large[progress.request], self._jobs[job]
      told.append(dataclasses.replace(progress, request=job))
    return told

  def _of_small(self, progress: Progress) -> list[Progress]:
    job, request, parts = self._small[progress.request]
    parts.append(progress)
    if progress.finish is None:
      return []
    del self._small[progress.request], self._jobs[job]
    scores = [one for part in parts for one in part.logprobs]
    if self._score(scores) < self.threshold:
      self.deferred += 1
      self._ask_large(job, request)
      return []
    self.answered += 1
    shown = () if request.logprobs is None else [_cut(one, request.logprobs) for one in scores]
    tokens = tuple(token for part in parts for token in part.tokens)
    cached = max(part.cached_tokens for part in parts)
    return [
      Progress(
        request=job,
        tokens=tokens,
        logprobs=tuple(shown),
        cached_tokens=cached,
        finish=progress.finish,
      )
    ]

  def _ask_large(self, job: int, request: Request) -> None:
    own = self.large.add(request)
    self._large[own], self._jobs[job] = job, (self.large, own)


def _cut(one: TokenLogprobs, count: int) -> TokenLogprobs:
  return dataclasses.replace(one, likeliest=one.likeliest[:count])
