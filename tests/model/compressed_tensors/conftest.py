"""One matrix as the compressors of compressed-tensors store it, and tiny models of random codes."""

import base64
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from model import hf_names, transformer
from model.safetensors_io import Tensor
from ops import experts
from ops.formats import FORMATS
from ops.quantized import QuantizedTensor

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


SIZES = {
  'vocab_size': 99,
  'hidden_size': 64,
  'intermediate_size': 96,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'pad_token_id': None,
}
GPT2 = {'n_embd': 64, 'n_layer': 2, 'n_head': 4, 'n_positions': 64}


@pytest.fixture(scope='session')
def random_codes():
  """A function (rng, (I, O), format, ...) -> a weight of random codes, which nothing compiles."""
  return _random_codes


def _random_codes(rng, shape, format, group=None, *, symmetric=True, scales=np.float32):
  inputs, outputs = shape
  bits = FORMATS[format].bits
  groups = inputs // (group or inputs)
  codes = rng.integers(0, 2**bits, shape)
  if bits == 4:
    values = (codes[0::2] | codes[1::2] << 4).astype(np.uint8)
  else:
    values = (codes - 128).astype(np.int8) if symmetric else codes.astype(np.uint8)
  zeros = None if symmetric else jnp.asarray(rng.integers(0, 2**bits, (groups, outputs)), 'uint8')
  size = rng.uniform(0.01, 0.02, (groups, outputs)) * 2.0 ** (4 - bits)
  scales_JO = jnp.asarray(size.astype(scales))
  w = QuantizedTensor(jnp.asarray(values), scales_JO, zeros, format, inputs, jnp.dtype(jnp.float32))
  return w


@pytest.fixture(scope='session')
def tiny_model():
  """A function (family, weight) -> a model; `weight(rng, path, shape)` makes matrices of layers."""
  return _tiny_model


def _tiny_model(family, weight, **changes):
  sizes = {**SIZES, **(GPT2 if family == 'gpt2' else {}), **changes}
  config = hf_names.config_from_hf({'model_type': family, **sizes})
  model, rng = transformer.abstract(config), np.random.default_rng(0)
  linears = {f'{path}.weight' for path in transformer.linears(model)}
  for path, param in transformer.parameters(model).items():
    shape = param.get_value().shape
    if path in linears and len(shape) == 2:
      param.set_value(weight(rng, path, shape))
    elif path in linears:
      param.set_value(experts.stack([weight(rng, path, shape[1:]) for _ in range(shape[0])]))
    else:
      numbers = 0.3 * rng.standard_normal(shape) + (len(shape) == 1)
      param.set_value(jnp.asarray(numbers.astype(np.float32)))
  return model
