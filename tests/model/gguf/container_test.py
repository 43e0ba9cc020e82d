"""The parser of GGUF files against the reader of the `gguf` package, and damaged files."""

import struct

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from model.gguf import container

METADATA = {
  'uint8': 200,
  'int8': -5,
  'uint16': 60000,
  'int16': -300,
  'uint32': 4_000_000_000,
  'int32': -70000,
  'uint64': 2**60,
  'int64': -(2**60),
  'float32': 1e-5,
  'float64': 1 / 3,
  'bool': True,
  'string': 'naïve – 日本',
}


@pytest.fixture
def path(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / 'model.gguf', 'llama')
  for kind, value in METADATA.items():
    getattr(writer, f'add_{kind}')(f'a.{kind}', value)
  writer.add_array('a.strings', ['x', '', 'ä'])
  writer.add_array('a.numbers', [0.1, 2.5])
  rng = np.random.default_rng(0)
  writer.add_tensor('matrix', rng.normal(size=(3, 5)).astype(np.float32))
  writer.add_tensor('cube', rng.normal(size=(2, 3, 4)).astype(np.float16))
  blocks = gguf.quants.quantize(rng.normal(size=(3, 64)).astype(np.float32), Kind.Q8_0)
  writer.add_tensor('blocks', blocks, raw_dtype=Kind.Q8_0)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return tmp_path / 'model.gguf'


def test_metadata_is_what_was_written(path):
  metadata = container.read(path).metadata
  for kind, value in METADATA.items():
    assert metadata[f'a.{kind}'] == value and type(metadata[f'a.{kind}']) is type(value)
  assert metadata['a.strings'] == ['x', '', 'ä'] and metadata['a.numbers'] == [0.1, 2.5]
  assert metadata['general.architecture'] == 'llama'


def test_tensors_equal_those_of_the_other_reader(path):
  ours, theirs = container.read(path).tensors, gguf.GGUFReader(path).tensors
  assert list(ours) == [tensor.name for tensor in theirs] == ['matrix', 'cube', 'blocks']
  for tensor in theirs:
    expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    found = ours[tensor.name].read()
    assert found.dtype == np.float32 and found.shape == ours[tensor.name].shape
    np.testing.assert_array_equal(found, expected)
    assert tuple(tensor.shape[::-1]) == ours[tensor.name].shape


def test_every_shorter_file_is_refused(path, tmp_path):
  data, short = path.read_bytes(), tmp_path / 'short.gguf'
  end = data.rindex(b'blocks')
  for size in (0, 3, 4, 10, 30, 100, end, len(data) - 1000, len(data) - 200):
    short.write_bytes(data[: max(size, 0)])
    with pytest.raises(ValueError, match=r'short\.gguf is no GGUF file that can be read'):
      container.read(short)


def test_tensors_beyond_the_end_are_named(path):
  path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(ValueError, match=r'truncated: 1 of 3 tensors lie beyond its end \(blocks\)'):
    container.read(path)


@pytest.mark.parametrize(
  'offset, value, match',
  [
    (0, b'GGML', 'does not begin with the letters GGUF'),
    (4, struct.pack('<I', 1), 'it is version 1; only'),
    (4, struct.pack('>I', 3), 'it is big-endian; only'),
    (8, struct.pack('<Q', 2**40), 'truncated within its header'),
    (16, struct.pack('<Q', 2**40), 'truncated within its header'),
  ],
)
def test_a_foreign_header_is_refused(path, offset, value, match):
  data = bytearray(path.read_bytes())
  data[offset : offset + len(value)] = value
  path.write_bytes(data)
  with pytest.raises(ValueError, match=match):
    container.read(path)


@pytest.mark.parametrize(
  'kind, match',
  [
    (int(Kind.IQ2_XS), 'blocks: IQ2_XS'),
    (int(Kind.I32), 'blocks: I32'),
    (999, 'blocks: 999'),
    (int(Kind.Q4_K), r'the tensor blocks \(3, 64\) does not consist of blocks of 256'),
  ],
)
def test_types_that_are_not_read_are_named(path, kind, match):
  data = bytearray(path.read_bytes())
  at = data.rindex(b'blocks') + len('blocks') + 4 + 2 * 8  # behind the rank and two lengths
  assert data[at : at + 4] == struct.pack('<I', Kind.Q8_0)
  data[at : at + 4] = struct.pack('<I', kind)
  path.write_bytes(data)
  with pytest.raises(ValueError, match=match):
    container.read(path)


def test_a_part_of_a_split_file_is_refused(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / 'a-00001-of-00002.gguf', 'llama')
  writer.add_uint16('split.count', 2)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with pytest.raises(ValueError, match='one of 2 parts; join them first'):
    container.read(tmp_path / 'a-00001-of-00002.gguf')


def test_only_gguf_files_and_folders_with_one_are_meant(tmp_path):
  assert container.find_file(tmp_path) is None and container.find_file('org/name') is None
  (tmp_path / 'a.gguf').touch()
  assert container.find_file(tmp_path) == tmp_path / 'a.gguf'
  (tmp_path / 'a.txt').touch()
  assert container.find_file(tmp_path / 'a.txt') is None
  (tmp_path / 'config.json').touch()
  assert container.find_file(tmp_path) is None


def _brute_force(kind, block):
  """One block of 256 weights by the layout of ggml: loops over weights, no tables."""
  half = lambda at: float(np.frombuffer(bytes(block[at : at + 2]), np.float16)[0])
  if kind == Kind.Q6_K:
    low, high, scales = block[:128], block[128:192], block[192:208].astype(np.int8)
    for i in range(256):
      part, place = divmod(i, 128)
      lane, column = divmod(place, 32)
      byte = low[64 * part + 32 * (lane % 2) + column]
      bits = (byte >> (4 * (lane // 2))) & 15
      bits |= ((high[32 * part + column] >> (2 * lane)) & 3) << 4
      yield half(208) * int(scales[i // 16]) * (int(bits) - 32)
    return
  packed = block[4:16]
  for i in range(256):
    j = i // 32
    if j < 4:
      scale, least = packed[j] & 63, packed[j + 4] & 63
    else:
      scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
      least = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
    byte = block[16 + 32 * (i // 64) + i % 32]
    bits = (byte >> (4 * (j % 2))) & 15
    yield half(0) * int(scale) * int(bits) - half(2) * int(least)


@pytest.mark.parametrize('kind', [Kind.Q4_K, Kind.Q6_K])
def test_super_blocks_are_those_of_ggml(kind, tmp_path, rng):
  block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
  blocks = rng.integers(0, 256, (2, 3 * block_bytes), np.uint8)
  halves = blocks.reshape(6, block_bytes)
  at = [208] if kind == Kind.Q6_K else [0, 2]
  for start in at:  # finite scales
    halves[:, start : start + 2] = np.float16([[0.01]]).view(np.uint8)
  writer = gguf.GGUFWriter(tmp_path / 'k.gguf', 'llama')
  writer.add_tensor('w', blocks, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  found = container.read(tmp_path / 'k.gguf').tensors['w'].read()
  expected = [list(_brute_force(kind, block)) for block in halves]
  np.testing.assert_allclose(found.reshape(6, 256), expected, rtol=1e-5, atol=1e-5)
