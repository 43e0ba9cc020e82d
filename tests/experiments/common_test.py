"""What the scripts share."""

import types

from experiments import common


def test_calibration_rows_come_from_the_calibration_part_and_are_no_more_than_the_text_has():
  tokenizer = types.SimpleNamespace(encode=lambda text: [ord(letter) for letter in text])
  texts = types.SimpleNamespace(calibration=('a' * 999,), train=('b' * 500,))
  rows_BT = common.calibration_rows(tokenizer, texts, 10, 24)
  assert rows_BT.shape == (24, 10) and (rows_BT == ord('a')).all()
  rows_BT = common.calibration_rows(tokenizer, texts, 10, 1000)
  assert rows_BT.shape == (149, 10) and {*rows_BT.ravel()} == {ord('a'), ord('b')}
  with_bos_BT = common.calibration_rows(tokenizer, texts, 10, 24, bos_id=7)
  assert (with_bos_BT[:, 0] == 7).all()
  assert (with_bos_BT[:, 1:] == common.calibration_rows(tokenizer, texts, 9, 24)).all()
