r"""Our class for lm-evaluation-harness beside its own one for transformers, on one checkpoint.

  python -m experiments.compare_lm_eval --model=DIR --output=out/lm_eval.jsonl

The checkpoint is written as a folder in float32. Both classes give log-likelihoods and greedy flags
of the choices of the tasks in `model/eval/library_tasks.py`, --documents of each, in interleaved
rounds. `hf` in float64 is the judge of both. Needs the extras `harness` and `test` (torch).

Metrics of each task, over its requests: the largest difference of a log-likelihood between ours and
`hf`'s, and of each from float64; the share of equal greedy flags; the wall time of both, of the
first round, in which XLA compiles, and the median of the later ones, with the ratio hf / ours.

Device: CPU. Minutes: 7 for a model of 135 M parameters and two cores.
Expected: differences below 1e-4 for a few tokens, and below 1e-3 for sums of 30 tokens, where ours
are nearer to float64. `hf` compares requests only with `logits_cache=False`: in 0.4.13 its cache
returns a wrong value where two requests split the same tokens in two ways.
"""

import dataclasses
import importlib.metadata
import pathlib
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from absl import flags

from experiments import common
from model import hf
from model.eval import library_tasks, records
from model.eval.records import Metric, Record

MODEL = flags.DEFINE_string('model', None, 'Folder, hub id or .gguf file.')
TASKS = flags.DEFINE_list('tasks', list(library_tasks.TASKS), 'Names of tasks of the library.')
DOCUMENTS = flags.DEFINE_integer('documents', 10, 'Documents of each task.', lower_bound=1)
BATCH = flags.DEFINE_integer('batch', 8, "Requests of a batch of `hf`'s.", lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 3, 'Interleaved rounds, the first included.', lower_bound=2)
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')

OURS, THEIRS, EXACT = 'lissom', 'hf', 'hf in float64'


@dataclasses.dataclass
class Answers:
  """What a class answers to the requests of a task, and the seconds of each round."""

  log_probs: np.ndarray
  greedy: np.ndarray
  seconds: list[float]


def main() -> None:
  if MODEL.value is None:
    raise ValueError('compare_lm_eval needs --model')
  tasks = [library_tasks.load(name, DOCUMENTS.value) for name in TASKS.value]
  common.need_extra('harness')
  model, tokenizer = common.load_model(MODEL.value)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'model'
    hf.save_pretrained(model, tokenizer, path)
    classes = _classes(path)
    for task in tasks:
      pairs = [(d.context, choice) for d in task.documents for choice in d.choices]
      record = _record(task, len(pairs), _answers(classes, pairs))
      print(_words(record), flush=True)
      if OUTPUT.value:
        records.append(OUTPUT.value, record)


def _classes(path: pathlib.Path) -> dict[str, object]:
  from lm_eval.models.huggingface import HFLM

  from experiments import harness_adapter

  options = {'device': 'cpu', 'batch_size': BATCH.value, 'logits_cache': False}
  theirs = lambda dtype: HFLM(pretrained=str(path), dtype=dtype, **options)
  ours = harness_adapter.LissomLM(*common.load_model(str(path)), name=MODEL.value)
  return {OURS: ours, THEIRS: theirs('float32'), EXACT: theirs('float64')}


def _answers(classes, pairs: Sequence[tuple[str, str]]) -> dict[str, Answers]:
  """The answers of each class; those of float64 once, and outside of the rounds."""
  from lm_eval.api.instance import Instance

  requests = [Instance('loglikelihood', {}, pair, i) for i, pair in enumerate(pairs)]
  found: dict[str, Answers] = {}
  for names in [(EXACT,), *((OURS, THEIRS),) * ROUNDS.value]:
    for name in names:
      start = time.perf_counter()
      answers = classes[name].loglikelihood(requests)
      seconds = time.perf_counter() - start
      log_probs, greedy = map(np.array, zip(*answers, strict=True))
      found.setdefault(name, Answers(log_probs, greedy, [])).seconds.append(seconds)
  return found


def _record(task, requests: int, found: dict[str, Answers]) -> Record:
  ours, theirs, exact = (found[name] for name in (OURS, THEIRS, EXACT))
  furthest = lambda a, b: Metric(float(np.abs(a.log_probs - b.log_probs).max()), 'nat', requests)
  later = lambda one: float(np.median(one.seconds[1:]))
  return Record(
    experiment='compare_lm_eval',
    recipe=task.name,
    command=common.command(),
    config={
      'model': MODEL.value,
      'documents': len(task.documents),
      'task_fingerprint': task.fingerprint,
      'batch': BATCH.value,
      **{name: importlib.metadata.version(name) for name in ('lm_eval', 'transformers', 'torch')},
    },
    environment=records.environment(),
    seed=0,
    metrics={
      'ours - hf': furthest(ours, theirs),
      'ours - float64': furthest(ours, exact),
      'hf - float64': furthest(theirs, exact),
      'greedy_equal': Metric(float(np.mean(ours.greedy == theirs.greedy)), '1', requests),
      'first_time': Metric(ours.seconds[0], 's', 1),
      'hf_first_time': Metric(theirs.seconds[0], 's', 1),
      'time': Metric(later(ours), 's', ROUNDS.value - 1),
      'hf_time': Metric(later(theirs), 's', ROUNDS.value - 1),
      'hf_time / time': Metric(later(theirs) / later(ours), '1', ROUNDS.value - 1),
    },
  )


def _words(record: Record) -> str:
  m = {name: metric.value for name, metric in record.metrics.items()}
  return (
    f'{record.recipe}: largest difference {m["ours - hf"]:.1e} (from float64 '
    f'{m["ours - float64"]:.1e}, hf {m["hf - float64"]:.1e}), equal greedy flags '
    f'{m["greedy_equal"]:.3f}, {m["first_time"]:.1f} s with compiling and {m["time"]:.1f} s, '
    f'hf {m["hf_first_time"]:.1f} and {m["hf_time"]:.1f} s'
  )


if __name__ == '__main__':
  common.run(main)
