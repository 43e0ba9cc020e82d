r"""Makes the updates of a training run, a round at a time; `experiments.benchmark_training` asks.

  echo '{"method": "lora", "preset": "tiny-llama", ...}' | python -m experiments.training_updates

The job is a line of JSON with the fields of `Job`. The first answer has what is known before the
first round: how long the update took to compile, what it holds, what it computes. Each further line
is answered with the seconds of a round, its loss, and the most memory that was held.

Device: any.
"""

import dataclasses

import jax
import jax.numpy as jnp

from experiments import children, resident
from experiments.methods import METHODS, Options, Ready, prepare, prepare_random
from model import hf, presets, rounds, stacked
from model.config import ModelConfig
from model.eval import cost, records
from model.train import bench, optimizer, step
from model.train.bench import Bench
from model.train.optimizer import OptimizerConfig
from model.train.step import StepConfig

ENDLESS = 10**9  # updates; the learning rate is constant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One training run to be timed, of a preset with random weights or of a checkpoint.

  dtype: of activations.
  param_dtype: of the matrices that are frozen; what is trained is float32.
  layers: how many of the preset's layers are kept, the first ones; None: all.
  documents: of a row; with more than one, attention is masked.
  updates: of a round.
  """

  method: str
  preset: str
  model: str | None
  dtype: str
  param_dtype: str
  batch_size: int
  seq_len: int
  documents: int
  updates: int
  optimizer: str
  learning_rate: float
  weight_decay: float
  remat: stacked.Remat
  stacked: bool
  loss_chunk: int
  rank: int
  alpha: float
  layers: int | None = None
  seed: int = 0

  @property
  def config(self) -> ModelConfig:
    """The preset with the layers that are kept. Raises ValueError if it has not as many."""
    config = presets.preset(self.preset)
    if self.layers is not None and self.layers > len(config.layers):
      raise ValueError(f'--layers={self.layers}, but {self.preset} has {len(config.layers)}')
    return config.replace(layers=config.layers[: self.layers])


def main() -> None:
  job = Job(**children.read_job())
  memory = _Memory()
  updates, flops = start(job)
  first = updates.run(1)
  for _ in range(rounds.MIN_WARMUP - 1):
    updates.run(1)
  ready = {
    'environment': records.environment(),
    'lower_s': updates.lower_s,
    'compile_s': updates.compile_s,
    'program_bytes': updates.program_bytes,
    'state_bytes': updates.plan.trained + updates.plan.optimizer,
    'frozen_bytes': updates.plan.frozen,
    'trained_parameters': updates.trained_parameters,
    'flops_per_token': flops,
    'loss': float(first['loss']),
  }

  def answer(_: str) -> children.Answer:
    memory.reset()
    last = {}
    seconds = rounds.seconds(lambda: last.update(updates.run(job.updates)))
    return {'seconds': seconds, 'loss': float(last['loss']), **memory.peak()}

  children.serve(ready, answer)


def start(job: Job) -> tuple[Bench, float]:
  """Compiles the update of a job; returns it and its FLOPs per token."""
  ready = _ready(job)
  config = ready.model.config
  batch = bench.random_batch(
    config.vocab_size, job.batch_size, job.seq_len, documents=job.documents, seed=job.seed
  )
  updates = bench.prepare(*_state(job, ready), batch)
  adapted = METHODS[job.method].kind == 'adapter'
  trained = updates.trained_parameters if adapted else None
  return updates, cost.training_flops_per_token(config, job.seq_len, adapter_parameters=trained)


def _ready(job: Job) -> Ready:
  method, options = METHODS[job.method], Options(rank=job.rank, alpha=job.alpha)
  dtype = jnp.dtype(job.param_dtype)
  if job.model is None:
    ready = prepare_random(job.config, method, options, dtype=dtype, seed=job.seed)
  else:
    ready = prepare(hf.load_pretrained(job.model, dtype)[0], method, options, job.seed)
  if not job.stacked:
    return ready
  return dataclasses.replace(ready, model=stacked.stack(ready.model, consume=True))


def _state(job: Job, ready: Ready):
  """What `step.init` returns: the arrays of the model that are trained are copied."""
  update = OptimizerConfig(
    steps=ENDLESS,
    name=job.optimizer,
    decay='constant',
    learning_rate=job.learning_rate,
    weight_decay=job.weight_decay,
  )
  config = StepConfig(
    compute_dtype=job.dtype, remat=job.remat, scan=job.stacked, loss_chunk=job.loss_chunk
  )
  return step.init(ready.model, optimizer.make(update), ready.task, config)


class _Memory:
  """The most memory that was held: of the device where it says so, else of this process."""

  def __init__(self):
    self._device = jax.devices()[0]
    jax.block_until_ready(jnp.zeros(1) + 1)  # the runtime has started
    self._on_device = self._device.memory_stats() is not None
    self.reset()
    self._before = 0 if self._on_device or not resident.is_known() else resident.peak_bytes()

  def reset(self) -> None:
    """Begins anew, where that can be done: a device knows the peak of the whole process alone."""
    if not self._on_device and resident.is_known():
      resident.reset_peak()

  def peak(self) -> dict[str, int]:
    if self._on_device:
      return {'device_peak_bytes': self._device.memory_stats()['peak_bytes_in_use']}
    if resident.is_known():
      return {'resident_growth_bytes': resident.peak_bytes() - self._before}
    return {}


if __name__ == '__main__':
  main()
