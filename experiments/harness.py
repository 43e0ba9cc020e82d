r"""Measures a model by tasks of `lm-evaluation-harness`, from local files or its own collection.

  python -m experiments.harness --write_tasks=DIR
  python -m experiments.harness --model=DIR --tasks=python_words,python_lines --output=FILE
  python -m experiments.harness --model=DIR --task_folder=TASKS --tasks=mine --output=FILE

--write_tasks writes the tasks of `model/eval/library_tasks.py`, which need no download, as files of
the harness, so that any model of it runs the same documents. --task_folder is a folder of such
files, or of your own: a YAML file with `dataset_path: json`, and `data_files` that names files of
JSON lines, needs no network. Without one, the tasks of --tasks that are of `library_tasks` are
written to a temporary folder, and if there are others, all are looked up in the harness' collection
too, whose documents come from a hub.

The numbers are those of the harness, which asks and counts; the answers are ours
(experiments/harness_adapter.py). Texts are batched, and beginnings that they share are read once.
FILE gets a JSON line for each task, with the hash of its documents and prompts. Needs the extra
`harness`; the main job's --tasks does not.

Device: any. Minutes: a few for a model of 135 M parameters and the three tasks on two CPU cores.
"""

import hashlib
import importlib.metadata
import math
import pathlib
import tempfile

from absl import flags

from experiments import common
from model import fingerprint, sharding
from model.eval import library_tasks, likelihood, records, task_files
from model.eval.records import Metric, Record

BOOTSTRAP = 1000  # draws for the errors of metrics that are no means

MODEL = flags.DEFINE_string('model', None, 'Folder, hub id or .gguf file to measure.')
TASKS = flags.DEFINE_list('tasks', [], 'Names of tasks, separated by commas.')
TASK_FOLDER = flags.DEFINE_string('task_folder', None, 'Folder of task files of the harness.')
OUTPUT = flags.DEFINE_string('output', None, 'File to which a record of each task is appended.')
WRITE_TASKS = flags.DEFINE_string(
  'write_tasks', None, f'Folder to write {", ".join(library_tasks.TASKS)} to, as task files.'
)
NUM_FEWSHOT = flags.DEFINE_integer(
  'num_fewshot', None, 'Examples before each document. Default: as the task says.', lower_bound=0
)
LIMIT = flags.DEFINE_integer('limit', None, 'Only the first so many documents.', lower_bound=1)
CHAT = flags.DEFINE_bool('chat', False, "Put the prompts into the model's chat template.")
MAX_LENGTH = flags.DEFINE_integer(
  'max_length', None, 'Tokens that the model reads at most. Default: its positions.', lower_bound=2
)
BATCH_TOKENS = flags.DEFINE_integer(
  'batch_tokens', likelihood.TOKENS, 'Tokens that are read at once.', lower_bound=1
)
SLOTS = flags.DEFINE_integer('slots', 8, 'Continuations that are made at once.', lower_bound=1)
WIDENED = flags.DEFINE_bool(
  'widened', False, 'Multiply by weights widened to floating point, not by the fast products.'
)
SEED = flags.DEFINE_integer('seed', 0, 'Seed of examples and of draws.')
DTYPE = common.define_dtype()
MESH = common.define_mesh()
PLUGINS = common.define_plugins()


def main() -> None:
  common.load_plugins(PLUGINS.value)
  if WRITE_TASKS.value is not None:
    every = map(library_tasks.load, library_tasks.TASKS)
    paths = task_files.write(every, pathlib.Path(WRITE_TASKS.value).expanduser())
    print('\n'.join(map(str, paths)))
    if not TASKS.value:
      return
  if MODEL.value is None or not TASKS.value or OUTPUT.value is None:
    raise ValueError('harness needs --model, --tasks and --output, or --write_tasks')
  common.need_extra('harness')
  output = pathlib.Path(OUTPUT.value).expanduser()
  with tempfile.TemporaryDirectory() as scratch:
    results, model = _evaluate(_folders(pathlib.Path(scratch)))
  for record in _records(results, fingerprint.of_model(model)):
    records.append(output, record)
    print(_words(record))


