"""Who imports whom, how long files are, and where packages are, read off the source."""

import ast
import functools
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ('ops', 'model', 'experiments')
LONGEST_FILE = 400
OPS_LIBRARIES = {'jax', 'jaxlib', 'numpy', 'einops', 'aqt', 'ml_dtypes'}
# Modules of the standard library through which an op could reach the world outside.
IO_MODULES = {'io', 'os', 'pathlib', 'shutil', 'socket', 'subprocess', 'sys', 'tempfile', 'urllib'}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob('*.py'))
SUB_PACKAGES = sorted(path.parent.name for path in (ROOT / 'model').glob('*/__init__.py'))
# What every part of the model is built on, and which imports nothing of them.
FOUNDATION = 'layers'
# The sub-packages that are parts of the reader and writer of checkpoints, model/hf.py. GGUF files
# are read by the families' own tables.
OPEN_TO_MODEL = {'hf_names', 'gguf', 'hf_quantized'}
OPEN_TO_PARTS = {
  ('gguf', 'hf_names'),
  ('hf_quantized', 'hf_names'),
  ('hf_quantized', 'compressed_tensors'),
  ('compressed_tensors', 'hf_names'),
}


@functools.cache
def _imports(path: pathlib.Path) -> frozenset[str]:
  """The dotted names of the modules that a file imports, within functions too."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}, line {node.lineno}: a relative import'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return frozenset(found)


def _inside(imports: frozenset[str], package: str) -> set[str]:
  return {name for name in imports if name == package or name.startswith(f'{package}.')}


def _files(folder: str) -> list[pathlib.Path]:
  return [path for path in FILES if path.is_relative_to(ROOT / folder)]


def test_the_reader_of_imports(tmp_path):
  path = tmp_path / 'x.py'
  path.write_text('import a.b\nfrom c import d as e\ndef f():\n  from g.h import i, j\n')
  assert _imports(path) == {'a.b', 'c.d', 'g.h.i', 'g.h.j'}
  assert _inside({'model', 'model.hf', 'modelling'}, 'model') == {'model', 'model.hf'}


def test_there_is_something_to_read():
  assert len(FILES) > 40
  assert {'compress', 'train', 'infer', 'eval', 'hf_names', 'gguf'} <= set(SUB_PACKAGES)


@pytest.mark.parametrize('path', _files('ops'), ids=lambda path: path.stem)
def test_ops_are_arrays_in_and_arrays_out(path):
  tops = {name.split('.')[0] for name in _imports(path)}
  assert not tops & {'model', 'experiments', 'flax', 'absl'} | (tops & IO_MODULES)
  standard = tops & set(sys.stdlib_module_names)
  assert tops - standard - {'ops'} <= OPS_LIBRARIES


@pytest.mark.parametrize('path', _files('model'), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_model_imports_no_experiment_and_no_sub_package_imports_another(path):
  imports = _imports(path)
  assert not _inside(imports, 'experiments') | _inside(imports, 'absl')
  own = path.relative_to(ROOT / 'model').parts[0]
  for other in set(SUB_PACKAGES) - {own, FOUNDATION}:
    allowed = other in OPEN_TO_MODEL and own not in SUB_PACKAGES
    allowed = allowed or (own, other) in OPEN_TO_PARTS
    assert allowed or not _inside(imports, f'model.{other}'), f'{path} imports model.{other}'


def test_layers_are_built_on_ops_alone():
  for path in _files(f'model/{FOUNDATION}'):
    inside = _inside(_imports(path), 'model')
    assert all(name.startswith(f'model.{FOUNDATION}.') for name in inside), path


def test_a_script_is_imported_by_nobody():
  scripts = [path for path in _files('experiments') if 'common.run(main)' in path.read_text()]
  assert len(scripts) >= 5
  for path in FILES:
    for script in scripts:
      assert not _inside(_imports(path), f'experiments.{script.stem}')


@pytest.mark.parametrize('package', PACKAGES)
def test_no_file_is_too_long(package):
  lengths = {
    str(path.relative_to(ROOT)): len(path.read_text(encoding='utf-8').splitlines())
    for path in _files(package)
  }
  assert {path: n for path, n in lengths.items() if n > LONGEST_FILE} == {}


def test_packages_say_what_they_are_and_tests_are_none():
  for package in PACKAGES:
    for folder in {path.parent for path in _files(package)}:
      source = (folder / '__init__.py').read_text()
      assert ast.get_docstring(ast.parse(source)), f'{folder} has no docstring'
  assert list((ROOT / 'tests').rglob('__init__.py')) == []


def test_every_test_file_mirrors_the_tree():
  for path in (ROOT / 'tests').rglob('*.py'):
    assert path.name == 'conftest.py' or path.name.endswith('_test.py'), path
