"""Names of mixers: the config that each one makes, and names that say nothing."""

import dataclasses

import pytest

from experiments import mixers
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.moba import MobaConfig
from ops import patterns

HEADS = AttentionConfig(query_heads=2, kv_heads=1, head_width=8, rotates=False)
WINDOWED = dataclasses.replace(HEADS, window=8)


def test_names_of_what_attention_sees():
  moba = MobaConfig(**vars(HEADS), block=64, top_k=4)
  assert mixers.make('moba64x4', WINDOWED) == moba
  assert mixers.make('moba64x4+first', HEADS) == dataclasses.replace(moba, first=True)
  sparse = patterns.parse('window8+first2')
  assert mixers.make('window8+first2', WINDOWED) == dataclasses.replace(HEADS, sparse=sparse)


@pytest.mark.parametrize(
  'name, message',
  [
    ('moba0x4', 'block must be an integer of at least 1, not 0'),
    ('moba64x0', 'top_k must be an integer of at least 1, not 0'),
    ('moba64', "there is no mixer 'moba64'"),
  ],
)
def test_names_that_say_nothing_are_refused(name, message):
  with pytest.raises(ValueError, match=message):
    mixers.make(name, HEADS)
