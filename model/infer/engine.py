"""Serves many requests at once with one model: continuous batching over one cache.

Each running request has a row of a batch until it ends. One step reads a part of the prompt of the
next request into a cache of one row, if a row is free, and then decodes every running row. Prompts
are read in parts, so running requests wait for one part at a time, or for a few parts if more
requests wait than run. The width of the batch is the smallest power of two that holds the running
rows.

The answer to a request does not depend on the others: a row draws with a key of its own seed and
position, and no query sees another row. Only rounding may differ, as in `model.infer.generate`.

Beginnings that prompts share are read once (`model.infer.prefixes`): the keys and values of whole
blocks of prompts, and of the answers that ended, are kept. This needs caches in which slot s holds
position s; windows, states and evicting caches have no such beginnings, and their prompts are read
anew.

An engine is synchronous and belongs to one thread; `model.infer.worker` gives it one. Its
bookkeeping is in numpy. The order of its work depends on the calls alone and not on the time. Only
the decision to speculate depends on measured times, and it changes no token.
"""

import heapq
import itertools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from model.cache_spec import CacheSpec
from model.infer import adapter_bank, programs
from model.infer.batch import Batch, powers, settings
from model.infer.generate import TOKENS_PER_CALL
from model.infer.job import Job
from model.infer.lane import BLOCK, Lane
from model.infer.metrics import Metrics
from model.infer.prefixes import Prefixes
from model.infer.programs import Chosen
from model.infer.request import Finish, Progress, Request
from model.infer.speculation import Speculation
from model.transformer import Transformer
from ops.sampling import History

LEAST_PART = 16  # tokens of the shortest part of a prompt
MOST_PARTS = 4  # parts of prompts between two steps of the running rows


