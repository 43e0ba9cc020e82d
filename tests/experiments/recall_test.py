"""The recall task: what its texts are, and that right answers can only come from the text."""

import numpy as np
import pytest

from experiments import recall
from experiments.recall import Recall
from model.train.data import NO_LABEL

TASK = Recall(seq_len=64, batch_size=8, pairs=8, kinds=16)


def _rows(count=50):
  return [TASK.row(n) for n in range(count)]


def test_a_label_is_the_value_that_the_text_told_at_its_distance():
  for tokens, labels, distance in _rows():
    asked = np.flatnonzero(labels != NO_LABEL)
    assert len(asked) == TASK.pairs and (distance[asked] > 0).all()
    for t in asked:
      key, kinds = tokens[t] - TASK.kinds, TASK.kinds
      assert 0 <= key < kinds and 0 <= labels[t] < kinds
      tell = (3 + key) * kinds + np.arange(kinds)  # all that tell this key
      assert np.flatnonzero(np.isin(tokens, tell)).tolist() == [t - distance[t]]
      assert tokens[t - distance[t]] == tell[labels[t]]
    assert TASK.seq_len - 2 * TASK.pairs == ((tokens >= 2 * kinds) & (tokens < 3 * kinds)).sum()
  assert (TASK.batch(1).tokens_BT[0] == TASK.row(8)[0]).all()


def test_distances_are_near_and_far():
  distance = np.concatenate([d[d > 0] for _, _, d in _rows(200)])
  near, far = (distance < 8).mean(), (distance >= 32).mean()
  assert 0.2 < near < 0.6 and 0.1 < far < 0.4


def test_answers_are_counted_by_distance():
  task = Recall(seq_len=16, batch_size=4, pairs=2, kinds=4)
  _, labels, distance = (np.stack(a) for a in zip(*(task.row(n) for n in range(40))))
  asked = labels != NO_LABEL
  right = distance[asked] < 6
  found = recall.Found(right=right, distance=distance[asked], nll=np.zeros(right.shape))
  assert found.accuracy(high=6) == (1.0, int(right.sum()))
  assert found.accuracy(6)[0] == 0.0
  assert found.accuracy()[0] == pytest.approx(right.mean())


@pytest.mark.parametrize(
  'changes, message',
  [({'pairs': 17}, 'more than half of 64'), ({'kinds': 4}, 'there are 4')],
)
def test_tasks_that_cannot_be_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    Recall(**{**vars(TASK), **changes})
