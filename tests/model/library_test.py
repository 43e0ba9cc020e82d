"""The texts of the Python installation, compared with what Python itself says of its modules."""

import inspect
import json
import pathlib
import sysconfig
from pydoc_data import topics

import pytest

from model import library


@pytest.fixture(scope='module')
def documents():
  return library.documentation()


def test_source_holds_the_files_of_the_standard_library():
  texts = set(library.source())
  folder = pathlib.Path(sysconfig.get_path('stdlib'))
  for name in ('abc.py', 'json/decoder.py', 'xml/dom/minidom.py'):
    assert (folder / name).read_text(encoding='utf-8') in texts
  assert len(texts) > 500


def test_documentation_holds_every_topic_of_the_language_reference(documents):
  assert set(topics.topics.values()) <= set(documents)


def test_documentation_holds_long_docstrings_as_inspect_shows_them(documents):
  joined = '\0'.join(documents)
  assert inspect.getdoc(json) in joined
  assert inspect.getdoc(json.JSONDecoder) in joined


def test_documentation_is_prose_and_not_source(documents):
  lines = [line for text in documents for line in text.splitlines()]
  code = [line for line in lines if line.startswith(('def ', 'import ', 'from '))]
  assert len(code) < 0.01 * len(lines)


def test_documentation_leaves_out_tests_and_short_docstrings(monkeypatch):
  long, short = 'Explains much.' * 40, 'Explains little.'
  source = f'"""{long}"""\n\ndef f():\n  """{short}"""\n'
  paths = pathlib.Path('test', 'of.py'), pathlib.Path('json', 'of.py')
  monkeypatch.setattr(library, 'modules', lambda: iter([(path, source) for path in paths]))
  documents = library.documentation()[len(topics.topics) :]
  assert documents == [long + '\n']
