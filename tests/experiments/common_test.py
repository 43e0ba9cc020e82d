"""What the scripts share."""

import types

from experiments import common


def test_calibration_rows_come_from_the_calibration_part_and_no_more_than_the_text_has(capsys):
  tokenizer = types.SimpleNamespace(encode=lambda text: [ord(letter) for letter in text])
  texts = types.SimpleNamespace(calibration=('a' * 999,), train=('b' * 500,))
  rows_BT = common.calibration_rows(tokenizer, texts, 10, 24)
  assert rows_BT.shape == (24, 10) and {*rows_BT.ravel()} <= {ord('a'), ord('\n')}
  assert not capsys.readouterr().err
  rows_BT = common.calibration_rows(tokenizer, texts, 10, 1000)
  assert rows_BT.shape == (151, 10) and {*rows_BT.ravel()} == {ord('a'), ord('b'), ord('\n')}
  assert 'the text has 151 rows of 10 tokens, not 1000' in capsys.readouterr().err
