"""Compiled programs on disk: processes share them, and nothing depends on them."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from experiments import compilation

ROOT = pathlib.Path(__file__).parents[2]
CODE = """
import pathlib, sys
import jax, jax.numpy as jnp
from experiments import compilation
assert jax.config.jax_compilation_cache_dir is None  # importing changes nothing
compilation.MIN_COMPILE_S = 0.0
print(compilation.use_cache(pathlib.Path(sys.argv[1])))
hits = []
jax.monitoring.register_event_listener(
  lambda name, **_: hits.extend([name] if name.endswith('cache_hits') else [])
)
f = jax.jit(lambda x: jnp.tanh(x @ x).sum())
print(float(f(jnp.full((8, 8), 0.125))), len(hits) > 0)
"""


def _start(folder) -> subprocess.Popen:
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'cwd': ROOT}
  environment = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
  return subprocess.Popen([sys.executable, '-c', CODE, folder], env=environment, **pipes)


def _finish(process) -> list[str]:
  out, err = process.communicate()
  assert (process.returncode, err) == (0, ''), err
  return out.split()


def test_processes_side_by_side_and_later_ones_share_programs(tmp_path):
  first = [_finish(process) for process in [_start(tmp_path), _start(tmp_path)]]
  assert {words[0] for words in first} == {'True'}
  later = _finish(_start(tmp_path))
  assert later == ['True', first[0][1], 'True']
  (folder,) = tmp_path.iterdir()
  assert any(folder.iterdir())
  for entry in folder.glob('*-cache'):
    entry.write_bytes(entry.read_bytes()[:40])  # as a killed process leaves it
  assert _finish(_start(tmp_path)) == ['True', first[0][1], 'False']


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path):
  (tmp_path / 'file').touch()
  words = _finish(_start(tmp_path / 'file'))
  assert (words[0], words[2]) == ('False', 'False')


def test_a_folder_that_jax_was_given_stays(tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'theirs'))
  assert not compilation.use_cache(tmp_path / 'ours')
  assert list(tmp_path.iterdir()) == [] and jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize(
  'text',
  ['flags\t\t: fpu avx2 sse', 'processor: 0\nFeatures : fp asimd', 'nothing is said here'],
)
def test_machines_of_other_features_do_not_share(text, monkeypatch):
  here = compilation._machine()
  monkeypatch.setattr(pathlib.Path, 'read_text', lambda *_, **__: text)
  there = compilation._machine()
  assert here != there == compilation._machine()