def _folders(scratch: pathlib.Path) -> list[str]:
  """Where task files are; ours are written where no folder has them."""
  if TASK_FOLDER.value is not None:
    folder = pathlib.Path(TASK_FOLDER.value).expanduser()
    if not any(folder.rglob('*.yaml')):
      raise ValueError(f'--task_folder: there is no task file (.yaml) in {folder}')
    return [str(folder)]
  own = [name for name in TASKS.value if name in library_tasks.TASKS]
  task_files.write(map(library_tasks.load, own), scratch)
  return [str(scratch)]


def _evaluate(folders: list[str]):
  import lm_eval
  from lm_eval.tasks import TaskManager

  from experiments import harness_adapter

  # Its own collection takes long to look through, and its documents a network.
  manager = TaskManager(include_path=folders, include_defaults=False)
  if TASK_FOLDER.value is None and set(TASKS.value) - set(manager.all_tasks):
    manager = TaskManager(include_path=folders)
  unknown = set(TASKS.value) - set(manager.all_tasks)
  if unknown:
    raise ValueError(f'--tasks: there is no {min(unknown)!r} in {", ".join(folders)}')
  model, tokenizer = common.load_model(MODEL.value, common.dtype(DTYPE))
  sharding.shard(model, common.mesh(MESH))
  settings = harness_adapter.Settings(
    max_length=MAX_LENGTH.value,
    tokens=BATCH_TOKENS.value,
    slots=SLOTS.value,
    seed=SEED.value,
    widened=WIDENED.value,
  )
  results = lm_eval.simple_evaluate(
    model=harness_adapter.LissomLM(model, tokenizer, settings, name=MODEL.value),
    tasks=TASKS.value,
    num_fewshot=NUM_FEWSHOT.value,
    limit=LIMIT.value,
    apply_chat_template=CHAT.value,
    task_manager=manager,
    random_seed=SEED.value,
    fewshot_random_seed=SEED.value,
    bootstrap_iters=BOOTSTRAP,
  )
  return results, model


def _records(results, model_fingerprint: str) -> list[Record]:
  environment = records.environment()
  environment['versions']['lm_eval'] = importlib.metadata.version('lm_eval')
  return [
    Record(
      experiment='harness',
      recipe=name,
      command=common.command(),
      config={
        'model': MODEL.value,
        'model_fingerprint': model_fingerprint,
        'task': name,
        'task_version': str(results['versions'].get(name)),
        'task_fingerprint': _fingerprint(samples),
        'num_fewshot': results['n-shot'].get(name),
        'limit': LIMIT.value,
        'chat': CHAT.value,
        'max_length': MAX_LENGTH.value,
        'dtype': DTYPE.value,
        'widened': WIDENED.value,
      },
      environment=environment,
      seed=SEED.value,
      metrics=_metrics(results['results'][name], len({one['doc_id'] for one in samples})),
    )
    for name, samples in results['samples'].items()
  ]


def _fingerprint(samples) -> str:
  """SHA-256 over the documents, prompts and targets, by the harness' hashes."""
  hashes = [one['doc_hash'] + one['prompt_hash'] + one['target_hash'] for one in samples]
  return hashlib.sha256(''.join(sorted(set(hashes))).encode()).hexdigest()


def _metrics(result, documents: int) -> dict[str, Metric]:
  """Those of a task; the harness names them 'acc,none' and 'acc_stderr,none', by their filter."""
  found = {}
  for key, value in result.items():
    name, _, kept = key.partition(',')
    if kept and isinstance(value, int | float):
      name = name.replace('_stderr', '_se')
      found[name if kept == 'none' else f'{name}:{kept}'] = Metric(value, '1', documents)
  return found


def _words(record: Record) -> str:
  lines = []
  for name, metric in record.metrics.items():
    error = record.value(f'{name}_se')
    if not name.endswith('_se'):
      spread = '' if error is None or not math.isfinite(error) else f' ± {error:.4f}'
      lines.append(f'{record.recipe:24} {name:16} {metric.value:.4f}{spread}  n = {metric.n}')
  return '\n'.join(lines)


if __name__ == '__main__':
  common.run(main)
