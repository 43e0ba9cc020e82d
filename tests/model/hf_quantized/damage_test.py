"""Damaged files of every method: a ValueError that names the matrix, or a matrix that is whole."""

import json

import ml_dtypes
import numpy as np
import pytest

from model import hf_quantized, safetensors_io
from model.safetensors_io import Tensor

O, I, GROUP = 16, 64, 32
NAME = 'model.layers.3.mlp.up_proj'
DAMAGES, CUTS = 200, 60
DTYPES = tuple(safetensors_io.DTYPES.values())


def _ints(rng, *shape):
  return rng.integers(-(2**31), 2**31, shape).astype(np.int32)


def _floats(rng, *shape, dtype=np.float16):
  return rng.uniform(0.01, 0.02, shape).astype(dtype)


def _gptq(rng):
  groups = (np.arange(I) // GROUP).astype(np.int32)
  words = {'qweight': _ints(rng, I // 8, O), 'qzeros': _ints(rng, I // GROUP, O // 8)}
  return {**words, 'scales': _floats(rng, I // GROUP, O), 'g_idx': groups}


def _awq(rng):
  words = {'qweight': _ints(rng, I, O // 8), 'qzeros': _ints(rng, I // GROUP, O // 8)}
  return {**words, 'scales': _floats(rng, I // GROUP, O)}


def _nf4(rng):
  state = {'quant_type': 'nf4', 'blocksize': 64, 'shape': [O, I], 'nested_blocksize': 256}
  text = json.dumps({**state, 'nested_offset': 0.5, 'dtype': 'float16'}).encode()
  return {
    'weight': rng.integers(0, 256, (O * I // 2, 1), np.uint8),
    'weight.absmax': rng.integers(0, 256, O * I // 64, np.uint8),
    'weight.quant_map': np.linspace(-1, 1, 16, dtype=np.float32),
    'weight.nested_absmax': _floats(rng, 1, dtype=np.float32),
    'weight.nested_quant_map': _floats(rng, 256, dtype=np.float32),
    'weight.quant_state.bitsandbytes__nf4': np.frombuffer(text, np.uint8),
  }


def _int8(rng):
  weight = rng.integers(-127, 128, (O, I), np.int8)
  return {'weight': weight, 'SCB': _floats(rng, O, dtype=np.float32)}


def _fp8(rng):
  codes = rng.integers(0, 0x70, (O, I), np.uint8).view(ml_dtypes.float8_e4m3fn)
  return {'weight': codes, 'weight_scale_inv': _floats(rng, 2, 2, dtype=np.float32)}


METHODS = {
  'gptq': ({'bits': 4, 'group_size': GROUP}, _gptq),
  'awq': ({'bits': 4, 'group_size': GROUP}, _awq),
  'bitsandbytes': ({}, _nf4),
  'int8': ({'quant_method': 'bitsandbytes'}, _int8),
  'fp8': ({'weight_block_size': [8, GROUP]}, _fp8),
}


def _bits(rng, arrays, leaf):
  """Turns some bits of the values over."""
  array = arrays[leaf]
  octets = np.frombuffer(array.tobytes(), np.uint8).copy()
  for place in rng.integers(0, len(octets), 3):
    octets[place] ^= 1 << rng.integers(8)
  arrays[leaf] = octets.view(array.dtype).reshape(array.shape)


def _missing(rng, arrays, leaf):
  del arrays[leaf]


def _dtype(rng, arrays, leaf):
  """The same bytes as another type, where they are as many."""
  array, dtype = arrays[leaf], DTYPES[rng.integers(len(DTYPES))]
  if array.nbytes % (dtype.itemsize * array.shape[0]) == 0:
    rest = () if array.ndim == 1 else (-1,)
    octets = np.frombuffer(array.tobytes(), np.uint8).view(dtype)
    arrays[leaf] = octets.reshape(array.shape[0], *rest) if rest else octets


def _shorter(rng, arrays, leaf):
  array = arrays[leaf]
  axis = rng.integers(array.ndim)
  arrays[leaf] = array.take(np.arange(rng.integers(array.shape[axis])), axis)


def _longer(rng, arrays, leaf):
  arrays[leaf] = np.concatenate([arrays[leaf]] * 2, rng.integers(arrays[leaf].ndim))


def _rank(rng, arrays, leaf):
  array = arrays[leaf]
  arrays[leaf] = array[None] if rng.integers(2) else array.reshape(-1)


KINDS = (_bits, _missing, _dtype, _shorter, _longer, _rank)


def _write(path, arrays):
  tensors = {
    f'{NAME}.{leaf}': Tensor(a.shape, a.dtype, lambda a=a: a) for leaf, a in arrays.items()
  }
  safetensors_io.write_file(path, tensors)


def _outcome(path, settings) -> str:
  """The message of the error; '' if the matrix is there, as one of numbers or of codes."""
  try:
    found = hf_quantized.decode(settings, safetensors_io.read_file(path), lambda line: None)
    tensor = found.get(f'{NAME}.weight')
    if isinstance(tensor, hf_quantized.CodedTensor):
      with np.errstate(all='ignore'):  # flipped bits make numbers that are huge
        values = tensor.read()
      assert (values.shape, values.dtype) == (tensor.shape, np.float32)
  except ValueError as error:
    return str(error)
  return ''


@pytest.mark.parametrize('method', METHODS)
def test_damaged_tensors_are_named_and_nothing_crashes(method, tmp_path):
  settings, make = METHODS[method]
  settings = {'quant_method': method, **settings}
  _write(tmp_path / 'whole', make(np.random.default_rng(0)))
  assert _outcome(tmp_path / 'whole', settings) == ''
  refused = 0
  for seed in range(DAMAGES):
    rng = np.random.default_rng(seed)
    arrays = make(rng)
    KINDS[seed % len(KINDS)](rng, arrays, rng.choice(list(arrays)))
    _write(tmp_path / 'damaged', arrays)
    message = _outcome(tmp_path / 'damaged', settings)
    assert not message or NAME in message, (seed, message)
    refused += bool(message)
  # Flipped bits of codes are numbers as well, and some parts may be absent or of several types.
  assert refused > DAMAGES / 2


@pytest.mark.parametrize('method', METHODS)
def test_files_that_are_cut_off_or_altered_are_refused_or_read(method, tmp_path):
  settings, make = METHODS[method]
  settings = {'quant_method': method, **settings}
  whole, path = tmp_path / 'whole', tmp_path / 'damaged'
  _write(whole, make(np.random.default_rng(0)))
  octets, refused = np.frombuffer(whole.read_bytes(), np.uint8), 0
  for seed in range(CUTS):
    rng, changed = np.random.default_rng(seed), octets.copy()
    if seed % 2:
      changed = changed[: rng.integers(len(octets))]
      path.write_bytes(changed.tobytes())
      assert 'damaged is no sound safetensors file' in _outcome(path, settings), seed
      continue
    header = min(len(octets), 8 + int.from_bytes(octets[:8].tobytes(), 'little'))
    changed[rng.integers(8, header)] ^= 1 << rng.integers(8)
    path.write_bytes(changed.tobytes())
    refused += bool(_outcome(path, settings))
  assert refused > CUTS / 8
