"""Which codes are a weight of ours, and what is said of the others."""

import numpy as np
import pytest

from model.hf_quantized.codes import Codes

INPUTS, OUTPUTS = 64, 4


def _codes(rows, **fields):
  rng = np.random.default_rng(0)
  shape = (rows.max() + 1, OUTPUTS)
  common = {
    'values': rng.integers(0, 16, (INPUTS, OUTPUTS), np.uint8),
    'scales': rng.uniform(0.1, 0.2, shape).astype(np.float16),
    'zeros': rng.integers(0, 16, shape),
    'format': 'int4',
  }
  return Codes(rows=rows, **{**common, **fields})


@pytest.mark.parametrize('size, group', [(16, 16), (48, 16), (64, 64)])
def test_runs_of_inputs_become_groups_of_one_size(size, group):
  codes = _codes(np.arange(INPUTS) // size)
  w = codes.weight(np.float32)
  assert w.group_size == group
  np.testing.assert_array_equal(w.dense(), codes.dense())


def test_groups_may_come_in_any_order_and_more_than_once():
  codes = _codes(np.repeat([1, 0, 1, 2], 16))
  np.testing.assert_array_equal(codes.weight(np.float32).dense(), codes.dense())


def test_some_columns_in_another_order():
  codes = _codes(np.arange(INPUTS) // 16)
  np.testing.assert_array_equal(codes.columns(np.array([2, 0])).dense(), codes.dense()[:, [2, 0]])


@pytest.mark.parametrize(
  'rows, fields, reason',
  [
    (np.arange(INPUTS) % 2, {}, 'consecutive inputs have different scales (in runs of 1)'),
    (np.arange(INPUTS) // 8, {}, 'in runs of 8'),
    (np.zeros(INPUTS, int), {'zeros': np.full((1, 4), 256)}, 'zero point of 256 does not fit'),
    (np.zeros(INPUTS, int), {'zeros': np.full((1, 4), -1)}, 'zero point of -1 does not fit'),
    (np.zeros(INPUTS, int), {'format': None}, 'no format has these levels'),
  ],
)
def test_what_no_type_holds_has_a_reason(rows, fields, reason):
  found = _codes(rows, **fields).weight(np.float32)
  assert isinstance(found, str) and reason in found


def test_scales_that_are_not_finite_are_seen():
  rows = np.zeros(INPUTS, int)
  assert _codes(rows).finite
  assert not _codes(rows, scales=np.full((1, OUTPUTS), np.nan, np.float16)).finite
