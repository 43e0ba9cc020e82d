"""Which file of a quantized checkpoint is opened."""

import numpy as np
import pytest

from model import safetensors_io
from model.hf_quantized import files
from model.safetensors_io import Tensor

NAMED = {'model_file_base_name': 'gptq_model-4bit-128g'}


def _write(path):
  array = np.zeros(2, np.float32)
  safetensors_io.write_file(path, {path.stem: Tensor(array.shape, array.dtype, lambda: array)})


def test_the_named_file_is_read_where_there_is_one(tmp_path):
  _write(tmp_path / 'model.safetensors')
  assert list(files.read(tmp_path, None)) == ['model']
  assert list(files.read(tmp_path, NAMED)) == ['model']
  _write(tmp_path / 'gptq_model-4bit-128g.safetensors')
  assert list(files.read(tmp_path, NAMED)) == ['gptq_model-4bit-128g']


@pytest.mark.parametrize('name', ['../model', '/etc/model', 4])
def test_a_file_elsewhere_is_refused(tmp_path, name):
  with pytest.raises(ValueError, match='model_file_base_name must be a name in'):
    files.read(tmp_path, {'model_file_base_name': name})
