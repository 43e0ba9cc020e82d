"""Texts that every Python installation brings along: its source code and its English documentation.

They let a model be compressed and measured without a download. `source` is about 28 MB of Python,
`documentation` about 1.3 MB of technical English: the language reference that `help()` shows, and
the long docstrings of the standard library.
"""

import ast
import collections
import pathlib
import sysconfig
import warnings
from collections.abc import Iterator
from pydoc_data import topics

# Installed packages, frozen copies of old grammars and fixtures that are not real modules.
SKIPPED_FOLDERS = frozenset({'site-packages', 'dist-packages', 'lib2to3', 'idle_test'})
TESTS = 'test'
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = ('body', 'handlers', 'orelse', 'finalbody', 'cases')  # where definitions can stand
SHORTEST_DOCSTRING = 400  # characters; shorter docstrings are lists of parameters rather than prose


def source() -> list[str]:
  """The `.py` files of the running Python's standard library, its tests included.

  Some distributions ship Python without its tests, which leaves about 700 files and 12 MB.
  """
  return [text for _, text in modules()]


def documentation() -> list[str]:
  """The topics of the language reference, and the long docstrings of the standard library.

  The docstrings of one module are one document. Tests of the standard library are left out.
  """
  documents = [topics.topics[name] for name in sorted(topics.topics)]
  for file, text in modules():
    docstrings = [] if TESTS in file.parts else _docstrings(text)
    if docstrings:
      documents.append('\n\n\n'.join(docstrings) + '\n')
  return documents


def modules() -> Iterator[tuple[pathlib.Path, str]]:
  """Yields the text of each file of `source`, and its path within the standard library."""
  folder = pathlib.Path(sysconfig.get_path('stdlib'))
  for file in sorted(folder.rglob('*.py')):
    relative = file.relative_to(folder)
    if SKIPPED_FOLDERS.isdisjoint(relative.parts) and file.is_file():
      try:
        yield relative, file.read_bytes().decode()
      except UnicodeDecodeError:
        continue  # test data about other encodings


def parsed(text: str) -> ast.Module | None:
  """The syntax tree of a source file; None if it is broken, as test data may be."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # old escape sequences in strings
      return ast.parse(text)
  except (SyntaxError, ValueError):
    return None


def _docstrings(text: str) -> list[str]:
  tree = parsed(text)
  nodes = () if tree is None else _statements(tree)
  found = (ast.get_docstring(node) for node in nodes if isinstance(node, DOCUMENTED))
  return [docstring for docstring in found if docstring and len(docstring) >= SHORTEST_DOCSTRING]


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
  """The nodes of `ast.walk` in its order, without expressions, which are most of them."""
  nodes = collections.deque([tree])
  while nodes:
    node = nodes.popleft()
    yield node
    for block in BLOCKS:
      nodes.extend(getattr(node, block, ()))
