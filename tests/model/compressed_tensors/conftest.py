"""What the compressors of compressed-tensors made of one matrix."""

import base64
import json
import pathlib

import numpy as np
import pytest

from model.safetensors_io import Tensor

FILE = pathlib.Path(__file__).parent / 'golden.json'


class Golden:
  """The cases of golden.json as arrays and as tensors of a checkpoint."""

  def __init__(self):
    self.found = json.loads(FILE.read_text())

  def array(self, entry) -> np.ndarray:
    dtype, shape, data = entry
    return np.frombuffer(base64.b64decode(data), np.dtype(dtype)).reshape(shape)

  def dense(self, case) -> np.ndarray:
    return self.array(self._case(case)['dense'])

  def arrays(self, case) -> dict[str, np.ndarray]:
    """The arrays of the layer X by name."""
    return {f'X.{leaf}': self.array(e) for leaf, e in self._case(case)['tensors'].items()}

  def settings(self, case):
    """The quantization_config of a checkpoint with this layer."""
    found = {'quant_method': 'compressed-tensors', 'quantization_status': 'compressed'}
    if case in self.found['masks']:
      return {**found, 'sparsity_config': {'format': case, 'targets': ['X']}}
    group = json.loads(json.dumps(self.found['cases'][case]['group']))
    return {**found, 'config_groups': {'group_0': group}, 'format': group['format']}

  def _case(self, case):
    return {**self.found['cases'], **self.found['masks']}[case]


@pytest.fixture(scope='session')
def golden():
  return Golden()


@pytest.fixture(scope='session')
def as_tensors():
  """A function {name: array} -> {name: Tensor}."""
  return lambda arrays: {n: Tensor(a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()}
