"""Three small tasks made from the standard library of the running Python, without a download.

  python_words      the last word of a paragraph of a docstring (cloze)
  python_summaries  which of four first lines of docstrings belongs to a function
  python_lines      which of four lines is the next one of a function

The files are those of the held-out part of `python-source` (`model.corpus`), without tests: nothing
that learns or is calibrated on that text has seen them. They are not held out of `python-docs`, and
a model from elsewhere has most likely read the standard library, so accuracies compare models with
each other and mean little alone. False choices come from the same file. No file gives more than a
few documents; which ones follows from hashes, so one version of Python always gives the same.
"""

import ast
import functools
import hashlib
import re
from collections.abc import Callable, Iterator

from model import corpus, library
from model.eval.tasks import Document, Task

MOST = 150  # documents of a task
MOST_OF_A_FILE = 16
CHOICES = 4
WORDS = range(8, 61)  # of a paragraph
SUMMARY = range(15, 101)  # characters
LINE = range(12, 81)
CONTEXT = range(3, 13)  # lines
PARAGRAPH = re.compile(r"[A-Z][\w ,;:'()/.-]* [a-z]{4,}\.")
TESTS = frozenset({'test', 'tests'})
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def words() -> Task:
  """Makes `python_words`."""
  return _task('python_words', 'the last word of a paragraph of documentation', _words)


def summaries() -> Task:
  """Makes `python_summaries`."""
  return _task('python_summaries', 'which summary is that of a function', _summaries)


def lines() -> Task:
  """Makes `python_lines`."""
  return _task('python_lines', 'which line of code comes next', _lines)


TASKS = {'python_words': words, 'python_summaries': summaries, 'python_lines': lines}


def load(name: str, most: int | None = None) -> Task:
  """The task of that name, or its first documents. Raises ValueError if there is none."""
  if name not in TASKS:
    raise ValueError(f'there is no task {name!r}; there are {", ".join(TASKS)}')
  task = TASKS[name]()
  return Task(name=name, description=task.description, documents=task.documents[:most])


Documents = Callable[[str, ast.Module], Iterator[Document]]


def _task(name: str, description: str, documents: Documents) -> Task:
  found = {}
  for text, tree in _files():
    own = sorted(set(documents(text, tree)), key=_rank)[:MOST_OF_A_FILE]
    found |= {document.context: document for document in own}
  chosen = sorted(found.values(), key=_rank)[:MOST]
  return Task(name=name, description=description, documents=tuple(chosen))


@functools.cache
def _files() -> tuple[tuple[str, ast.Module], ...]:
  held_out = set(corpus.standard_library().held_out)
  texts = [
    text for file, text in library.modules() if text in held_out and TESTS.isdisjoint(file.parts)
  ]
  trees = map(library.parsed, texts)
  return tuple((text, tree) for text, tree in zip(texts, trees) if tree is not None)


def _words(text: str, tree: ast.Module) -> Iterator[Document]:
  nodes = (node for node in ast.walk(tree) if isinstance(node, library.DOCUMENTED))
  for docstring in filter(None, map(ast.get_docstring, nodes)):
    for paragraph in docstring.split('\n\n'):
      one = ' '.join(paragraph.split())
      if len(one.split()) in WORDS and PARAGRAPH.fullmatch(one):
        context, _, word = one.removesuffix('.').rpartition(' ')
        yield Document(context=context, choices=(f' {word}',))


def _summaries(text: str, tree: ast.Module) -> Iterator[Document]:
  found = {}
  for node in ast.walk(tree):
    summary = isinstance(node, FUNCTIONS) and (ast.get_docstring(node) or '').partition('\n')[0]
    if summary and summary.endswith('.') and len(summary) in SUMMARY:
      found[f'def {node.name}({ast.unparse(node.args)}):\n    """'] = summary
  for context, summary in found.items():
    yield from _choice(context, summary, set(found.values()) - {summary})


def _lines(text: str, tree: ast.Module) -> Iterator[Document]:
  source = text.split('\n')
  functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
  own = {node: list(_statements(node, source)) for node in functions}
  every = {source[row].strip() for rows in own.values() for row in rows}
  for node, rows in own.items():
    first, last = node.lineno - 1, node.end_lineno
    rows = [row for row in rows if row - first in CONTEXT]
    if rows:
      row = min(rows, key=lambda row: _hash(source[row]))
      before = '\n'.join(line[node.col_offset :] for line in source[first:row]).rstrip()
      indent = '\n' + source[row][node.col_offset :].partition(source[row].strip())[0]
      others = every - {line.strip() for line in source[first:last]}
      yield from _choice(before, source[row].strip(), others, indent)


def _statements(node: ast.AST, source: list[str]) -> Iterator[int]:
  """The rows of simple statements that have a line to themselves."""
  for one in ast.walk(node):
    if not isinstance(one, ast.stmt) or hasattr(one, 'body') or one.lineno != one.end_lineno:
      continue
    row = one.lineno - 1
    docstring = isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
    first = not source[row][: one.col_offset].strip()
    if first and not docstring and len(source[row].strip()) in LINE:
      yield row


def _choice(context: str, right: str, others: set[str], before: str = '') -> Iterator[Document]:
  """A document whose false choices are some of the others, if there are enough of them."""
  false = sorted(others, key=lambda one: _hash(context, right, one))[: CHOICES - 1]
  if len(false) == CHOICES - 1:
    answer = int(_hash(context, right)[:8], 16) % CHOICES
    choices = [f'{before}{one}' for one in (*false[:answer], right, *false[answer:])]
    yield Document(context=context, choices=tuple(choices), answer=answer)


def _rank(document: Document) -> str:
  return _hash(document.context, *document.choices)


def _hash(*texts: str) -> str:
  return hashlib.sha256('\0'.join(texts).encode()).hexdigest()
