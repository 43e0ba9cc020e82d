"""Exported programs, run in a process that has no Lissom, beside `generate`."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from model import safetensors_io, stablehlo
from model.config import ModelConfig
from model.infer.generate import generate
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.stablehlo import run
from model.transformer import Transformer, linears
from ops import quantized

pytest.importorskip('flatbuffers')

COUNT = 12
PROMPTS = [[5, 1, 77, 30, 2, 9, 9, 41, 60, 3, 8], [7, 7, 1, 0, 88, 12, 33, 2, 2, 50, 6]]
TWO_ROWS, COMPRESSED = 'float32, two rows', 'int8, int4 in groups of 32, a window, an int8 cache'
CASES = {TWO_ROWS: {'batch': 2}, COMPRESSED: {'window': 6, 'kv_cache': 'int8'}}
# The process sees the folder alone: no site of ours, no current folder.
CHILD = """
import importlib.util, json, pathlib, sys
found = {}
for folder in map(pathlib.Path, sys.argv[3:]):
  spec = importlib.util.spec_from_file_location('run', folder / 'run.py')
  run = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(run)
  loaded = run.load(folder)
  prompts = json.loads(sys.argv[1])[: loaded[0]['batch']]
  found[folder.name] = run.generate(loaded, prompts, int(sys.argv[2]))
ours = [name for name in sys.modules if name.split('.')[0] in ('model', 'ops', 'flax')]
print(json.dumps([found, ours]))
"""


def _model(window=None):
  """One layer; with a window, of low-bit matrices."""
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=16, window=window),
    ffn=FeedForwardConfig(width=64),
  )
  config = ModelConfig(
    family='llama', vocab_size=89, width=32, layers=(layer,), max_positions=64, bos_id=1
  )
  model = Transformer(config, rngs=nnx.Rngs(0))
  for i, (path, linear) in enumerate(linears(model).items()):
    # Large enough for the choice of a token to be no matter of rounding.
    w_IO = 0.3 * jax.random.normal(jax.random.key(i), linear.weight.shape)
    if window is not None:
      name, group = ('int4', 32) if 'ffn' in path else ('int8', None)
      w_IO = quantized.quantize(w_IO, name, group_size=group)
    linear.weight.set_value(w_IO)
  return model


def _options(**changes):
  return stablehlo.Options(**{'capacity': 32, 'lengths': (4,)} | changes)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  """The folder of each case, and the model in it."""
  found = {}
  for number, (name, case) in enumerate(CASES.items()):
    model, folder = _model(case.get('window')), tmp_path_factory.mktemp('programs') / str(number)
    own = {key: value for key, value in case.items() if key != 'window'}
    stablehlo.write(folder, model, None, _options(**own))
    found[name] = folder, model, own
  return found


@pytest.fixture(scope='module')
def continued(exported, tmp_path_factory):
  """What a process without Lissom continues the prompts with, by the name of the folder."""
  folders = [str(folder) for folder, _, _ in exported.values()]
  child = [sys.executable, '-I', '-c', CHILD, json.dumps(PROMPTS), str(COUNT), *folders]
  done = subprocess.run(child, capture_output=True, text=True, cwd=tmp_path_factory.mktemp('empty'))
  assert done.returncode == 0, done.stderr[-2000:]
  found, ours = json.loads(done.stdout)
  assert ours == []
  return found


@pytest.mark.parametrize('name', CASES)
def test_the_loader_gives_the_tokens_of_generate(exported, continued, name):
  folder, model, own = exported[name]
  expected = generate(
    model,
    PROMPTS[: own.get('batch', 1)],
    max_new_tokens=COUNT,
    cache_format=own.get('kv_cache', 'float'),
  )
  assert continued[folder.name] == expected
  assert len(set(expected[0])) > 2  # a model that repeats itself would show little


def test_codes_are_stored_as_they_are(exported):
  folder, model, _ = exported[COMPRESSED]
  tensors = safetensors_io.read_file(folder / 'weights.safetensors')
  w = linears(model)['layers.0.ffn.down'].weight.get_value()
  (codes,) = (name for name in tensors if 'layers.0.ffn.down' in name and 'values' in name)
  np.testing.assert_array_equal(tensors[codes].read(), w.values)
  assert tensors[codes].dtype == np.uint8 and tensors[codes].shape == (32, 32)


def test_an_end_token_ends_each_row_by_itself(exported, continued):
  folder, _, _ = exported[TWO_ROWS]
  loaded = run.load(folder)
  rows = continued[folder.name]
  end = next(token for token in rows[0][1:] if token not in rows[1])
  loaded[0]['ends'] = [end]
  assert run.generate(loaded, PROMPTS, COUNT) == [rows[0][: rows[0].index(end)], rows[1]]


def test_programs_for_other_machines_call_nothing_of_ours(tmp_path):
  model = _model(window=6)
  options = _options(platforms=('cpu', 'cuda', 'tpu'), lengths=())
  stablehlo.write(tmp_path / 'all', model, None, options)
  program = jax.export.deserialize(bytearray((tmp_path / 'all' / 'step_1.bin').read_bytes()))
  assert program.platforms == ('cpu', 'cuda', 'tpu')
  assert 'custom_call' not in program.mlir_module()  # nor anything else that JAX would look for
  about = json.loads((tmp_path / 'all' / 'programs.json').read_text())
  assert about['calling_convention'] == program.calling_convention_version
  assert about['jax'] == jax.__version__


def test_a_wrong_folder_is_refused(exported, tmp_path):
  with pytest.raises(ValueError, match=r'has no programs\.json; name a folder'):
    run.load(tmp_path)
  folder = shutil.copytree(exported[COMPRESSED][0], tmp_path / 'copy')
  (folder / 'weights.safetensors').write_bytes(b'short')
  with pytest.raises(ValueError, match=r'weights\.safetensors is not the file of .* bytes'):
    run.load(folder)
  (folder / 'weights.safetensors').unlink()
  with pytest.raises(ValueError, match=r'weights\.safetensors is not the file'):
    run.load(folder)


@pytest.mark.parametrize(
  'prompts, count, message',
  [
    ([[1, 2], [3, 4]], 1, 'take 1 prompts of one length'),
    ([[1] * 31], 2, 'up to 32 tokens a row'),
    ([[]], 2, 'up to 32 tokens a row'),
    ([[89]], 2, r'tokens are 0 to 88, not as in \[\[89\]\]'),
    ([[-1]], 2, 'tokens are 0 to 88'),
  ],
)
def test_wrong_prompts_are_refused(exported, prompts, count, message):
  with pytest.raises(ValueError, match=message):
    run.generate(run.load(exported[COMPRESSED][0]), prompts, count)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'platforms': ('metal',)}, r"platforms are some of .*, not \['metal'\]"),
    ({'platforms': ()}, 'platforms are some of'),
    ({'batch': 0}, 'of at least one row, not .* of 0'),
    ({'lengths': (64,)}, 'a step takes 1 to 32 tokens'),
    ({'kv_cache': 'fp4'}, "'fp4' is not a cache format"),
  ],
)
def test_wrong_options_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    _options(**changes)
