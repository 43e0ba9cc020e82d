"""Tasks: documents that a model continues, and the share of them that it gets right.

  cloze     a document has one continuation; it is right if each of its tokens is the likeliest
  choice    a document has several; the one with the highest log-probability per character is taken

These are the rules of `lm-evaluation-harness` (its metrics `acc` of a log-likelihood and `acc_norm`
of a multiple choice), and texts become tokens as they do there (`model.eval.pairs`). The standard
error is that of a mean over documents; of a change, that of a mean over pairs.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from model.eval import likelihood, pairs
from model.eval.likelihood import Request
from model.tokenizer import Tokenizer
from model.transformer import Transformer

ACCURACY = 'accuracy'  # of records; that of a task is 'accuracy:NAME', its error 'accuracy_se:NAME'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """A context, what may follow it, and the number of what does."""

  context: str
  choices: tuple[str, ...]
  answer: int = 0

  def __post_init__(self):
    if not 0 <= self.answer < len(self.choices):
      raise ValueError(f'of {len(self.choices)} choices, number {self.answer} cannot be right')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """Documents with equally many choices each; with one, it is a cloze."""

  name: str
  description: str
  documents: tuple[Document, ...]

  def __post_init__(self):
    if len({len(one.choices) for one in self.documents}) != 1:
      raise ValueError(f'{self.name}: the documents of a task have equally many choices, and exist')

  @property
  def is_cloze(self) -> bool:
    return len(self.documents[0].choices) == 1

  @property
  def chance(self) -> float:
    """The accuracy of guessing: about 0 where any word may follow."""
    return 0.0 if self.is_cloze else 1 / len(self.documents[0].choices)

  @property
  def fingerprint(self) -> str:
    """SHA-256 over the documents."""
    plain = [dataclasses.asdict(one) for one in self.documents]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exam:
  """A task in tokens: the requests of its documents, one after another."""

  task: Task
  requests: tuple[Request, ...] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grade:
  """Which documents were right."""

  right: tuple[bool, ...]

  @property
  def accuracy(self) -> float:
    return sum(self.right) / len(self.right)

  @property
  def standard_error(self) -> float:
    """NaN of one document."""
    return _standard_error(np.asarray(self.right, np.float64))

  def change(self, other: 'Grade') -> tuple[float, float]:
    """The accuracy less that of another model on the same documents, and its standard error.

    Raises ValueError if there were not equally many.
    """
    if len(self.right) != len(other.right):
      raise ValueError(
        f'{len(self.right)} documents cannot be compared with {len(other.right)}; take one task'
      )
    difference = np.subtract(self.right, other.right, dtype=np.float64)
    return float(difference.mean()), _standard_error(difference)


def exam(task: Task, tokenizer: Tokenizer) -> Exam:
  """Puts a task into tokens. Raises ValueError if a choice adds no token to its context."""
  requests = [
    pairs.request(tokenizer, one.context, choice)
    for one in task.documents
    for choice in one.choices
  ]
  return Exam(task=task, requests=tuple(requests))


def grade(
  model: Transformer,
  exams: Sequence[Exam],
  *,
  max_length: int | None = None,
  progress: Callable[[list], Iterator] = iter,
) -> list[Grade]:
  """Grades a model; all exams are read at once. Raises ValueError as `likelihood.score` does."""
  requests = [request for one in exams for request in one.requests]
  scores = iter(likelihood.score(model, requests, max_length=max_length, progress=progress))
  grades = []
  for one in exams:
    own = [[next(scores) for _ in document.choices] for document in one.task.documents]
    judge = _said if one.task.is_cloze else _chosen
    grades.append(Grade(right=tuple(map(judge, one.task.documents, own))))
  return grades


def _said(document: Document, scores: list[likelihood.Score]) -> bool:
  return scores[0].greedy


def _chosen(document: Document, scores: list[likelihood.Score]) -> bool:
  each = [one.log_prob / len(choice) for one, choice in zip(scores, document.choices, strict=True)]
  return int(np.argmax(each)) == document.answer


def _standard_error(values: np.ndarray) -> float:
  return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
