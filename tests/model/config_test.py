"""Configs check their own invariants: each message gives the value and the fix."""

import dataclasses
import math

import pytest

from model.config import ModelConfig, from_json, to_json
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from ops.rope import RopeConfig

LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=4, kv_heads=2, head_width=8), ffn=FeedForwardConfig(width=24)
)
MODEL = ModelConfig(family='llama', vocab_size=40, width=32, layers=(LAYER,) * 2, max_positions=16)

MIXERS = {
  'no heads': ({'query_heads': 0}, 'query_heads must be an integer of at least 1, not 0'),
  'no key heads': ({'kv_heads': 0}, 'kv_heads must be an integer of at least 1, not 0'),
  'negative': ({'head_width': -8}, 'head_width must be an integer of at least 1, not -8'),
  'half a head': ({'query_heads': 4.0}, r'query_heads must be an integer of at least 1, not 4\.0'),
  'a truth': ({'kv_heads': True}, 'kv_heads must be an integer of at least 1, not True'),
  'uneven groups': ({'kv_heads': 3}, '4 query heads do not divide into 3 .* must be a multiple'),
  'more keys': ({'kv_heads': 8}, '4 query heads do not divide into 8'),
  'window': ({'window': 0}, 'a window holds at least one key, not 0; None'),
  'wide rotation': ({'rotary_width': 10}, 'within 1 and the head width 8, not 10; None rotates'),
  'no rotation': ({'rotary_width': 0}, 'within 1 and the head width 8, not 0'),
  'scale': ({'query_scale': 0.0}, r'query_scale must be a positive number, not 0\.0'),
  'cap': ({'softcap': math.nan}, 'softcap must be a positive number, not nan'),
  'a rope that nothing reads': (
    {'rotates': False, 'rope': RopeConfig()},
    'does not rotate has no rope or rotary_width of its own',
  ),
  'norm': ({'qk_norm_over': 'heads'}, "qk_norm_over 'heads' is not one of head, all"),
}
FFNS = {
  'no width': ({'width': 0}, 'width of a feed-forward network must be an integer of at least 1'),
  'activation': (
    {'activation': 'gelu_new'},
    "'gelu_new' is not one of silu, gelu, gelu_tanh, relu",
  ),
  'limit': ({'limit': 0.0}, r'limit must be a positive number, not 0\.0'),
  'no gate': (
    {'gated': False, 'up_offset': 1.0},
    r'limit None and up_offset 1\.0 are those of a g',
  ),
}
MODELS = {
  'vocabulary': ({'vocab_size': 0}, 'vocab_size must be an integer of at least 1, not 0'),
  'width': ({'width': 0}, 'width must be an integer of at least 1, not 0'),
  'positions': ({'max_positions': -1}, 'max_positions must be an integer of at least 1, not -1'),
  'layers': ({'layers': ()}, 'at least one layer'),
  'norm': ({'norm': 'batch'}, "norm 'batch' is not one of rms, layer"),
  'eps': ({'norm_eps': -1e-5}, 'norm_eps must be a number of at least 0, not -1e-05'),
  'embedding scale': ({'embedding_scale': 0.0}, 'embedding_scale must be a positive number'),
  'logit divisor': ({'logit_divisor': 0.0}, 'logit_divisor must be a positive number'),
  'cap': ({'logit_softcap': -30.0}, r'logit_softcap must be a positive number, not -30\.0'),
  'odd rotation': (
    {'layers': (LAYER, LAYER.with_mixer(head_width=7))},
    'layer 1 rotates 7 elements of a head; choose an even head_width or rotary_width',
  ),
}


@pytest.mark.parametrize('case', MIXERS)
def test_heads_that_make_no_sense_are_refused(case):
  changes, message = MIXERS[case]
  with pytest.raises(ValueError, match=message):
    LAYER.with_mixer(**changes)


@pytest.mark.parametrize('case', FFNS)
def test_a_feed_forward_network_that_makes_no_sense_is_refused(case):
  changes, message = FFNS[case]
  with pytest.raises(ValueError, match=message):
    LAYER.with_ffn(**changes)


def test_each_sub_layer_has_its_place():
  with pytest.raises(ValueError, match='mixer must be a MixerConfig, not FeedForwardConfig'):
    LayerConfig(mixer=LAYER.ffn, ffn=LAYER.ffn)
  with pytest.raises(ValueError, match='ffn must be a FfnConfig, not AttentionConfig'):
    LayerConfig(mixer=LAYER.mixer, ffn=LAYER.mixer)
  with pytest.raises(ValueError, match='residual_scale must be a positive number, not -1'):
    dataclasses.replace(LAYER, residual_scale=-1)


@pytest.mark.parametrize('case', MODELS)
def test_a_model_that_makes_no_sense_is_refused(case):
  changes, message = MODELS[case]
  with pytest.raises(ValueError, match=message):
    MODEL.replace(**changes)


def test_heads_may_be_odd_where_nothing_rotates_or_a_part_does():
  odd = LAYER.with_mixer(head_width=7)
  assert MODEL.replace(layers=(odd,), rope=None).layers == (odd,)
  part = odd.with_mixer(rotary_width=6)
  assert MODEL.replace(layers=(part,)).layers == (part,)


def test_layers_of_different_widths_survive_json():
  other = LAYER.with_mixer(query_heads=2, kv_heads=1, window=3).with_ffn(width=7)
  config = MODEL.replace(
    layers=(LAYER, other), rope=RopeConfig(theta=500.0), eos_ids=(2, 3), pad_id=1
  )
  assert from_json(to_json(config)) == config


def test_json_names_the_kinds_and_refuses_others():
  data = to_json(MODEL)
  assert data['layers'][0]['mixer'] == {'kind': 'attention', **dataclasses.asdict(LAYER.mixer)}
  assert data['layers'][1]['ffn']['kind'] == 'dense'
  data['layers'][1]['ffn']['kind'] = 'sparse'
  with pytest.raises(ValueError, match="knows no 'sparse'; the kinds are dense"):
    from_json(data)


# A layer as versions up to November 2026 wrote it.
FLAT = {
  'query_heads': 4,
  'kv_heads': 2,
  'head_width': 16,
  'ffn_width': 160,
  'activation': 'gelu_tanh',
  'gated': False,
  'window': 32,
  'rotary_width': 8,
  'query_scale': 0.25,
  'attention_softcap': 50.0,
  'qkv_bias': True,
  'output_bias': True,
  'mlp_bias': True,
  'qk_norm': True,
  'post_norms': True,
  'parallel': True,
}


def test_folders_of_earlier_versions_are_read():
  heads = {key: FLAT[key] for key in ('query_heads', 'kv_heads', 'head_width')}
  data = {**to_json(MODEL), 'layers': [FLAT, {**heads, 'ffn_width': 160}]}
  full, short = from_json(data).layers
  assert full == LayerConfig(
    mixer=AttentionConfig(
      **heads,
      window=32,
      rotary_width=8,
      query_scale=0.25,
      softcap=50.0,
      qkv_bias=True,
      output_bias=True,
      qk_norm=True,
    ),
    ffn=FeedForwardConfig(width=160, activation='gelu_tanh', gated=False, bias=True),
    post_norms=True,
    parallel=True,
  )
  assert short == LayerConfig(mixer=AttentionConfig(**heads), ffn=FeedForwardConfig(width=160))
  with pytest.raises(TypeError, match='unexpected'):  # as for a field that a newer version adds
    from_json({**data, 'layers': [{**FLAT, 'experts': 8}]})
