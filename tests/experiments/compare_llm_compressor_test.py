"""Which settings of the comparison fit a model's widths."""

import pytest
from flax import nnx

from experiments import compare_llm_compressor as compare
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer


def _model(width):
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=2, head_width=width // 2),
    ffn=FeedForwardConfig(width=256),
  )
  config = ModelConfig(family='llama', vocab_size=8, width=width, layers=(layer,), max_positions=16)
  return Transformer(config, rngs=nnx.Rngs(0))


def test_groups_that_do_not_divide_are_left_out_or_refused():
  narrow = compare.settings_that_fit(_model(192), None)  # 128 does not divide 192
  assert set(compare.SETTINGS) - set(narrow) == {
    name for name in compare.SETTINGS if name.endswith('_g128')
  }
  assert compare.settings_that_fit(_model(256), None) == list(compare.SETTINGS)
  assert compare.settings_that_fit(_model(192), ['rtn_w4_g64']) == ['rtn_w4_g64']
  with pytest.raises(ValueError, match='128'):
    compare.settings_that_fit(_model(192), ['rtn_w4_g64', 'gptq_w4_g128'])


def test_a_setting_asks_both_sides_for_the_same():
  peer, ours = compare.SETTINGS['rtn_w3_g64']
  assert peer == {'method': 'rtn', 'bits': 3, 'group_size': 64, 'symmetric': True}
  assert ours == {'round_to_nearest': {'format': 'int3', 'group_size': 64, 'symmetric': True}}
  peer, ours = compare.SETTINGS['awq_w4_g64']
  assert peer == {'method': 'awq', 'bits': 4, 'group_size': 64, 'symmetric': False}
  assert ours == {'awq': {'format': 'int4', 'group_size': 64, 'symmetric': False}}
