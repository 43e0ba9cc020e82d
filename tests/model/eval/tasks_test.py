"""Tasks: what counts as right, its error, the documents made from the standard library, files."""

import json
import math

import numpy as np
import pytest
import yaml

from model import corpus
from model.eval import library_tasks, likelihood, task_files, tasks
from model.eval.likelihood import Score
from model.eval.tasks import Document, Grade, Task
from model.tokenizer import Tokenizer

CLOZE = Task(
  name='cloze',
  description='',
  documents=tuple(Document(context=c, choices=(' dog',)) for c in ('the', 'a', 'one')),
)
CHOICE = Task(
  name='choice',
  description='',
  documents=(
    Document(context='the', choices=(' dog', ' elephants'), answer=1),
    Document(context='a', choices=(' dog', ' cat'), answer=0),
  ),
)


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer.train_bpe(['the dog, a cat, one elephant'] * 3, 270)


def test_what_is_right(tokenizer, monkeypatch):
  """A cloze needs the likeliest tokens; a choice the highest log-probability per character."""
  scores = [Score(-9.0, True), Score(-1.0, False), Score(-1.0, True)]
  scores += [Score(-5.0, True), Score(-9.0, False), Score(-2.0, False), Score(-1.0, False)]
  asked = []

  def score(model, requests, **options):
    asked.extend(requests)
    return scores

  monkeypatch.setattr(likelihood, 'score', score)
  cloze, choice = tasks.grade(None, [tasks.exam(t, tokenizer) for t in (CLOZE, CHOICE)])
  assert cloze.right == (True, False, True)
  assert choice.right == (True, False)  # -9 / 10 before -5 / 4, -1 / 4 before -2 / 4
  words = [tokenizer.decode([*one.context, *one.continuation]) for one in asked]
  assert words[:3] == ['the dog', 'a dog', 'one dog'] and words[3:5] == ['the dog', 'the elephants']


def test_errors_are_those_of_means(rng):
  right = tuple(bool(x) for x in rng.random(50) < 0.7)
  other = tuple(bool(x) for x in rng.random(50) < 0.6)
  grade, p = Grade(right=right), np.mean(right)
  assert grade.accuracy == p
  assert grade.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 49))
  change, error = grade.change(Grade(right=other))
  differences = [a - b for a, b in zip(map(int, right), map(int, other))]
  assert change == pytest.approx(p - np.mean(other))
  assert error == pytest.approx(np.std(differences, ddof=1) / math.sqrt(50))
  assert math.isnan(Grade(right=(True,)).standard_error)
  with pytest.raises(ValueError, match='50 documents cannot be compared with 1'):
    grade.change(Grade(right=(True,)))


def test_bad_tasks_are_refused():
  with pytest.raises(ValueError, match='of 1 choices, number 1 cannot be right'):
    Document(context='a', choices=('b',), answer=1)
  with pytest.raises(ValueError, match='none: the documents of a task'):
    Task(name='none', description='', documents=())
  with pytest.raises(ValueError, match='mixed: the documents of a task have equally many'):
    Task(name='mixed', description='', documents=CLOZE.documents[:1] + CHOICE.documents[:1])
  with pytest.raises(ValueError, match="there is no task 'python'; there are python_words"):
    library_tasks.load('python')


def test_tasks_of_the_standard_library_are_held_out_and_always_the_same():
  held_out = [' '.join(text.split()) for text in corpus.standard_library().held_out]
  made = [library_tasks.load(name) for name in library_tasks.TASKS]
  assert [one.chance for one in made] == [0.0, 0.25, 0.25]
  for task in made:
    assert 50 <= len(task.documents) <= library_tasks.MOST
    assert len({one.context for one in task.documents}) == len(task.documents)
    assert task.fingerprint == library_tasks.TASKS[task.name]().fingerprint
    few = library_tasks.load(task.name, 7)
    assert few.documents == task.documents[:7] and few.fingerprint != task.fingerprint
    for document in task.documents:
      assert len(set(document.choices)) == len(document.choices)
      right = document.choices[document.answer]
      files = [text for text in held_out if ' '.join(right.split()) in text]
      assert files
      # The false ones are of the same file.
      assert any(all(' '.join(c.split()) in text for c in document.choices) for text in files)
  words, summaries, lines = made
  assert all(one.choices[0][0] == ' ' and one.choices[0][1:].isalpha() for one in words.documents)
  assert all(one.context.endswith('):\n    """') for one in summaries.documents)
  for one in lines.documents:
    assert one.context == one.context.rstrip() and one.context.lstrip().startswith(('def', 'async'))
    followed = ' '.join((one.context + one.choices[one.answer]).split())
    assert any(followed in text for text in held_out)
  for task in (summaries, lines):
    places = np.bincount([one.answer for one in task.documents], minlength=4)
    assert places.min() > len(task.documents) / 10  # no place is the right one mostly


def test_task_files_have_all_that_the_harness_needs(tmp_path):
  paths = task_files.write([CLOZE, CHOICE], tmp_path / 'tasks')
  cloze, choice = (yaml.safe_load(path.read_text()) for path in paths)
  documents = tmp_path / 'tasks' / 'choice.jsonl'
  assert choice['dataset_path'] == 'json' and choice['output_type'] == 'multiple_choice'
  assert choice['dataset_kwargs'] == {'data_files': {'test': str(documents.resolve())}}
  fields = [choice['doc_to_text'], choice['doc_to_choice'], choice['doc_to_target']]
  rows = [json.loads(line) for line in documents.read_text().splitlines()]
  assert [[row[field] for field in fields] for row in rows] == [
    [one.context, list(one.choices), one.answer] for one in CHOICE.documents
  ]
  assert cloze['output_type'] == 'loglikelihood' and cloze['metadata']['fingerprint']
  assert cloze['metadata']['fingerprint'] == CLOZE.fingerprint != choice['metadata']['fingerprint']
