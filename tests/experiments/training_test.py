"""What the training scripts share, where the scripts' own tests do not reach it."""

import math

import pytest

from experiments import training
from model.train.loop import FitResult

SETTINGS = training.Settings(steps=2, seq_len=8, batch_size=2, learning_rate=1e-3)
RECORDS = [{'step': step, 'tokens': 16} for step in (1, 2)]


def _result(update_s, program_bytes):
  return FitResult(model=None, records=RECORDS, update_s=update_s, program_bytes=program_bytes)


def test_metrics_of_a_run_that_was_timed():
  found = training.metrics(_result(0.5, 100), SETTINGS)
  assert found['tokens_per_s'].value == pytest.approx(16 / 0.5)
  assert found['program_peak_bytes'].value == 100


def test_a_run_that_had_nothing_left_to_do_names_no_speed():
  found = training.metrics(_result(math.nan, 0), SETTINGS)
  assert found['train_tokens'].value == 32
  assert not {'update_time', 'tokens_per_s', 'program_peak_bytes'} & set(found)
