"""Codes of a checkpoint as parameters of ours: columns of fused matrices, experts, and the rest."""

import numpy as np
import pytest

from model import kept_codes
from model.hf_names import Entry
from model.hf_names.family import TRANSPOSE, Codec, Heads
from model.hf_quantized.codes import Codes, coded
from model.safetensors_io import Tensor
from ops.quantized import QuantizedTensor

I, HEADS = 32, Heads(2, 8)


def _codes(seed, outputs, **fields):
  rng = np.random.default_rng(seed)
  return Codes(
    **{
      'values': rng.integers(0, 16, (I, outputs), np.uint8),
      'scales': rng.uniform(0.1, 0.2, (2, outputs)).astype(np.float16),
      'zeros': rng.integers(0, 16, (2, outputs)),
      'rows': np.arange(I) // 16,
      'format': 'int4',
      **fields,
    }
  )


def _entry(name, paths, widths, codec=TRANSPOSE, expert=None):
  shapes = tuple((I, width) for width in widths)
  shape = codec.shape(list(shapes))
  return Entry(
    theirs=name, ours=paths, codec=codec, heads=HEADS, shape=shape, shapes=shapes, expert=expert
  )


def _tensor(name, codes):
  return coded(name, codes.values.shape[1], I, lambda: codes)


@pytest.mark.parametrize(
  'codec, widths',
  [
    (TRANSPOSE, (16,)),
    (Codec(), (16, 8)),
    (TRANSPOSE, (16, 8, 8)),
    (Codec(transpose=True, interleaved=True), (16, 16, 32)),
    (Codec(transpose=True, alternating=True), (16, 16)),
    (Codec(transpose=True, paired=True), (16,)),
    (Codec(transpose=True, tail=(8, 4)), (16,)),
    (Codec(transpose=True, interleaved=True, tail=(12, 4)), (16, 8)),
  ],
)
def test_columns_of_codes_are_those_of_the_numbers(codec, widths):
  paths = tuple(f'{n}.weight' for n in 'abc'[: len(widths)])
  entry = _entry('x.weight', paths, widths, codec)
  codes = _codes(0, sum(widths))
  kept, reasons = kept_codes.keep([entry], {'x.weight': _tensor('x', codes)})
  wide = codes.dense().T if codec.transpose else codes.dense()
  for path, part in zip(paths, entry.split(wide), strict=True):
    np.testing.assert_array_equal(kept[path].dense(), part)
  assert not reasons


@pytest.mark.parametrize(
  'codec, path',
  [
    (Codec(transpose=True, offset=1.0), 'a.weight'),
    (Codec(transpose=True, block=16), 'a.weight'),
    (TRANSPOSE, 'a.table'),
  ],
)
def test_other_forms_of_the_numbers_are_widened(codec, path):
  entry = _entry('x.weight', (path,), (16,), codec)
  kept, reasons = kept_codes.keep([entry], {'x.weight': _tensor('x', _codes(0, 16))})
  assert (kept, dict(reasons)) == ({}, {'the model stores these numbers in another form': 1})


def _experts(*all_codes):
  names = [f'experts.{e}.weight' for e in range(len(all_codes))]
  entries = [_entry(name, ('up.weight',), (8,), expert=e) for e, name in enumerate(names)]
  plain = Tensor((8, I), np.dtype(np.float32), lambda: np.zeros((8, I), np.float32))
  tensors = [plain if codes is None else _tensor('x', codes) for codes in all_codes]
  return kept_codes.keep(entries, dict(zip(names, tensors, strict=True)))


def test_experts_that_are_stored_alike_are_stacked():
  all_codes = [_codes(seed, 8) for seed in range(3)]
  kept, reasons = _experts(*all_codes)
  w = kept['up.weight']
  assert isinstance(w, QuantizedTensor) and w.shape == (3, I, 8) and not reasons
  for e, codes in enumerate(all_codes):
    values = np.asarray(w.values[e])
    np.testing.assert_array_equal(values & 15, codes.values[::2])
    np.testing.assert_array_equal(values >> 4, codes.values[1::2])


@pytest.mark.parametrize(
  'other, reason',
  [
    (None, 'other experts are no codes'),
    (_codes(1, 8, format=None), 'no format has these levels'),
    (_codes(1, 8, format='int8'), 'experts of one layer are stored in different forms'),
  ],
)
def test_experts_that_differ_are_widened_together(other, reason):
  kept, reasons = _experts(_codes(0, 8), other)
  assert kept == {} and list(reasons) == [reason]


def test_a_scale_that_is_not_finite_is_named():
  codes = _codes(0, 8, scales=np.full((2, 8), np.inf, np.float16))
  with pytest.raises(ValueError, match=r'NaN or infinity in experts.0.weight \(8, 32\)'):
    _experts(codes)


def test_matrices_lie_as_in_the_plain_checkpoint():
  codes = _codes(0, 8)
  entry = _entry('x.weight', ('a.weight',), (8,), Codec())
  turned = kept_codes.oriented([entry], {'x.weight': _tensor('x', codes)})['x.weight']
  assert turned.shape == (I, 8)
  np.testing.assert_array_equal(turned.read(), codes.dense())


def test_biases_that_only_old_tools_store_are_found():
  entries = [_entry('x.weight', ('a.weight',), (8,)), _entry('y.weight', ('b.weight',), (8,))]
  bias = lambda value: Tensor((8,), np.dtype(np.float32), lambda: np.full(8, value, np.float32))
  stored = {'x.weight': _tensor('x', _codes(0, 8)), 'y.weight': _tensor('y', _codes(1, 8))}
  stored |= {'x.bias': bias(0), 'y.bias': bias(1), 'z.bias': bias(0)}
  assert kept_codes.idle_biases(entries, stored) == ['x.bias']
