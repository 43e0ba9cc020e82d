"""Scripts run in this process: their flags are parsed anew for each call, and share one cache."""

import functools
import importlib
import json
import shutil
import sys

import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file, save_file

from experiments import base as embedded
from model import corpus


@pytest.fixture(scope='session', autouse=True)
def texts_once():
  """Reads the texts of the Python installation once; parsing its documentation takes seconds."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(corpus, '_built_in', functools.cache(corpus._built_in))
    yield


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
  """The cache folder of all scripts that run in the tests."""
  folder = tmp_path_factory.mktemp('cache')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('LISSOM_CACHE', str(folder))
    yield folder


@pytest.fixture(scope='session')
def base(cache):
  """The folder of the tiny base model of --smoke, trained once."""
  embedded.load_or_train(cache, smoke=True)
  (folder,) = (path for path in cache.glob('base-*') if path.is_dir())
  return folder


class Script:
  """A script of experiments/, called with the words of its command line."""

  def __init__(self, name: str):
    # Scripts name some flags alike, so one is loaded at a time.
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
      if module.startswith('experiments.'):
        for flag in list(defined):
          delattr(flags.FLAGS, flag.name)
    sys.modules.pop(f'experiments.{name}', None)
    self.module = importlib.import_module(f'experiments.{name}')
    self.name = name

  def __call__(self, *arguments) -> None:
    flags.FLAGS.unparse_flags()
    flags.FLAGS([self.name, *map(str, arguments)])
    self.module.main()


@pytest.fixture(scope='session')
def make_script():
  """A function (name) -> the script of that name."""
  return Script


@pytest.fixture(scope='module')
def script(request, base):
  """The script that the test module is named after."""
  yield Script(request.module.__name__.rsplit('.')[-1].removesuffix('_test'))
  flags.FLAGS.unparse_flags()


@pytest.fixture
def damaged(base, tmp_path):
  """A function (kind) -> a copy of the base model that is wrong in one way."""

  def make(kind):
    folder = tmp_path / kind.replace(' ', '-')
    shutil.copytree(base, folder)
    DAMAGE[kind](folder)
    return folder

  return make


def _tensors(change):
  def damage(folder):
    path = folder / 'model.safetensors'
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={'format': 'pt'})

  return damage


def _poison(value):
  def change(tensors):
    tensors[UP] = np.array(tensors[UP])
    tensors[UP][3, 4] = value

  return change


def _truncate(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-1000])


def _smaller_vocabulary(folder):
  path = folder / 'config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), 'vocab_size': 300}))
  change = lambda t: t.update({k: t[k][:300] for k in (TABLE, 'lm_head.weight')})
  _tensors(change)(folder)


def _pickled(folder):
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')


UP, TABLE = 'model.layers.1.mlp.up_proj.weight', 'model.embed_tokens.weight'
DAMAGE = {
  'missing tensor': _tensors(lambda tensors: tensors.pop(UP)),
  'extra tensor': _tensors(lambda tensors: tensors.update(extra=np.zeros(3, np.float32))),
  'misshapen tensor': _tensors(lambda t: t.update({UP: np.ascontiguousarray(t[UP][:, :-1])})),
  'nan': _tensors(_poison(np.nan)),
  'infinity': _tensors(_poison(np.inf)),
  'truncated': _truncate,
  'another tokenizer': _smaller_vocabulary,
  'no tokenizer': lambda folder: (folder / 'tokenizer.json').unlink(),
  'only pickles': _pickled,
  'no config': lambda folder: (folder / 'config.json').unlink(),
  'broken config': lambda folder: (folder / 'config.json').write_text('{"model_type": '),
}
