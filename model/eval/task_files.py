"""Tasks as files of `lm-evaluation-harness`: a YAML file and a file of JSON lines for each.

The harness reads them from a folder of its users (`--include_path`, or `--task_folder` of
`experiments.harness`), without a network. It needs the place of the documents as an absolute path,
so a folder that is moved has to be written anew.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import yaml

from model.eval.tasks import Document, Task

VERSION = 1  # of the form of the documents


def write(tasks: Iterable[Task], folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes `NAME.yaml` and `NAME.jsonl` of each task, and returns the paths of the YAML files."""
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  for task in tasks:
    documents, path = folder / f'{task.name}.jsonl', folder / f'{task.name}.yaml'
    lines = [json.dumps(_fields(task, one), ensure_ascii=False) for one in task.documents]
    documents.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    path.write_text(yaml.safe_dump(_config(task, documents.resolve()), sort_keys=False), 'utf-8')
    paths.append(path)
  return paths


def _fields(task: Task, one: Document) -> dict[str, Any]:
  if task.is_cloze:
    return {'context': one.context, 'target': one.choices[0]}
  return {'context': one.context, 'choices': list(one.choices), 'answer': one.answer}


def _config(task: Task, documents: pathlib.Path) -> dict[str, Any]:
  """Names of fields stand for their contents, which no template touches."""
  kind = (
    {'output_type': 'loglikelihood', 'doc_to_target': 'target'}
    if task.is_cloze
    else {
      'output_type': 'multiple_choice',
      'doc_to_target': 'answer',
      'doc_to_choice': 'choices',
    }
  )
  metrics = ['acc'] if task.is_cloze else ['acc', 'acc_norm']
  return {
    'task': task.name,
    'dataset_path': 'json',
    'dataset_kwargs': {'data_files': {'test': str(documents)}},
    'test_split': 'test',
    'doc_to_text': 'context',
    **kind,
    'target_delimiter': '',
    'metric_list': [
      {'metric': one, 'aggregation': 'mean', 'higher_is_better': True} for one in metrics
    ],
    'metadata': {'version': VERSION, 'fingerprint': task.fingerprint},
  }
