"""The safetensors reader and writer against the safetensors library."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as torch_load_file
from safetensors.torch import save_file as torch_save_file
from safetensors.torch import save_model as torch_save_model

from model import safetensors_io
from model.safetensors_io import Tensor


def _lazy(array):
  return Tensor(array.shape, array.dtype, lambda: array)


def _sample(rng):
  return {
    'half': rng.normal(size=(3, 5)).astype(np.float16),
    'single': rng.normal(size=(2, 3, 4)).astype(np.float32),
    'brain': rng.normal(size=(7,)).astype(ml_dtypes.bfloat16),
    'bytes': rng.integers(0, 255, (5,)).astype(np.uint8),
    'scalar': np.array(rng.normal(), np.float32),
    'empty': np.zeros((0, 4), np.float32),
  }


def test_reads_what_the_library_writes(rng, tmp_path):
  arrays = _sample(rng)
  save_file(arrays, tmp_path / 'a.safetensors')
  tensors = safetensors_io.read_file(tmp_path / 'a.safetensors')
  assert tensors.keys() == arrays.keys()
  for name, array in arrays.items():
    tensor = tensors[name]
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == (array.shape, array.dtype, array.nbytes)
    np.testing.assert_array_equal(tensor.read(), array)


def test_the_library_reads_what_is_written(rng, tmp_path):
  arrays = _sample(rng)
  path = tmp_path / 'a.safetensors'
  safetensors_io.write_file(path, {name: _lazy(a) for name, a in arrays.items()})
  loaded = load_file(path)
  assert loaded.keys() == arrays.keys()
  for name, array in arrays.items():
    assert loaded[name].dtype == array.dtype
    np.testing.assert_array_equal(loaded[name], array)
  with safe_open(path, 'numpy') as file:
    assert file.metadata() == {'format': 'pt'}


@pytest.mark.parametrize(
  ('dtype', 'ours'),
  [
    (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
    (torch.float8_e5m2, ml_dtypes.float8_e5m2),
    (torch.bfloat16, ml_dtypes.bfloat16),
  ],
)
def test_small_floats_pass_both_ways(dtype, ours, tmp_path):
  theirs = torch.linspace(-4, 4, 15).reshape(3, 5).to(dtype)
  torch_save_file({'x': theirs}, tmp_path / 'a.safetensors')
  array = safetensors_io.read_file(tmp_path / 'a.safetensors')['x'].read()
  assert array.dtype == ours
  np.testing.assert_array_equal(array.astype(np.float32), theirs.float().numpy())
  safetensors_io.write_file(tmp_path / 'b.safetensors', {'x': _lazy(array)})
  assert torch.equal(torch_load_file(tmp_path / 'b.safetensors')['x'].float(), theirs.float())


def test_transposed_views_are_written_in_order(rng, tmp_path):
  array = rng.normal(size=(3, 5)).astype(np.float32).T
  safetensors_io.write_file(tmp_path / 'a.safetensors', {'x': _lazy(array)})
  np.testing.assert_array_equal(load_file(tmp_path / 'a.safetensors')['x'], array)


def test_tensors_are_made_one_at_a_time(tmp_path):
  events = []

  def read(name):
    events.append(name)
    return np.ones(3, np.float32)

  names = [f't{i}' for i in range(5)]
  lazy = {n: Tensor((3,), np.dtype(np.float32), lambda n=n: read(n)) for n in names}
  safetensors_io.write_folder(tmp_path, lazy, max_shard_bytes=24)
  assert events == names  # each once, in order


@pytest.mark.parametrize('array', [np.zeros(3, np.float16), np.zeros(4, np.float32)])
def test_values_must_be_as_announced(array, tmp_path):
  tensor = Tensor((3,), np.dtype(np.float32), lambda: array)
  with pytest.raises(ValueError, match=r'x was announced as float32 \(3,\)'):
    safetensors_io.write_file(tmp_path / 'a.safetensors', {'x': tensor})


@pytest.mark.parametrize(
  'damage',
  [
    lambda data: data[:-3],
    lambda data: data[:20],
    lambda data: b'',
    lambda data: b'version https://git-lfs.github.com/spec/v1\noid sha256:0',
    lambda data: data[:8] + b'{' * 40 + data[48:],
    lambda data: data + b'\0\0\0\0',
  ],
  ids=['truncated', 'no-data', 'empty', 'lfs-pointer', 'broken-header', 'trailing'],
)
def test_damaged_files_are_named(damage, tmp_path):
  path = tmp_path / 'model.safetensors'
  save_file({'x': np.zeros((4, 4), np.float32)}, path)
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match=r'model\.safetensors is no sound safetensors file'):
    safetensors_io.read_folder(tmp_path)


def _sharded(tmp_path, count=4):
  arrays = {f't{i}': np.full((2, 2), i, np.float32) for i in range(count)}
  lazy = {name: _lazy(a) for name, a in arrays.items()}
  safetensors_io.write_folder(tmp_path, lazy, max_shard_bytes=32)
  return arrays


def test_shards_and_index(tmp_path):
  arrays = _sharded(tmp_path, 5)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  assert index['metadata'] == {'total_size': 5 * 16}
  assert index['weight_map'] == {
    't0': 'model-00001-of-00003.safetensors',
    't1': 'model-00001-of-00003.safetensors',
    't2': 'model-00002-of-00003.safetensors',
    't3': 'model-00002-of-00003.safetensors',
    't4': 'model-00003-of-00003.safetensors',
  }
  tensors = safetensors_io.read_folder(tmp_path)
  assert tensors.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(tensors[name].read(), array)


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
  arrays = {'small': np.zeros(2, np.float32), 'large': np.zeros(99, np.float32)}
  lazy = {name: _lazy(a) for name, a in arrays.items()}
  safetensors_io.write_folder(tmp_path, lazy, max_shard_bytes=32)
  assert len(list(tmp_path.glob('*.safetensors'))) == 2
  with pytest.raises(ValueError, match='at least one byte'):
    safetensors_io.write_folder(tmp_path, lazy, max_shard_bytes=0)


def test_missing_shards_are_named_and_tensors_are_those_of_the_files(tmp_path):
  _sharded(tmp_path)
  (tmp_path / 'model-00002-of-00002.safetensors').unlink()
  with pytest.raises(ValueError, match=r'lacks 1 of 2 shards: model-00002-of-00002\.safetensors'):
    safetensors_io.read_folder(tmp_path)
  save_file({'t2': np.zeros(2)}, tmp_path / 'model-00002-of-00002.safetensors')
  assert set(safetensors_io.read_folder(tmp_path)) == {'t0', 't1', 't2'}  # the index has a t3


def test_other_names_of_a_shared_tensor_are_those_of_the_metadata(tmp_path):
  layer = torch.nn.Linear(3, 3, bias=False)
  torch_save_model(torch.nn.ModuleDict({'a': layer, 'b': layer}), tmp_path / 'a.safetensors')
  assert len(load_file(tmp_path / 'a.safetensors')) == 1
  tensors = safetensors_io.read_file(tmp_path / 'a.safetensors')
  assert set(tensors) == {'a.weight', 'b.weight'}
  for tensor in tensors.values():
    np.testing.assert_array_equal(tensor.read(), layer.weight.detach().numpy())


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{', 'is no index'),
    ('{}', 'is no index'),
    ('{"weight_map": []}', 'is no index'),
    ('{"weight_map": {"x": 3}}', 'outside its own folder'),
    ('{"weight_map": {"x": "../../secret.safetensors"}}', 'outside its own folder'),
  ],
)
def test_a_broken_index_is_named(text, message, tmp_path):
  (tmp_path / 'model.safetensors.index.json').write_text(text)
  with pytest.raises(ValueError, match=message):
    safetensors_io.read_folder(tmp_path)
