"""Compiles the update of a training run into a callable that can be timed."""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from model.train import loop, memory
from model.train.data import NO_LABEL, Batch
from model.train.memory import MemoryPlan
from model.train.step import Frozen, Metrics, Setup, TrainState, make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
  """The compiled update of one run, on one batch that stays on the device.

  run: makes a number of updates, one after another, and returns the metrics of the last. Nothing is
    read back to the host in between.
  """

  run: Callable[[int], Metrics]
  lower_s: float  # tracing, and lowering to XLA's input
  compile_s: float
  plan: MemoryPlan
  program_bytes: int  # arguments, results and temporary arrays of the compiled update
  trained_parameters: int


def prepare(setup: Setup, state: TrainState, frozen: Frozen, batch: Batch) -> Bench:
  """Compiles the update of what `step.init` returned. The state is donated at the first run."""
  batch = jax.device_put(batch)
  start_s = time.perf_counter()
  lowered = make_step(setup, state).lower(state, frozen, batch)
  lowered_s = time.perf_counter()
  compiled = lowered.compile()
  compiled_s = time.perf_counter()
  plan = memory.plan(
    trained=state.trained,
    frozen=frozen,
    opt_state=(state.opt_state, state.step),
    batch=batch,
    compiled=compiled,
  )
  parameters = sum(array.size for array in state.trained.values())
  held = {'state': state}
  del state  # the first update frees its arrays

  def run(updates: int) -> Metrics:
    for _ in range(updates):
      held['state'], metrics = compiled(held['state'], frozen, batch)
    return jax.block_until_ready(metrics)

  return Bench(
    run=run,
    lower_s=lowered_s - start_s,
    compile_s=compiled_s - lowered_s,
    plan=plan,
    program_bytes=loop.program_bytes(compiled),
    trained_parameters=parameters,
  )


def random_batch(
  vocab_size: int, batch_size: int, seq_len: int, *, documents: int = 1, seed: int = 0
) -> Batch:
  """Rows of random tokens, divided into documents of equal length.

  All tokens but the first of a document are labels. Rows of one document have no segments. Raises
  ValueError if the documents do not divide the rows.
  """
  if documents < 1 or seq_len % documents:
    raise ValueError(f'{documents} documents do not divide rows of {seq_len} tokens')
  rng = np.random.default_rng(seed)
  tokens_BT = rng.integers(0, vocab_size, (batch_size, seq_len), np.int32)
  segments_T, positions_T = np.divmod(np.arange(seq_len, dtype=np.int32), seq_len // documents)
  labels_BT = np.roll(tokens_BT, -1, axis=1)
  labels_BT[:, positions_T == positions_T[-1]] = NO_LABEL
  if documents == 1:
    return Batch(tokens_BT, labels_BT, None, None)
  rows = lambda array_T: np.tile(array_T, (batch_size, 1))
  return Batch(tokens_BT, labels_BT, rows(segments_T + 1), rows(positions_T))
