"""Training that can be killed at any time: another call of `fit` ends with the same bits.

An update depends only on the state and the step (`PackedDataset.batch` is a function of the step),
so a checkpoint is the state after some update. The bits are the same on the same devices; another
number of devices adds in another order. A run's folder records everything that the result depends
on, the starting weights included, and refuses a run that differs in any of it.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np
import tqdm
from flax import nnx

from model import config as model_config
from model import context_parallel, expert_parallel, fingerprint, sharding, stacked
from model.train import optimizer as optimizer_lib
from model.train import step as step_lib
from model.train.data import PackedDataset
from model.train.objectives import CrossEntropy, Models
from model.train.optimizer import OptimizerConfig
from model.train.run_folder import RunFolder
from model.train.step import StepConfig, Task
from model.transformer import Transformer

Record = dict[str, Any]
VERSION = 3  # raised when the same settings give another result


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
  """A training run: its optimizer, its compiled step, and the interval of its checkpoints."""

  optimizer: OptimizerConfig
  step: StepConfig = StepConfig()
  checkpoint_every: int = 500  # updates; the last one is always saved

  def __post_init__(self):
    if self.checkpoint_every < 1:
      raise ValueError(f'checkpoint_every must be at least 1, not {self.checkpoint_every}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
  """A text that a run is measured on after every `every` updates."""

  dataset: PackedDataset
  every: int

  def __post_init__(self):
    if self.every < 1:
      raise ValueError(f'held-out text is measured after at least 1 update, not {self.every}')


@dataclasses.dataclass(frozen=True)
class FitResult:
  """The model with its trained arrays in float32, and one record per update.

  A record has `step` (completed updates), `loss` (mean per label) and the objective's other sums,
  `tokens` (labels), `grad_norm` and `learning_rate`; some have the `held_out_loss` after the
  update.
  """

  model: Transformer
  records: tuple[Record, ...]
  program_bytes: int  # most memory of the compiled update, by its own account; 0 if none ran
  update_s: float  # median time of an update of this call; NaN if it made fewer than two


def fit(
  model: Transformer,
  dataset: PackedDataset,
  config: FitConfig,
  *,
  task: Task | None = None,
  folder: str | pathlib.Path | None = None,
  batch_sharding: jax.sharding.Sharding | None = None,
  held_out: HeldOut | None = None,
  progress: bool = True,
) -> FitResult:
  """Trains a copy of `model` for `config.optimizer.steps` updates; the model does not change.

  `task` is by default the cross entropy of all values. With a folder, the run is saved there and
  resumes where an earlier call stopped. Batches are placed by `batch_sharding`; parameters keep the
  placement that the caller gave them. Measuring on `held_out` changes nothing of the training.

  Raises:
    ValueError: the batch does not divide into micro-batches, the vocabulary is too small for the
      tokens, the task does not fit the model, or the folder holds another run or is in use by
      another process.
    FloatingPointError: the loss or the gradient is not finite; the folder keeps earlier states.
  """
  task = task or Task()
  _check(model, dataset, config)
  if task.on_policy is not None:
    task.on_policy.check(task.objective, dataset.seq_len)
  optimizer = optimizer_lib.make(config.optimizer)
  setup, state, frozen = step_lib.init(model, optimizer, task, config.step)
  with contextlib.ExitStack() as stack:
    run, records = None, []
    if folder is not None:
      run = stack.enter_context(RunFolder(folder, identity(model, dataset, config, task)))
      state, records = run.restore(state)
    update = step_lib.make_step(setup, state)
    compiled = None
    bar = stack.enter_context(_bar(config, len(records), progress))
    loop = _Loop(config=config, run=run, bar=bar, records=records)
    for n in range(int(state.step), config.optimizer.steps):
      batch = dataset.batch(n)
      if task.on_policy is not None:
        batch = task.on_policy(batch, n, stacked.unstack(setup.model(state.arrays, frozen)))
      batch = jax.device_put(batch, batch_sharding)
      compiled = compiled or update.lower(state, frozen, batch).compile()
      state, metrics = compiled(state, frozen, batch)
      if held_out is not None and (n + 1) % held_out.every == 0:
        now = setup.model(state.arrays, frozen)
        metrics['held_out_loss'] = np.float64(mean_nll(now, held_out.dataset, config.step))
      loop.after_update(n + 1, state, metrics)
  return FitResult(
    model=stacked.unstack(setup.model(state.arrays, frozen)),
    records=tuple(loop.records),
    program_bytes=0 if compiled is None else program_bytes(compiled),
    update_s=loop.update_s(),
  )


def program_bytes(compiled: jax.stages.Compiled) -> int:
  """Arguments, results and temporary arrays of a compiled program; those in place count once."""
  sizes = compiled.memory_analysis()
  held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
  return held - sizes.alias_size_in_bytes


def mean_nll(model: Transformer, dataset: PackedDataset, config: StepConfig | None = None) -> float:
  """Measures the mean negative log likelihood over all labels of a data set, in nats.

  Where the mesh of the parameters divides the tokens of a row, it does so here too.
  """
  graphdef, params = nnx.split(model)
  config, mesh = config or StepConfig(), sharding.mesh_of(model)
  rows = expert_parallel.batch_axes(config.dispatch)
  context = context_parallel.plan(config.context, (model.config,), mesh, rows)
  places = None if context.divided is None else sharding.batch_sharding(mesh, rows)
  total, count = 0.0, 0
  for batch in dataset.sequential():
    placed = jax.device_put(batch, places)
    total += float(_nll_sum(graphdef, config, context, params, placed))
    count += int((batch.labels_BT >= 0).sum())
  return total / count


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _nll_sum(graphdef, config, context, params, batch):
  model = nnx.merge(graphdef, params)
  context.use(model)
  student = step_lib.network(model, config)
  return CrossEntropy()(Models(student, {}, {}, None), context.placed(batch))['loss']


class _Loop:
  """Keeps the records, the checkpoints and the progress bar.

  A record is written while the next update runs, so the device never waits for it.
  """

  def __init__(self, *, config: FitConfig, run: RunFolder | None, bar, records: list[Record]):
    self.records = records
    self._config, self._run, self._bar = config, run, bar
    self._rate = optimizer_lib.schedule(config.optimizer)
    self._pending = None
    self._tokens, self._ends_s = 0, []

  def after_update(self, step: int, state: step_lib.TrainState, metrics: step_lib.Metrics) -> None:
    self._flush()
    self._pending = (step, metrics)
    last = step == self._config.optimizer.steps
    if last or step % self._config.checkpoint_every == 0:
      self._flush()  # the records precede their checkpoint, and a broken state gets none
      if self._run is not None:
        self._run.save(step, state)

  def _flush(self):
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    values = jax.tree.map(lambda value: value.tolist(), metrics)
    record = {'step': step, **values, 'learning_rate': float(self._rate(step - 1))}
    if not (math.isfinite(record['loss']) and math.isfinite(record['grad_norm'])):
      raise FloatingPointError(
        f'update {step} has the loss {record["loss"]} and the gradient norm '
        f'{record["grad_norm"]}; try a lower learning rate or a longer warm-up'
      )
    self.records.append(record)
    if self._run is not None:
      self._run.append(record)
    self._show(record)

  def update_s(self) -> float:
    """The median time between the ends of two updates, in seconds."""
    gaps = [b - a for a, b in itertools.pairwise(self._ends_s)]
    return statistics.median(gaps) if gaps else math.nan

  def _show(self, record):
    words = f'loss {record["loss"]:.3f}'
    self._ends_s.append(time.perf_counter())
    if len(self._ends_s) > 1:  # the first update is mostly compilation
      self._tokens += record['tokens']
      words += f', {self._tokens / (self._ends_s[-1] - self._ends_s[0]):.0f} tokens/s'
    self._bar.set_postfix_str(words, refresh=False)
    self._bar.update()


def _bar(config: FitConfig, done: int, progress: bool) -> tqdm.tqdm:
  return tqdm.tqdm(
    total=config.optimizer.steps, initial=done, unit='update', disable=not progress, mininterval=1.0
  )


def _check(model: Transformer, dataset: PackedDataset, config: FitConfig) -> None:
  if dataset.batch_size % config.step.accumulation:
    raise ValueError(
      f'a batch of {dataset.batch_size} rows does not divide into '
      f'{config.step.accumulation} micro-batches'
    )
  if dataset.highest >= model.config.vocab_size:
    raise ValueError(
      f'the data has token ids up to {dataset.highest}, but the model has a vocabulary of '
      f'{model.config.vocab_size}'
    )
  if model.config.rope is None and dataset.seq_len > model.config.max_positions:
    raise ValueError(
      f'rows of {dataset.seq_len} tokens, but the model has {model.config.max_positions} positions'
    )


def identity(model: Transformer, dataset: PackedDataset, config: FitConfig, task: Task) -> Record:
  """Everything that the result of a run depends on, as JSON values."""
  return {
    'version': VERSION,
    'optimizer': dataclasses.asdict(config.optimizer),
    'step': dataclasses.asdict(config.step),
    'objective': {'name': type(task.objective).__name__, **dataclasses.asdict(task.objective)},
    'selection': dataclasses.asdict(task.selection),
    'on_policy': task.on_policy and task.on_policy.identity,
    'data': dataset.fingerprint,
    'model': model_config.to_json(model.config),
    'starting weights': fingerprint.of_model(model),
    'references': {name: fingerprint.of_model(m) for name, m in sorted(task.references.items())},
  }
