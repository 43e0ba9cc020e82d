"""Serves many requests at once with one model: continuous batching over one cache.

Each running request has a row of a batch, and gives it up when it ends. One step reads a part of
the prompt of the next request into a cache of one row, if a row is free, and then decodes every
running row. The prompt of a request is read in parts, so those that run wait for one part at a
time. The batch is as wide as a power of two has to be for the running rows.

What a request gets does not depend on the others: a row draws with a key of its own seed and
position, and no query sees another row. What remains is rounding, as in `model.infer.generate`.

Beginnings that prompts share are read once (`model.infer.prefixes`): the keys and values of whole
blocks of prompts, and of the answers that ended, are kept. This needs caches in which slot s holds
position s; windows, states and evicting caches have no such beginnings, and their prompts are read
anew.

An engine is synchronous and belongs to one thread; `model.infer.worker` gives it one. Its
bookkeeping is in numpy. The order of its work depends on the calls alone, never on the time, but
for whether it speculates, which changes no token.
"""

import heapq
import itertools
import operator
import time
from collections.abc import Sequence

import jax
import numpy as np

from model.cache_spec import CacheSpec
from model.infer import programs
from model.infer.generate import TOKENS_PER_CALL
from model.infer.job import Job
from model.infer.lane import BLOCK, Lane
from model.infer.metrics import Metrics
from model.infer.prefixes import Prefixes
from model.infer.programs import Chosen, Rows
from model.infer.request import Finish, Progress, Request
from model.infer.speculation import Governor, Speculation, propose
from model.transformer import Transformer
from ops.sampling import History

LEAST_PART = 16  # tokens of the shortest part of a prompt


