"""Without the optional extras every script can be imported, and those that need one say which."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Imports every script where no optional module is found, and runs some; prints how each ended.
PROGRAM = """
import importlib, json, pathlib, sys

REFUSED = {'uvicorn', 'starlette', 'prometheus_client', 'llguidance', 'lm_eval', 'flatbuffers',
           'pynvml', 'codecarbon', 'torch', 'transformers', 'peft', 'openai', 'httpx'}

class Finder:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in REFUSED:
      raise ModuleNotFoundError(f'No module named {name!r}', name=name)

import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *given: None if name in REFUSED else find(name, *given)
sys.meta_path.insert(0, Finder())

from absl import flags
runs, ended = json.loads(sys.argv[1]), {}
for path in sorted(pathlib.Path('experiments').glob('*.py')):
  if 'common.run(main)' not in path.read_text():
    continue
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    if module.startswith('experiments.'):
      for flag in list(defined):
        delattr(flags.FLAGS, flag.name)
  script = importlib.import_module(f'experiments.{path.stem}')
  if path.stem in runs:
    flags.FLAGS.unparse_flags()
    flags.FLAGS([path.stem, *runs[path.stem]])
    try:
      script.main()
    except ValueError as error:
      ended[path.stem] = str(error)
  else:
    ended[path.stem] = None
print(json.dumps(ended))
"""
SERVE = "llguidance, prometheus_client, starlette, uvicorn not installed; pip install -e '.[serve]'"
HARNESS = "lm_eval not installed; pip install -e '.[harness]'"
RUNS = {
  'serve': ['--smoke'],
  'benchmark_serving': ['--smoke'],
  'harness': ['--model=x', '--tasks=y', '--output=z'],
}


@pytest.fixture(scope='module')
def ended():
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-c', PROGRAM, json.dumps(RUNS)]
  run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  return json.loads(run.stdout.splitlines()[-1])


def test_every_script_is_imported(ended):
  assert len(ended) > 20 and {'serve', 'generate', 'compress', 'cascade'} <= set(ended)


@pytest.mark.parametrize(
  'name, message', [('serve', SERVE), ('benchmark_serving', SERVE), ('harness', HARNESS)]
)
def test_a_script_says_what_to_install(ended, name, message):
  assert ended[name] == message