class Engine:
  """Takes requests, and continues the answer to each at every step.

  slots: how many rows run at once at most.
  capacity: tokens that a row can hold, prompt and answer together.
  cache_format: how keys and values are kept, as in `model.kv_cache`.
  part: the longest part of a prompt that a step reads, a power of two.
  prefix_bytes: bytes for beginnings that prompts share; None: those of two rows; 0: none are kept.
  burst: how many tokens a step decodes of a single running row; a wider batch decodes fewer, so
    that new requests do not wait longer, and half as many where all rows are taken.
  speculation: how tokens are proposed, if they are.
  adapters: by their names, this model with adapters as `model.peft.load` gives them; a request may
    name one.
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
    adapters: Mapping[str, Transformer] | None = None,
  ):
    models = [model, *filter(None, [speculation and speculation.draft])]
    for one in models:
      _check(one, slots, capacity, part)
    self.model, self.slots, self.capacity = model, slots, capacity
    self.metrics = Metrics()
    # The padding of the last part of a prompt takes slots too.
    self._part, stored = part, capacity + part
    self._adapters = {name: i for i, name in enumerate(adapters or {}, 1)}
    if adapters:
      models[0] = adapter_bank.attach(model, adapters)
    self._lanes = [Lane(one, stored, cache_format) for one in models]
    self._batch = Batch(
      self._lanes, slots, burst=burst, speculation=speculation, metrics=self.metrics
    )
    self._reading: Job | None = None
    self._waiting: list[tuple[tuple[int, int], Job]] = []  # a heap
    self._jobs: dict[int, Job] = {}
    self._ids = itertools.count()
    room = 2 * self._lanes[0].row_bytes if prefix_bytes is None else prefix_bytes
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
    """Takes a request and returns the number that `step` uses for it.

    Raises:
      ValueError: the request can never run: it is too long, or names an unknown adapter.
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
    if request.adapter is not None and request.adapter not in self._adapters:
      names = ', '.join(self._adapters) or 'none'
      raise ValueError(f'there is no adapter {request.adapter!r}; there are: {names}')
    own = () if request.ignore_eos else self.model.config.eos_ids
    adapter = self._adapters.get(request.adapter, 0)
    job = Job(next(self._ids), request, request.stop_ids | frozenset(own), adapter)
    self._jobs[job.id] = job
    heapq.heappush(self._waiting, (job.rank, job))
    self._count()
    return job.id

  def cancel(self, request: int) -> None:
    """Ends a request at once, without further progress; does nothing if it has ended."""
    job = self._jobs.get(request)
    if job is not None:
      job.cancelled = True
      self._end(job)
      self._count()

  def step(self) -> list[Progress]:
    """Reads a part of a prompt and decodes the running rows; returns new progress by request."""
    progress = []
    for _ in range(MOST_PARTS):
      if self._reading is None:
        self._begin()
      if self._reading is not None:
        progress += self._read_part()
      running = len(self._batch.running)
      if len(self._jobs) <= 2 * running or running == self.slots:
        break  # no more wait than run, or they wait for those that run
    if self._batch.running:
      progress += self._decode()
    if self._reading is None and not self._waiting:
      self._batch.narrow()
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
    """Compiles every program that requests may need, so that no request waits for compilation."""
    if self.busy:
      raise ValueError('an engine is warmed before it is used')
    lengths = [*powers(self._part, LEAST_PART), self._part]
    vocabulary = self.model.config.vocab_size
    logits_BV, *_ = [lane.warm_parts(lengths) for lane in self._lanes]
    self._lanes[0].warm_scores(lengths)
    history = History.of(programs.NOBODY.sampling, (), (), vocabulary)
    programs.choose(logits_BV, history, settings([None], vocabulary))
    self._batch.warm()

  # Prompts.

  def _begin(self) -> None:
    """Begins to read the prompt of the next request, if there is a row for it."""
    while self._waiting and self._waiting[0][1].cancelled:
      heapq.heappop(self._waiting)
    if not self._waiting:
      return
    job, running = self._waiting[0][1], self._batch.running
    if len(running) == self.slots:
      last = max(running, key=lambda one: one.rank)
      if last.request.priority >= job.request.priority:
        return
      self._preempt(last)
    heapq.heappop(self._waiting)
    self._reading, job.read, job.cached = job, 0, 0
    job.drafted = self._batch.would_draft()
    if self._prefixes is not None and job.request.prompt_logprobs is None:
      self._fetch(job)

  def _preempt(self, job: Job) -> None:
    """Takes its row from a request, which waits and later continues from the same token."""
    self._keep(job)
    self._batch.leave(job)
    heapq.heappush(self._waiting, (job.rank, job))
    self.metrics.preemptions += 1

  def _kind(self, job: Job) -> tuple[str | None, bool]:
    """The kind of prefix blocks that serve a request: those that its draft model has read too."""
    return job.request.adapter, job.drafted

  def _fetch(self, job: Job) -> None:
    """Starts a prompt from the blocks that are kept of its beginning."""
    tokens = job.tokens
    # The last token is always read, for its logits.
    places = self._prefixes.match(tokens[:-1], self._kind(job))
    job.read = job.cached = len(places) * BLOCK
    self.metrics.prefix_queries += len(tokens)
    self.metrics.prefix_hits += job.cached
    if places:
      for lane in self._batch.lanes_of(job):
        lane.fetch(places)

  def _keep(self, job: Job) -> None:
    """Keeps the whole blocks of the tokens that were read for a request."""
    if self._prefixes is None:
      return
    new = self._prefixes.add(job.tokens[: job.read], self._kind(job))
    if new:
      for lane in self._batch.lanes_of(job):
        lane.keep(new, job.row)

  def _read_part(self) -> list[Progress]:
    job, tokens = self._reading, self._reading.tokens
    part = tokens[job.read : job.read + self._part]
    length = max(LEAST_PART, 1 << (len(part) - 1).bit_length())
    tokens_BT, next_T = np.zeros((1, length), np.int32), np.zeros(length, np.int32)
    tokens_BT[0, : len(part)] = part
    lane, *draft = self._batch.lanes_of(job)
    # Whoever continues after a preemption was told of its prompt before.
    if job.request.prompt_logprobs is None or job.new:
      logits_BV = lane.read(tokens_BT, job.read, len(part), job.adapter)
    else:
      following = tokens[job.read + 1 : job.read + 1 + len(part)]
      next_T[: len(following)] = following
      logits_BV, chosen = lane.score(tokens_BT, job.read, len(part), job.adapter, next_T)
      job.score(jax.tree.map(np.asarray, chosen), len(following))
    for other in draft:
      other.read(tokens_BT, job.read, len(part), job.adapter)
    job.read += len(part)
    return [self._admit(job, logits_BV)] if job.read == len(tokens) else []

  def _admit(self, job: Job, logits_BV) -> Progress:
    """Gives a request its first token when its prompt is read, and a row unless it ends."""
    request, vocabulary = job.request, self.model.config.vocab_size
    self._reading = None
    self.metrics.prompt_tokens += job.read
    self._keep(job)
    if not job.left:
      return self._end(job, 'length')
    history = History.of(request.sampling, request.prompt, job.new, vocabulary)
    told = settings([job], vocabulary)
    told.positions_B[:] = job.read
    chosen = jax.tree.map(np.asarray, programs.choose(logits_BV, history, told))
    finish = self._take(job, chosen, 0)
    if finish is not None:
      return self._end(job, finish)
    history.counts_BV[0, job.new[-1]] += 1
    self._batch.admit(job, history)
    return job.progress(None)

  # Answers.

  def _decode(self) -> list[Progress]:
    progress = []
    for job, steps in self._batch.decode(one=self._reading is not None):
      finish = None
      for chosen in steps:
        job.read += 1
        finish = self._take(job, chosen, job.row)
        if finish is not None:
          break
      progress.append(job.progress(None) if finish is None else self._end(job, finish))
    return progress

  def _take(self, job: Job, chosen: Chosen, row: int) -> Finish | None:
    before = len(job.new)
    finish = job.take(chosen, row)
    self.metrics.generated_tokens += len(job.new) - before
    return finish

  def _end(self, job: Job, finish: Finish = 'cancelled') -> Progress:
    """Removes a request and frees its row."""
    del self._jobs[job.id]
    if job is self._reading:
      self._reading = None
    if job.row is not None:
      self._keep(job)
      self._batch.leave(job)
    return job.progress(finish)

  def _count(self) -> None:
    running = self._batch.running
    self.metrics.running = len(running) + (self._reading is not None)
    self.metrics.waiting = len(self._jobs) - self.metrics.running
    held = sum(job.read for job in running)
    self.metrics.cache_usage = held / (self.slots * self.capacity)


def _check(model, slots, capacity, part):
  if slots < 1 or capacity < 2:
    raise ValueError(f'slots must be at least 1 and capacity at least 2, not {slots}, {capacity}')
  if part < LEAST_PART or part & (part - 1):
    raise ValueError(f'part must be a power of two from {LEAST_PART} on, not {part}')
  learned = model.config.max_positions
  if model.positions is not None and capacity > learned:
    raise ValueError(f'capacity is {capacity}, but the model has learned {learned} positions')