class Engine:
  """Takes requests, and answers a little of each at every step.

  slots: how many rows run at once at most.
  capacity: tokens that a row can hold, prompt and answer together.
  cache_format: how keys and values are kept, as in `model.kv_cache`.
  part: the longest part of a prompt that a step reads, a power of two.
  prefix_bytes: bytes for beginnings that prompts share; None: those of two rows; 0: none are kept.
  burst: how many tokens one row alone takes in a step; rows of a wider batch take fewer, so that
    those who wait do not wait longer.
  speculation: how tokens are proposed, if they are.
  """

  def __init__(
    self,
    model: Transformer,
    *,
    slots: int = 8,
    capacity: int = 2048,
    cache_format: CacheSpec | str = 'float',
    part: int = 128,
    prefix_bytes: int | None = None,
    burst: int = TOKENS_PER_CALL,
    speculation: Speculation | None = None,
  ):
    _check(model, slots, capacity, part, burst)
    self.model, self.slots, self.capacity = model, slots, capacity
    self.metrics = Metrics()
    self._part, self._burst = part, burst
    # The padding of the last part of a prompt takes slots too.
    self._lane = Lane(model, capacity + part, cache_format)
    self._speculation, self._governor = speculation, Governor()
    draft = speculation and speculation.draft
    if draft is not None:
      _check(draft, slots, capacity, part, burst)
    self._draft = None if draft is None else Lane(draft, capacity + part, cache_format)
    self._check_speculation()
    self._lanes = [self._lane, *filter(None, [self._draft])]
    self._widths = [*_powers(slots), slots]
    self._rows: list[Job | None] = [None]
    self._history = History.empty(1, model.config.vocab_size)
    self._told = self._settings(self._rows)
    self._reading: Job | None = None
    self._waiting: list[tuple[tuple[int, int], Job]] = []  # a heap
    self._jobs: dict[int, Job] = {}
    self._ids = itertools.count()
    room = 2 * self._lane.row_bytes if prefix_bytes is None else prefix_bytes
    places = min(lane.places_in(room) if lane.by_position else 0 for lane in self._lanes)
    self._prefixes = Prefixes(places, BLOCK) if places else None
    if places:
      for lane in self._lanes:
        lane.keep_blocks(places)

  @property
  def row_bytes(self) -> int:
    """Bytes of the keys and values of one row."""
    return sum(lane.row_bytes for lane in self._lanes)

  @property
  def busy(self) -> bool:
    """Whether any request is running or waiting."""
    return bool(self._jobs)

  def add(self, request: Request) -> int:
    """Takes a request and returns the number by which `step` speaks of it.

    Raises:
      ValueError: it can never run: it is too long, or names what the model does not have.
    """
    vocabulary = self.model.config.vocab_size
    for token in (*request.prompt, *(token for token, _ in request.sampling.logit_bias)):
      if not 0 <= token < vocabulary:
        raise ValueError(f'token {token} is outside the vocabulary of {vocabulary}')
    needed = len(request.prompt) + request.max_new_tokens
    if needed > self.capacity:
      raise ValueError(
        f'a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones need '
        f'{needed} positions, but there are {self.capacity}'
      )
    if request.adapter is not None:
      raise ValueError(f'there is no adapter {request.adapter!r}')
    own = () if request.ignore_eos else self.model.config.eos_ids
    job = Job(next(self._ids), request, request.stop_ids | frozenset(own))
    self._jobs[job.id] = job
    heapq.heappush(self._waiting, (job.rank, job))
    self._count()
    return job.id

  def cancel(self, request: int) -> None:
    """Ends a request at once; nothing more is told of it. One that has ended is no error."""
    job = self._jobs.get(request)
    if job is not None:
      job.cancelled = True
      self._end(job)
      self._count()

  def step(self) -> list[Progress]:
    """Reads a part of a prompt and decodes the running rows: what is new, by request."""
    progress = []
    if self._reading is None:
      self._begin()
    if self._reading is not None:
      progress += self._read_part()
    if self._running:
      progress += self._decode()
    self._narrow()
    self._count()
    return progress

  def run(self, requests: Sequence[Request]) -> list[list[int]]:
    """Runs requests to their end: the new tokens of each."""
    new = {self.add(request): [] for request in requests}
    while self.busy:
      for progress in self.step():
        new.get(progress.request, []).extend(progress.tokens)
    return list(new.values())

  def warm(self) -> None:
    """Compiles every program that requests may need, so that none waits for it."""
    if self.busy:
      raise ValueError('an engine is warmed before it is used')
    parts, zero = [*_powers(self._part, LEAST_PART), self._part], np.int32(0)
    history = History.of(programs.NOBODY.sampling, (), (), self.model.config.vocab_size)
    logits_BV, *_ = [lane.warm_parts(parts) for lane in self._lanes]
    programs.choose(logits_BV, history, self._settings([None]))
    for width in self._widths:
      if width != len(self._rows):
        self._rearrange(width)
      self._history = programs.remember(self._history, zero, history)
      for lane in self._lanes:
        lane.warm_rows()
      self._run(0)
      if self._speculation is not None:
        self._verify(self._proposals([]))
    for width in reversed(self._widths[:-1]):
      self._rearrange(width)

  @property
  def _running(self) -> list[Job]:
    return [job for job in self._rows if job is not None]

  def _check_speculation(self) -> None:
    spec = self._speculation
    if spec is None:
      return
    if not self._lane.can_return(spec.tokens + 1):
      raise ValueError(
        'speculation sets rows back, which states, pages and caches that give tokens up cannot'
      )
    if self._draft is not None:
      own, other = self.model.config.vocab_size, spec.draft.config.vocab_size
      if own != other:
        raise ValueError(f'the draft has {other} tokens, but the model {own}')
      if not self._draft.can_return(spec.tokens + 1):
        raise ValueError('the draft has layers whose rows cannot be set back')

  # Beginnings that prompts share.

  def _kind(self, job: Job) -> tuple[str | None, bool]:
    """Blocks that the draft has not read are no use to a request that it drafts for."""
    return job.request.adapter, job.drafted

  def _keep(self, job: Job) -> None:
    """Keeps the whole blocks of what a row, or the lane that reads prompts, has read."""
    if self._prefixes is None:
      return
    new = self._prefixes.add(job.tokens[: job.read], self._kind(job))
    if new:
      for lane in self._lanes if job.drafted else [self._lane]:
        lane.keep(new, job.row)

  # Prompts.

  def _begin(self) -> None:
    """Begins to read the prompt of the next request, if there is a row for it."""
    while self._waiting and self._waiting[0][1].cancelled:
      heapq.heappop(self._waiting)
    if not self._waiting:
      return
    job = self._waiting[0][1]
    if len(self._running) == self.slots:
      last = max(self._running, key=lambda one: one.rank)
      if last.request.priority >= job.request.priority:
        return
      self._preempt(last)
    heapq.heappop(self._waiting)
    self._reading, job.read, job.cached = job, 0, 0
    job.drafted = self._draft is not None and self._would_speculate(len(self._running) + 1)
    if self._prefixes is not None and job.request.prompt_logprobs is None:
      self._fetch(job)

  def _fetch(self, job: Job) -> None:
    tokens = job.tokens
    # The last token is always read, for its logits.
    places = self._prefixes.match(tokens[:-1], self._kind(job))
    job.read = job.cached = len(places) * BLOCK
    self.metrics.prefix_queries += len(tokens)
    self.metrics.prefix_hits += job.cached
    if places:
      for lane in self._lanes if job.drafted else [self._lane]:
        lane.fetch(places)

  def _preempt(self, job: Job) -> None:
    """Takes the row of a request, which waits and then continues where it was."""
    self._keep(job)
    self._leave(job)
    heapq.heappush(self._waiting, (job.rank, job))
    self.metrics.preemptions += 1

  def _read_part(self) -> list[Progress]:
    job, tokens = self._reading, self._reading.tokens
    part = tokens[job.read : job.read + self._part]
    length = max(LEAST_PART, 1 << (len(part) - 1).bit_length())
    tokens_BT, next_T = np.zeros((1, length), np.int32), np.zeros(length, np.int32)
    tokens_BT[0, : len(part)] = part
    # Whoever continues after a preemption was told of its prompt before.
    if job.request.prompt_logprobs is None or job.new:
      logits_BV = self._lane.read(tokens_BT, job.read, len(part))
    else:
      following = tokens[job.read + 1 : job.read + 1 + len(part)]
      next_T[: len(following)] = following
      logits_BV, chosen = self._lane.score(tokens_BT, job.read, len(part), next_T)
      job.score(jax.tree.map(np.asarray, chosen), len(following))
    if job.drafted:
      self._draft.read(tokens_BT, job.read, len(part))
    job.read += len(part)
    return [self._admit(job, logits_BV)] if job.read == len(tokens) else []

  def _admit(self, job: Job, logits_BV) -> Progress:
    """Gives a request whose prompt was read its first token, and a row if it goes on."""
    request, vocabulary = job.request, self.model.config.vocab_size
    self._reading = None
    self.metrics.prompt_tokens += job.read
    self._keep(job)
    if not job.left:
      return self._end(job, 'length')
    history = History.of(request.sampling, request.prompt, job.new, vocabulary)
    told = self._settings([job])
    told.positions_B[:] = job.read
    chosen = jax.tree.map(np.asarray, programs.choose(logits_BV, history, told))
    finish = self._take(job, chosen, 0)
    if finish is not None:
      return self._end(job, finish)
    history.counts_BV[0, job.new[-1]] += 1
    if None not in self._rows:
      self._rearrange(self._widths[self._widths.index(len(self._rows)) + 1])
    job.row = self._rows.index(None)
    self._rows[job.row] = job
    for lane in self._lanes if job.drafted else [self._lane]:
      lane.admit(job.row)
    self._history = programs.remember(self._history, np.int32(job.row), history)
    self._told = self._settings(self._rows)
    return job.progress(None)

  # Rows.

  def _settings(self, jobs: Sequence[Job | None]) -> Rows:
    """What the device is told of rows; their tokens, positions and masks change at each step."""
    sampling, keys_B_, logprobs_B = programs.row_settings([job and job.request for job in jobs])
    words = -(-self.model.config.vocab_size // 32)
    told = Rows(
      tokens_B=np.zeros(len(jobs), np.int32),
      positions_B=np.zeros(len(jobs), np.int32),
      sampling=sampling,
      keys_B_=keys_B_,
      logprobs_B=logprobs_B,
      words_B_=np.zeros((len(jobs), words), np.uint32),
    )
    for row, job in enumerate(jobs):
      if job is not None and job.mask is not None:
        told.words_B_[row] = job.mask
    return told

  def _decode(self) -> list[Progress]:
    jobs, told = self._running, self._told
    for job in jobs:
      told.tokens_B[job.row], told.positions_B[job.row] = job.new[-1], job.read
      if job.mask is not None:
        told.words_B_[job.row] = job.mask
    start, width = time.perf_counter(), len(self._rows)
    guided = any(job.mask is not None for job in jobs)
    proposals = None if guided else self._proposals(jobs)
    if proposals is None:
      burst = 1 if guided or self._reading is not None else self._burst // width
      steps, count = self._run(max(1, min(burst, *(job.left for job in jobs))))
      counts_B = np.full(width, count)
    else:
      steps, counts_B = self._verify(proposals)
    progress, before = [], self.metrics.generated_tokens
    for job in jobs:
      job.drafted &= proposals is not None
      finish = None
      for chosen in steps[: counts_B[job.row]]:
        job.read += 1
        finish = self._take(job, chosen, job.row)
        if finish is not None:
          break
      progress.append(job.progress(None) if finish is None else self._end(job, finish))
    if self._speculation is not None and not guided:
      new = self.metrics.generated_tokens - before
      self._governor.took(width, proposals is not None, time.perf_counter() - start, new)
    return progress

  def _run(self, count: int) -> tuple[list[Chosen], int]:
    """Decodes so many tokens of all rows: what was chosen at each step."""
    batch = self._lane.rows, self._history
    batch, chosen = programs.decode(*self._lane.program, batch, self._told, np.int32(count))
    self._lane.rows, self._history = batch
    return _steps(chosen, count), count

  # Speculation.

  def _would_speculate(self, width: int) -> bool:
    spec = self._speculation
    return spec is not None and (
      spec.always or self._governor.wants(self._width_for(width), self._draft is None)
    )

  def _width_for(self, rows: int) -> int:
    return next(width for width in self._widths if width >= min(rows, self.slots))

  def _proposals(self, jobs: Sequence[Job]):
    """Tokens to verify, int32 [B, T]; None: all rows take their next token."""
    spec, width = self._speculation, len(self._rows)
    if spec is None or (jobs and not self._would_speculate(width)):
      return None
    if self._draft is None:
      proposed_BT, found = np.zeros((width, spec.tokens), np.int32), 0
      for job in jobs:
        own = propose(job.tokens, spec.tokens, spec.longest)
        proposed_BT[job.row, : len(own)], found = own, found + len(own)
      if jobs and not found:
        return None
      self.metrics.drafted += found
      return proposed_BT
    if not all(job.drafted for job in jobs):
      return None
    self._draft.rows, proposed_BT = programs.draft(
      *self._draft.program, self._draft.rows, self._told, spec.tokens, self._history
    )
    self.metrics.drafted += len(jobs) * spec.tokens
    return proposed_BT

  def _verify(self, proposed_BT) -> tuple[list[Chosen], np.ndarray]:
    """Runs the proposals: what is chosen at each step, and how many steps count in each row."""
    batch = self._lane.rows, self._history
    batch, chosen, counts_B = programs.verify(*self._lane.program, batch, self._told, proposed_BT)
    self._lane.rows, self._history = batch
    counts_B = np.asarray(counts_B)
    self.metrics.accepted += int(sum(counts_B[job.row] - 1 for job in self._running))
    return _steps(chosen, proposed_BT.shape[1] + 1), counts_B

  def _take(self, job: Job, chosen, row: int) -> Finish | None:
    before = len(job.new)
    finish = job.take(chosen, row)
    self.metrics.generated_tokens += len(job.new) - before
    return finish

  def _end(self, job: Job, finish: Finish = 'cancelled') -> Progress:
    """Forgets a request, whose row is free again."""
    del self._jobs[job.id]
    if job is self._reading:
      self._reading = None
    if job.row is not None:
      self._keep(job)
      self._leave(job)
    return job.progress(finish)

  def _leave(self, job: Job) -> None:
    self._rows[job.row], job.row = None, None
    self._told = self._settings(self._rows)

  def _narrow(self) -> None:
    """Halves a batch of which no more than a quarter runs and for which nobody waits."""
    at = self._widths.index(len(self._rows))
    quiet = self._reading is None and not self._waiting
    if at and quiet and 4 * len(self._running) <= len(self._rows):
      self._rearrange(self._widths[at - 1])

  def _rearrange(self, width: int) -> None:
    """Makes the batch as wide as that; the running rows come first."""
    running = self._running
    order_B = np.zeros(width, np.int32)
    order_B[: len(running)] = [job.row for job in running]
    self._history = programs.rearrange(self._history, order_B)
    for lane in self._lanes:
      lane.rearrange(order_B)
    self._rows = [*running, *[None] * (width - len(running))]
    for row, job in enumerate(running):
      job.row = row
    self._told = self._settings(self._rows)

  def _count(self) -> None:
    running = self._running
    self.metrics.running = len(running) + (self._reading is not None)
    self.metrics.waiting = len(self._jobs) - self.metrics.running
    held = sum(job.read for job in running)
    self.metrics.cache_usage = held / (self.slots * self.capacity)


def _steps(chosen: Chosen, count: int) -> list[Chosen]:
  chosen = jax.tree.map(np.asarray, chosen)
  return [jax.tree.map(operator.itemgetter(i), chosen) for i in range(count)]


def _powers(end: int, start: int = 1) -> list[int]:
  """The powers of two from `start` on below `end`."""
  return [1 << i for i in range((start - 1).bit_length(), (end - 1).bit_length())]


def _check(model, slots, capacity, part, burst):
  if slots < 1 or capacity < 2:
    raise ValueError(f'slots must be at least 1 and capacity at least 2, not {slots}, {capacity}')
  if part < LEAST_PART or part & (part - 1):
    raise ValueError(f'part must be a power of two from {LEAST_PART} on, not {part}')
  if not 1 <= burst <= TOKENS_PER_CALL:
    raise ValueError(f'burst must be within 1 and {TOKENS_PER_CALL}, not {burst}')
  learned = model.config.max_positions
  if model.positions is not None and capacity > learned:
    raise ValueError(f'capacity is {capacity}, but the model has learned {learned} positions')
