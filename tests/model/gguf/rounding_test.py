"""Rounding to GGUF's types: packing against the `gguf` package, K types against llama.cpp."""

import json
import pathlib

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from model.gguf import blocks, rounding

GOLDEN = pathlib.Path(__file__).parent / 'ggml_k_blocks.json'


def _weights(rows=7, inputs=512):
  rng = np.random.default_rng(0)
  x_OI = (0.05 * rng.standard_t(4, (rows, inputs))).astype(np.float32)
  x_OI[3, :256] = 0  # a block of zeros
  x_OI[4, :32], x_OI[5, :16], x_OI[6, 32:64] = 0.1, -0.2, 0  # flat parts
  return x_OI


def _importance(inputs=512):
  return np.random.default_rng(1).exponential(size=inputs).astype(np.float32) ** 2


def _error(x_OI, kind, importance_I, weights_I):
  again_OI = gguf.quants.dequantize(rounding.encode(x_OI, kind, importance_I), kind)
  return float((np.square(x_OI - again_OI) * weights_I).sum())


@pytest.mark.parametrize('kind', blocks.GRIDS)
def test_codes_come_back(kind):
  rng, grid = np.random.default_rng(0), blocks.GRIDS[kind]
  codes_OI = rng.integers(grid.low, grid.high + 1, (6, 96))
  scales_OJ = rng.uniform(-1, 1, (6, 3)).astype(np.float16)
  minima_OJ = rng.uniform(-1, 1, (6, 3)).astype(np.float16) if grid.minimum else None
  packed = blocks.pack(kind, codes_OI, scales_OJ, minima_OJ)
  wide = lambda a: 0 if a is None else np.repeat(a.astype(np.float32), 32, axis=1)
  expected = wide(scales_OJ) * codes_OI.astype(np.float32) + wide(minima_OJ)
  np.testing.assert_array_equal(gguf.quants.dequantize(packed, kind), expected)


def test_codes_of_k_types_come_back():
  rng = np.random.default_rng(0)
  d, dmin = rng.uniform(0, 1, (2, 5)).astype(np.float16)
  s, t = rng.integers(0, 64, (2, 5, 8))
  codes = rng.integers(0, 16, (5, 8, 32))
  found = gguf.quants.dequantize(blocks.pack_q4_k(codes, d, dmin, s, t), Kind.Q4_K)
  wide = lambda a, b: (a.astype(np.float32)[:, None] * b.astype(np.float32))[..., None]
  np.testing.assert_array_equal(found.reshape(5, 8, 32), wide(d, s) * codes - wide(dmin, t))
  s, codes = rng.integers(-128, 128, (5, 16)), rng.integers(-32, 32, (5, 16, 16))
  found = gguf.quants.dequantize(blocks.pack_q6_k(codes, d, s), Kind.Q6_K)
  np.testing.assert_array_equal(found.reshape(5, 16, 16), wide(d, s) * codes)


@pytest.mark.parametrize('kind', [Kind.Q4_K, Kind.Q6_K])
@pytest.mark.parametrize('weighted', [False, True])
def test_k_types_are_as_good_as_those_of_llama_cpp(kind, weighted):
  """The golden bytes are those of ggml_quantize_chunk for the same weights and importance."""
  x_OI, importance_I = _weights(), _importance()
  golden = json.loads(GOLDEN.read_text())[f'{kind.name}{"_weighted" if weighted else ""}']
  theirs = np.frombuffer(bytes.fromhex(golden), np.uint8).reshape(len(x_OI), -1)
  ours = rounding.encode(x_OI, kind, importance_I if weighted else None)
  if kind == Kind.Q6_K and not weighted:
    size = gguf.GGML_QUANT_SIZES[kind][1]
    same = (ours.reshape(-1, size) == theirs.reshape(-1, size)).all(1)
    assert same.mean() > 0.7  # others have flat parts, in which all scales fit
  counts_I = importance_I if weighted else np.ones_like(importance_I)
  error = lambda b: (np.square(x_OI - gguf.quants.dequantize(b, kind)) * counts_I).sum()
  assert error(ours) <= (1.0 if weighted else 1.005) * error(theirs)


@pytest.mark.parametrize('kind', [*blocks.GRIDS, Kind.Q4_K, Kind.Q6_K])
def test_importance_lowers_the_error_that_it_weighs(kind):
  x_OI, importance_I = _weights(), _importance()
  weighted, plain = (_error(x_OI, kind, one, importance_I) for one in (importance_I, None))
  assert weighted < plain
  ones = _error(x_OI, kind, importance_I, 1.0), _error(x_OI, kind, None, 1.0)
  assert ones[0] > 0.9 * ones[1]


@pytest.mark.parametrize('kind', [Kind.Q4_1, Kind.Q4_K, Kind.Q6_K])
def test_importance_of_unused_inputs_is_none(kind):
  x_OI = _weights()
  expected = rounding.encode(x_OI, kind)
  np.testing.assert_array_equal(rounding.encode(x_OI, kind, np.zeros(512)), expected)


@pytest.mark.parametrize('kind', [*blocks.GRIDS, Kind.Q4_K, Kind.Q6_K])
def test_weights_of_unused_inputs_are_kept(kind):
  x_OI, importance_I = _weights(), _importance()
  importance_I[:256] = 0
  used, unused = np.zeros(512), np.zeros(512)
  used[256:], unused[:256] = 1, 1
  error = lambda one, where: _error(x_OI, kind, one, where)
  assert error(importance_I, unused) < 1.6 * error(None, unused)
  assert error(importance_I, used * importance_I) < error(None, used * importance_I)


@pytest.mark.parametrize('kind', [*blocks.GRIDS, Kind.Q4_K, Kind.Q6_K])
@pytest.mark.parametrize('importance', [False, True])
def test_zeros_and_tiny_weights_give_finite_numbers(kind, importance):
  x_OI = np.zeros((3, 256), np.float32)
  x_OI[1], x_OI[2, 5] = 1e-30, 1e-6
  packed = rounding.encode(x_OI, kind, _importance(256) if importance else None)
  again_OI = gguf.quants.dequantize(packed, kind)
  assert np.isfinite(again_OI).all() and np.abs(again_OI - x_OI).max() < 2e-6
  assert (again_OI[0] == 0).all()


def test_many_rows_are_rounded_in_parts(monkeypatch):
  x_OI, importance_I = _weights(), _importance()
  whole = rounding.encode(x_OI, Kind.Q4_K, importance_I)
  monkeypatch.setattr(rounding, 'CHUNK', 1500)
  np.testing.assert_array_equal(rounding.encode(x_OI, Kind.Q4_K, importance_I), whole)


def test_rows_that_blocks_do_not_divide_are_refused():
  with pytest.raises(ValueError, match='Q4_K has blocks of 256, which do not divide 96 inputs'):
    rounding.encode(np.zeros((2, 96), np.float32), Kind.Q4_K)
