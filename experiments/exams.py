"""Accuracies beside perplexities: the small tasks that the main job runs on every recipe.

A task gives `accuracy:NAME` with its standard error, `accuracy_se:NAME`. A recipe also has the
difference to the base, `accuracy_change:NAME` and `accuracy_change_se:NAME`: both models answer the
same documents, so the error of the difference is that over pairs, and mostly the smaller one.
"""

from collections.abc import Sequence
from typing import Any

from experiments import common
from model.eval import library_tasks, tasks
from model.eval.records import Metric
from model.eval.tasks import Exam, Grade
from model.tokenizer import Tokenizer
from model.transformer import Transformer


def check_names(names: Sequence[str]) -> None:
  """Raises ValueError if there is no such task, or one is named twice."""
  unknown = [name for name in names if name not in library_tasks.TASKS]
  if unknown or len(set(names)) < len(names):
    wrong = unknown[0] if unknown else max(names, key=names.count)
    problem = 'is no task' if unknown else 'is named twice'
    raise ValueError(f'--tasks: {wrong!r} {problem}; there are {", ".join(library_tasks.TASKS)}')


def load(names: Sequence[str], tokenizer: Tokenizer, most: int | None = None) -> tuple[Exam, ...]:
  """The tasks in tokens, or their first documents."""
  return tuple(tasks.exam(library_tasks.load(name, most), tokenizer) for name in names)


def about(exams: Sequence[Exam]) -> dict[str, Any]:
  """What the records say of the tasks."""
  return {
    one.task.name: {
      'fingerprint': one.task.fingerprint,
      'documents': len(one.task.documents),
      'chance': one.task.chance,
    }
    for one in exams
  }


def grade(model: Transformer, exams: Sequence[Exam], name: str) -> tuple[Grade, ...]:
  """What a model, prepared for this device, gets right of each."""
  if not exams:
    return ()
  return tuple(tasks.grade(model, exams, progress=common.labelled(f'{name}: tasks')))


def metrics(
  exams: Sequence[Exam], grades: Sequence[Grade], base: Sequence[Grade] | None = None
) -> dict[str, Metric]:
  """The accuracies, and their differences to those of a base."""
  found = {}
  for i, (one, own) in enumerate(zip(exams, grades, strict=True)):
    name, n = one.task.name, len(own.right)
    found[f'{tasks.ACCURACY}:{name}'] = Metric(own.accuracy, '1', n)
    found[f'{tasks.ACCURACY}_se:{name}'] = Metric(own.standard_error, '1', n)
    if base is not None:
      change, error = own.change(base[i])
      found[f'{tasks.ACCURACY}_change:{name}'] = Metric(change, '1', n)
      found[f'{tasks.ACCURACY}_change_se:{name}'] = Metric(error, '1', n)
  return found
