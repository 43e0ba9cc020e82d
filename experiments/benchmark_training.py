r"""Measures the speed and the memory of training by each method, beside torch's.

  python -m experiments.benchmark_training
  python -m experiments.benchmark_training --dtype=bfloat16 --stacked --peer=PEER_VENV/bin/python
  python -m experiments.benchmark_training --preset=tinyllama-1.1b --methods=full \
      --dtype=bfloat16 --batch_size=4 --seq_len=2048 --loss_chunk=8192 --updates=5 \
      --peer=PEER_VENV/bin/python --peer_modes=eager,compiled
  python -m experiments.benchmark_training --preset=llama-3.1-8b --methods=lora,qlora \
      --dtype=bfloat16 --batch_size=4 --seq_len=1024 --loss_chunk=4096 --remat=block --stacked \
      --updates=3 --peer=PEER_VENV/bin/python

The model is a preset with random weights, made ready block by block, or a checkpoint. Each method
runs in a process of its own (experiments/training_updates.py), and so does the peer
(experiments/peers/torch_training.py), by the Python of an environment that has torch, transformers
and peft, and bitsandbytes for qlora. They make equally many updates in turn, on the same rows of
random tokens, which stay on the device; ratios are medians of the rounds' ratios.

Trained arrays, their gradients and AdamW's moments are float32 on both sides. `--dtype` is that of
the products (torch: autocast), `--param_dtype` that of what is frozen. Useful FLOPs are those of
`cost.training_flops_per_token`; nothing that is computed twice counts.

Memory: `program_peak_bytes` is the compiled update's own account. On a GPU, `device_peak_bytes` is
the allocator's: ours of the whole process, torch's of its rounds. On a CPU under Linux,
`resident_growth_bytes` is how much the process grew from before the model to the peak of a round,
with what the compilers left behind.

On a GPU both sides hold their memory at the same time, so they have to fit together. XLA:CPU has no
bfloat16 products: it widens the matrices, and keeps them.

Device: any. Minutes: 1 to 2 a method on a GPU, mostly start-up, and with rows of 2 x 256 on two CPU
cores.
Compiled for an H200 (jax 0.11.2), the update of the 1B model takes 27 GB, that of the 8B model 9 GB
with qlora and 19 GB with lora.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys

import numpy as np
from absl import flags

from experiments import children, common
from experiments.children import Child
from experiments.methods import METHODS
from experiments.training_updates import Job
from model import stacked
from model.eval import records, timing
from model.eval.records import Metric, Record
from model.hf_names import config_to_hf
from model.train.optimizer import OPTIMIZERS
from model.train.step import DTYPES

STARTS = ('rslora', 'pissa', 'loftq')  # their updates are those of lora and qlora
TIMED = [name for name in METHODS if name not in STARTS]
MODES = ('eager', 'compiled')
OURS, PEER = 'ours', 'torch'
PEER_SCRIPT = pathlib.Path(__file__).parent / 'peers' / 'torch_training.py'
# Unless they are set: both sides hold their memory at the same time, and a program that was found
# on disk says nothing of how long it takes to compile.
ENVIRONMENT = {
  'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
  'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.95',
  'JAX_ENABLE_COMPILATION_CACHE': 'false',
}
# Dense bfloat16 products, by NVIDIA's data sheets.
PEAK_TFLOPS = {'H100 80GB HBM3': 989.4, 'H200': 989.4}

PRESET = flags.DEFINE_string('preset', 'smollm2-135m', 'A shape of model/presets.py.')
LAYERS = flags.DEFINE_integer(
  'layers', None, "Keep so many of the preset's layers, the first ones.", lower_bound=1
)
MODEL = flags.DEFINE_string('model', None, 'A folder or .gguf file, instead of a preset.')
NAMES = flags.DEFINE_list('methods', ['full', 'lora', 'qlora'], f'Of {", ".join(TIMED)}.')
DTYPE = flags.DEFINE_enum('dtype', 'float32', DTYPES, 'Type of activations and products.')
PARAM_DTYPE = flags.DEFINE_enum(
  'param_dtype', None, DTYPES, 'Type of matrices that are frozen. Default: that of --dtype.'
)
BATCH_SIZE = flags.DEFINE_integer('batch_size', 4, 'Rows per update.', lower_bound=1)
SEQ_LEN = flags.DEFINE_integer('seq_len', 256, 'Tokens per row.', lower_bound=2)
DOCUMENTS = flags.DEFINE_integer(
  'documents', 1, 'Documents per row, which do not see each other; the peer has one.', lower_bound=1
)
OPTIMIZER = flags.DEFINE_enum('optimizer', 'adamw', list(OPTIMIZERS), 'The peer has adamw alone.')
REMAT = flags.DEFINE_enum(
  'remat', 'none', stacked.REMATS, 'What the backward pass computes again; dots is block for torch.'
)
STACKED = flags.DEFINE_bool('stacked', False, 'Stack layers that are alike, and scan them.')
LOSS_CHUNK = flags.DEFINE_integer(
  'loss_chunk', 1024, 'Tokens whose logits are held.', lower_bound=1
)
RANK = flags.DEFINE_integer('rank', 16, 'Rank of the adapters.', lower_bound=1)
UPDATES = flags.DEFINE_integer('updates', 1, 'Updates per round.', lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Interleaved rounds.', lower_bound=timing.MIN_ROUNDS)
PEER_PYTHON = flags.DEFINE_string('peer', None, 'Python of the environment that has torch.')
PEER_MODES = flags.DEFINE_list('peer_modes', ['eager'], f'Of {", ".join(MODES)}.')
PEAK = flags.DEFINE_float(
  'peak_tflops', None, 'Of the device in --dtype, for the utilization.', lower_bound=0.0
)
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
SMOKE = flags.DEFINE_bool('smoke', False, 'A tiny preset and few tokens.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """The answers of both sides to one job: the first ones, and one per round by ours or mode."""

  job: Job
  ours: dict
  peer: dict | None
  rounds: dict[str, list[dict]]

  def rates(self, name: str) -> np.ndarray:
    """The tokens per second of each round."""
    tokens = self.job.batch_size * self.job.seq_len * self.job.updates
    return tokens / np.array([answer['seconds'] for answer in self.rounds[name]])

  @property
  def modes(self) -> list[str]:
    return [name for name in self.rounds if name != OURS]


def main() -> None:
  jobs = _jobs()
  lora_bytes = None
  for job in jobs:
    run = _run(job)
    record = _record(run, lora_bytes)
    if job.method == 'lora':
      lora_bytes = record.value('program_peak_bytes')
    for row in [record, *_peer_records(run)]:
      print(_words(row), flush=True)
      if OUTPUT.value:
        records.append(OUTPUT.value, row)


def _jobs() -> list[Job]:
  """The jobs that the flags ask for. Raises ValueError if they do not fit together."""
  for name in NAMES.value:
    if name in STARTS:
      raise ValueError(f'--methods has {name}, whose updates take as long as those of (q)lora')
    if name not in TIMED:
      raise ValueError(f'--methods has {name!r}, which is not one of {", ".join(TIMED)}')
  for mode in PEER_MODES.value:
    if mode not in MODES:
      raise ValueError(f'--peer_modes has {mode!r}, which is not one of {", ".join(MODES)}')
  param_dtype = PARAM_DTYPE.value or DTYPE.value
  if (DTYPE.value, param_dtype) == ('float32', 'bfloat16'):
    raise ValueError('--param_dtype=bfloat16 goes with --dtype=bfloat16')
  if PEER_PYTHON.value and OPTIMIZER.value != 'adamw':
    raise ValueError(f'the peer has no {OPTIMIZER.value}; leave --optimizer or --peer out')
  if PEER_PYTHON.value and DOCUMENTS.value > 1:
    raise ValueError('the peer has one document per row; leave --documents or --peer out')
  preset = 'tiny-llama' if SMOKE.value else PRESET.value
  if MODEL.value is not None and LAYERS.value is not None:
    raise ValueError('--layers is of a preset; leave it or --model out')
  jobs = [
    Job(
      method=name,
      preset=preset,
      layers=LAYERS.value,
      model=MODEL.value,
      dtype=DTYPE.value,
      param_dtype=param_dtype,
      batch_size=2 if SMOKE.value else BATCH_SIZE.value,
      seq_len=32 if SMOKE.value else SEQ_LEN.value,
      documents=DOCUMENTS.value,
      updates=UPDATES.value,
      optimizer=OPTIMIZER.value,
      learning_rate=METHODS[name].rate,
      weight_decay=0.1,
      remat=REMAT.value,
      stacked=STACKED.value,
      loss_chunk=LOSS_CHUNK.value,
      rank=4 if SMOKE.value else RANK.value,
      alpha=32.0,
    )
    for name in NAMES.value
  ]
  if MODEL.value is None:
    _ = jobs[0].config  # that the preset exists and has as many layers
  return jobs


def _run(job: Job) -> Run:
  """Starts both sides and has them make their updates in turn."""
  with contextlib.ExitStack() as stack:
    command = [sys.executable, '-m', 'experiments.training_updates']
    ours, ready = stack.enter_context(_start(OURS, command, job))
    sides, peer = {OURS: ours}, None
    if PEER_PYTHON.value:
      other, peer = _peer(job, ready['environment']['platform'], stack)
      sides |= dict.fromkeys(peer.get('modes', ()), other)
    answers = {name: [] for name in sides}
    names = list(sides)
    for r in common.progress(range(ROUNDS.value), f'{job.method}: rounds'):
      turn = r % len(names)
      for name in names[turn:] + names[:turn]:
        answers[name].append(sides[name].ask(name))
  return Run(job=job, ours=ready, peer=peer, rounds=answers)


def _start(name: str, command: list[str], job: Job, **more):
  env = {key: value for key, value in ENVIRONMENT.items() if key not in os.environ}
  return children.start(name, command, dataclasses.asdict(job) | more, env)


def _peer(job: Job, platform: str, stack: contextlib.ExitStack) -> tuple[Child | None, dict]:
  """The peer and its first answer: why it is unavailable, if it has no such method or fails."""
  config = None if job.model else config_to_hf(job.config)
  command = [PEER_PYTHON.value, str(PEER_SCRIPT)]
  try:
    child, ready = stack.enter_context(
      _start(PEER, command, job, hf_config=config, modes=PEER_MODES.value)
    )
  except ValueError as error:
    return None, {'unavailable': str(error)}
  if 'modes' in ready and (ready['device'] == 'cuda') != (platform == 'gpu'):
    return None, {'unavailable': f'torch has {ready["device"]}, and JAX {platform}'}
  return child, ready


def _record(run: Run, lora_bytes: float | None) -> Record:
  ours, rates = run.ours, run.rates(OURS)
  metrics = {
    **_speed(run, OURS),
    'trace_time': Metric(ours['lower_s'], 's'),
    'compile_time': Metric(ours['lower_s'] + ours['compile_s'], 's'),
    'program_peak_bytes': Metric(ours['program_bytes'], 'byte'),
    'state_bytes': Metric(ours['state_bytes'], 'byte'),
    'frozen_bytes': Metric(ours['frozen_bytes'], 'byte'),
    'trained_parameters': Metric(ours['trained_parameters'], '1'),
  }
  if lora_bytes is not None:
    metrics['program_peak_bytes / lora'] = Metric(ours['program_bytes'] / lora_bytes, '1')
  for mode in run.modes:
    ratios = rates / run.rates(mode)
    metrics[f'tokens_per_s / {PEER} {mode}'] = timing.summarize(ratios, '1')
    for name in ('device_peak_bytes', 'resident_growth_bytes'):
      if name in metrics and name in run.rounds[mode][0]:
        ratio = metrics[name].value / _most(run, mode, name)
        metrics[f'{name} / {PEER} {mode}'] = Metric(ratio, '1')
  if run.modes:
    best = max(run.modes, key=lambda mode: np.median(run.rates(mode)))
    metrics[f'tokens_per_s / best of {PEER}'] = metrics[f'tokens_per_s / {PEER} {best}']
  return _row(run, 'benchmark_training', run.job.method, ours['environment'], metrics)


def _peer_records(run: Run) -> list[Record]:
  found = []
  for mode in run.modes:
    first_s = run.peer['modes'][mode]['first_update_s']
    metrics = _speed(run, mode) | {
      'first_update_time': Metric(first_s, 's'),
      'trained_parameters': Metric(run.peer['trained_parameters'], '1'),
    }
    environment = run.ours['environment'] | {'peer_versions': run.peer['versions']}
    name = f'{PEER} {mode}, {run.job.method}'
    found.append(_row(run, 'benchmark_training peer', name, environment, metrics))
  return found


def _speed(run: Run, name: str) -> dict[str, Metric]:
  """The metrics that both sides have."""
  answers, rates = run.rounds[name], run.rates(name)
  first = run.ours['loss'] if name == OURS else run.peer['modes'][name]['loss']
  flops = run.ours['flops_per_token']
  metrics = {
    'tokens_per_s': timing.summarize(rates, 'token/s'),
    'update_time': timing.summarize([a['seconds'] / run.job.updates for a in answers], 's'),
    'flops_per_token': Metric(flops, 'FLOP/token'),
    'first_loss': Metric(first, 'nat'),
    'last_loss': Metric(answers[-1]['loss'], 'nat'),
  }
  peak = _peak_flops(run)
  if peak is not None:
    used = rates * flops / peak
    metrics['model_flops_utilization'] = timing.summarize(used, '1')
  for memory in ('device_peak_bytes', 'resident_growth_bytes'):
    if memory in answers[0]:
      metrics[memory] = Metric(_most(run, name, memory), 'byte', len(answers))
  return metrics


def _peak_flops(run: Run) -> float | None:
  """The FLOP/s of the device: those of the flag, or of the table for bfloat16."""
  if PEAK.value:
    return 1e12 * PEAK.value
  device = run.ours['environment']['device'].removeprefix('NVIDIA ')
  known = run.job.dtype == 'bfloat16' and device in PEAK_TFLOPS
  return 1e12 * PEAK_TFLOPS[device] if known else None


def _most(run: Run, name: str, memory: str) -> float:
  return max(answer[memory] for answer in run.rounds[name])


def _row(run: Run, experiment: str, recipe: str, environment, metrics) -> Record:
  config = dataclasses.asdict(run.job) | {'rounds': ROUNDS.value, 'peak_tflops': PEAK.value}
  if run.job.model:
    config |= {'model': pathlib.Path(run.job.model).name, 'preset': None}
  return Record(
    experiment=experiment,
    recipe=recipe,
    command=common.command(),
    config=config,
    environment=environment,
    seed=run.job.seed,
    metrics=metrics,
    notes=_notes(run, metrics),
  )


def _notes(run: Run, metrics) -> list[str]:
  held = 'float32 values, gradients and moments of what is trained'
  if run.job.method != 'full':
    held += f'; what is frozen is {run.job.param_dtype} or codes'
  notes = [f'{held}; products in {run.job.dtype}']
  if metrics['last_loss'].value >= metrics['first_loss'].value:
    notes.append('the loss did not fall')
  if run.peer and 'unavailable' in run.peer:
    notes.append(f'no {PEER}: {run.peer["unavailable"]}')
  for mode, reason in (run.peer or {}).get('missing', {}).items():
    notes.append(f'no {PEER} {mode}: {reason}')
  return notes


def _words(record: Record) -> str:
  metrics = record.metrics
  speed = metrics['tokens_per_s']
  line = (
    f'{record.recipe}, {record.config["dtype"]}: {speed.value:,.0f} '
    f'± {(speed.spread or 0) / 2:,.0f} tokens/s, {metrics["update_time"].value:.3f} s an update, '
    f'loss {metrics["first_loss"].value:.3f} to {metrics["last_loss"].value:.3f}'
  )
  if 'model_flops_utilization' in metrics:
    line += f', {metrics["model_flops_utilization"].value:.1%} of the peak'
  parts = [line]
  if 'compile_time' in metrics:
    parts.append(f'compiled in {metrics["compile_time"].value:.1f} s')
  sizes = [
    f'{name.removesuffix("_bytes").replace("_", " ")} {metric.value / 1e6:,.1f} MB'
    for name, metric in metrics.items()
    if name.endswith('_bytes')
  ]
  ratios = [
    f'{name}: {m.value:.2f}' + ('' if m.spread is None else f' ± {m.spread / 2:.2f}')
    for name, m in metrics.items()
    if ' / ' in name
  ]
  return '\n  '.join([*parts, ', '.join(sizes), *ratios, *record.notes])


if __name__ == '__main__':
  common.run(main)
