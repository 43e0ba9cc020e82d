"""The running rows of an engine: which request has which, and their next tokens.

The width of the batch is the smallest power of two that holds the running rows. Free rows are
decoded too, and their results are ignored.
"""

import operator
import time
from collections.abc import Sequence

import jax
import numpy as np

from model.infer import programs
from model.infer.generate import TOKENS_PER_CALL
from model.infer.job import Job
from model.infer.lane import Lane
from model.infer.metrics import Metrics
from model.infer.programs import Chosen, Rows
from model.infer.speculation import Governor, Speculation, propose
from ops.sampling import History

PATIENCE = 2  # steps that a batch waits for other requests before it becomes narrower


class Batch:
  """The rows of up to `slots` requests.

  The first lane is that of the model; the second, if there is one, that of the model that drafts.
  """

  def __init__(
    self,
    lanes: Sequence[Lane],
    slots: int,
    *,
    burst: int,
    speculation: Speculation | None,
    metrics: Metrics,
  ):
    if not 1 <= burst <= TOKENS_PER_CALL:
      raise ValueError(f'burst must be within 1 and {TOKENS_PER_CALL}, not {burst}')
    self.lanes, self.slots, self._burst, self._metrics = lanes, slots, burst, metrics
    self._lane, self._draft = lanes[0], lanes[1] if len(lanes) > 1 else None
    self._speculation, self._governor = speculation, Governor()
    self._vocabulary = self._lane.config.vocab_size
    self.widths = [*powers(slots), slots]
    self._jobs: list[Job | None] = [None]
    self._history, self._fitting = History.empty(1, self._vocabulary), 0
    self._tell()
    self._check_speculation()

  @property
  def running(self) -> list[Job]:
    return [job for job in self._jobs if job is not None]

  @property
  def width(self) -> int:
    return len(self._jobs)

  def lanes_of(self, job: Job) -> Sequence[Lane]:
    """The lanes that read what a request reads."""
    return self.lanes if job.drafted else self.lanes[:1]

  def admit(self, job: Job, history: History) -> None:
    """Gives a row to the request whose prompt the lanes read last."""
    if None not in self._jobs:
      self._rearrange(self.widths[self.widths.index(self.width) + 1])
    job.row = self._jobs.index(None)
    self._jobs[job.row] = job
    for lane in self.lanes_of(job):
      lane.admit(job.row)
    self._history = programs.remember(self._history, np.int32(job.row), history)
    self._tell()

  def leave(self, job: Job) -> None:
    """Takes its row from a request."""
    self._jobs[job.row], job.row = None, None
    self._tell()

  def narrow(self) -> None:
    """Takes the next smaller width if it has fitted the running rows for some steps.

    Moving the rows takes less time than one step with the free rows.
    """
    at = self.widths.index(self.width)
    fits = at and len(self.running) <= self.widths[at - 1]
    self._fitting = self._fitting + 1 if fits else 0
    if self._fitting > PATIENCE:
      self._rearrange(self.widths[at - 1])

  def decode(self, *, one: bool) -> list[tuple[Job, Sequence[Chosen]]]:
    """Decodes the next tokens of every request, step by step.

    With `one` only one token each, because a request waits for the end of this call.
    """
    jobs, told, start = self.running, self._told, time.perf_counter()
    for job in jobs:
      told.tokens_B[job.row], told.positions_B[job.row] = job.new[-1], job.read
      if job.mask is not None:
        told.words_B_[job.row] = job.mask
    guided = any(job.mask is not None for job in jobs)
    proposed_BT = None if guided else self._proposals(jobs)
    if proposed_BT is None:
      # Whoever comes while all rows are taken waits for one of them anyway.
      rows = min(2, self.width) if len(jobs) == self.slots else self.width
      burst = 1 if guided or one else self._burst // rows
      count = max(1, min(burst, *(job.left for job in jobs)))
      steps, counts_B = self._run(count), np.full(self.width, count)
    else:
      steps, counts_B = self._verify(proposed_BT)
    for job in jobs:
      job.drafted &= proposed_BT is not None
    if self._speculation is not None and not guided:
      new = int(sum(counts_B[job.row] for job in jobs))
      taken = time.perf_counter() - start
      self._governor.took(self.width, proposed_BT is not None, taken, new)
    return [(job, steps[: counts_B[job.row]]) for job in jobs]

  def would_draft(self) -> bool:
    """Whether the draft should read the prompt of one more request."""
    rows = min(len(self.running) + 1, self.slots)
    width = next(width for width in self.widths if width >= rows)
    return self._draft is not None and self._would_speculate(width)

  def warm(self) -> None:
    """Compiles the programs for all widths, with an empty batch."""
    history = History.of(programs.NOBODY.sampling, (), (), self._vocabulary)
    for width in self.widths:
      if width != self.width:
        self._rearrange(width)
      self._history = programs.remember(self._history, np.int32(0), history)
      for lane in self.lanes:
        lane.warm_rows()
      self._run(0)
      if self._speculation is not None:
        self._verify(self._proposals([]))
    for width in reversed(self.widths[:-1]):
      self._rearrange(width)

  def _rearrange(self, width: int) -> None:
    """Changes the width of the batch; the running rows come first."""
    running = self.running
    order_B = np.zeros(width, np.int32)
    order_B[: len(running)] = [job.row for job in running]
    self._history = programs.rearrange(self._history, order_B)
    for lane in self.lanes:
      lane.rearrange(order_B)
    self._jobs = [*running, *[None] * (width - len(running))]
    for row, job in enumerate(running):
      job.row = row
    self._fitting = 0
    self._tell()

  def _tell(self) -> None:
    """Builds the settings that the device gets anew, after rows have changed hands."""
    self._told = settings(self._jobs, self._vocabulary)
    self._adapters_B = np.asarray([job.adapter if job else 0 for job in self._jobs], np.int32)

  def _program(self, lane: Lane) -> tuple:
    return lane.program(self._adapters_B)

  def _run(self, count: int) -> list[Chosen]:
    """Decodes `count` tokens of all rows."""
    batch = self._lane.rows, self._history
    batch, chosen = programs.decode(*self._program(self._lane), batch, self._told, np.int32(count))
    self._lane.rows, self._history = batch
    return _steps(chosen, count)

  # Speculation.

  def _would_speculate(self, width: int) -> bool:
    spec = self._speculation
    return spec is not None and (
      spec.always or self._governor.wants(width, returns=self._draft is None)
    )

  def _proposals(self, jobs: Sequence[Job]):
    """Tokens to verify, int32 [B, T]; None: all rows decode their next token without a draft."""
    spec = self._speculation
    if spec is None or (jobs and not self._would_speculate(self.width)):
      return None
    if self._draft is None:
      return self._n_grams(jobs)
    if not all(job.drafted for job in jobs):
      return None
    self._draft.rows, proposed_BT = programs.draft(
      *self._program(self._draft), self._draft.rows, self._told, spec.tokens, self._history
    )
    self._metrics.drafted += len(jobs) * spec.tokens
    return proposed_BT

  def _n_grams(self, jobs):
    spec = self._speculation
    proposed_BT, found = np.zeros((self.width, spec.tokens), np.int32), 0
    for job in jobs:
      own = propose(job.tokens, spec.tokens, spec.longest)
      proposed_BT[job.row, : len(own)], found = own, found + len(own)
    self._metrics.drafted += found
    return None if jobs and not found else proposed_BT

  def _verify(self, proposed_BT) -> tuple[list[Chosen], np.ndarray]:
    """Runs the proposals: the tokens chosen at each step, and how many steps count per row."""
    batch = self._lane.rows, self._history
    batch, chosen, counts_B = programs.verify(
      *self._program(self._lane), batch, self._told, proposed_BT
    )
    self._lane.rows, self._history = batch
    counts_B = np.asarray(counts_B)
    self._metrics.accepted += int(sum(counts_B[job.row] - 1 for job in self.running))
    return _steps(chosen, proposed_BT.shape[1] + 1), counts_B

  def _check_speculation(self) -> None:
    spec = self._speculation
    if spec is None:
      return
    if not self._lane.can_return(spec.tokens + 1):
      raise ValueError(
        'speculation sets rows back, which states, pages and caches that give tokens up cannot'
      )
    if self._draft is not None:
      other = self._draft.config.vocab_size
      if other != self._vocabulary:
        raise ValueError(f'the draft has {other} tokens, but the model {self._vocabulary}')
      if not self._draft.can_return(spec.tokens + 1):
        raise ValueError('the draft has layers whose rows cannot be set back')


def settings(jobs: Sequence[Job | None], vocabulary: int) -> Rows:
  """The settings that the device gets for rows; tokens, positions and masks change each step."""
  told = programs.told_of([job and job.request for job in jobs], vocabulary)
  for row, job in enumerate(jobs):
    if job is not None and job.mask is not None:
      told.words_B_[row] = job.mask
  return told


def powers(end: int, start: int = 1) -> list[int]:
  """The powers of two from `start` on below `end`."""
  return [1 << i for i in range((start - 1).bit_length(), (end - 1).bit_length())]


def _steps(chosen: Chosen, count: int) -> list[Chosen]:
  chosen = jax.tree.map(np.asarray, chosen)
  return [jax.tree.map(operator.itemgetter(i), chosen) for i in range(count)]
