"""The config mappings and name tables, without any weights."""

import dataclasses

import numpy as np
import pytest
import transformers

from model import hf_names, presets
from model.config import ModelConfig
from model.hf_names import rope
from model.hf_names.family import DEPTHWISE, INTERLEAVED, PAIRED, PLAIN, TRANSPOSE, Codec, Heads
from ops.rope import RopeConfig

CONFIG_CLASSES = {
  'llama': transformers.LlamaConfig,
  'mistral': transformers.MistralConfig,
  'mixtral': transformers.MixtralConfig,
  'qwen2': transformers.Qwen2Config,
  'qwen3': transformers.Qwen3Config,
  'gemma2': transformers.Gemma2Config,
  'gemma3_text': transformers.Gemma3TextConfig,
  'smollm3': transformers.SmolLM3Config,
  'olmo2': transformers.Olmo2Config,
  'granite': transformers.GraniteConfig,
  'phi3': transformers.Phi3Config,
  'gpt2': transformers.GPT2Config,
  'gpt_neox': transformers.GPTNeoXConfig,
  'qwen2_moe': transformers.Qwen2MoeConfig,
  'qwen3_moe': transformers.Qwen3MoeConfig,
  'qwen3_next': transformers.Qwen3NextConfig,
  'olmoe': transformers.OlmoeConfig,
  'granitemoe': transformers.GraniteMoeConfig,
  'granitemoeshared': transformers.GraniteMoeSharedConfig,
  'gpt_oss': transformers.GptOssConfig,
  'deepseek_v2': transformers.DeepseekV2Config,
  'deepseek_v3': transformers.DeepseekV3Config,
}
HEADS = Heads(2, 2)
LLAMA3 = {
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}


# What is written otherwise than it is by default: no layers have windows, and none predict further.
UNLIKE = ('max_window_layers', 'sliding_window', 'num_nextn_predict_layers')


def test_every_family_is_compared_with_its_class():
  assert CONFIG_CLASSES.keys() == hf_names.FAMILIES.keys()


@pytest.mark.parametrize('family', CONFIG_CLASSES)
def test_absent_keys_take_the_defaults_of_transformers(family):
  full = CONFIG_CLASSES[family]().to_dict()
  if full.get('num_experts_per_tok', 0) is None:  # DeepSeek-V2, with which no model can be made
    del full['num_experts_per_tok']
  assert hf_names.config_from_hf({'model_type': family}) == hf_names.config_from_hf(full)


@pytest.mark.parametrize('family', CONFIG_CLASSES)
def test_transformers_understands_what_is_written(family):
  config = hf_names.config_from_hf({'model_type': family})
  written = hf_names.config_to_hf(config)
  theirs = CONFIG_CLASSES[family].from_dict(dict(written))
  assert hf_names.config_from_hf(theirs.to_dict()) == config
  defaults = CONFIG_CLASSES[family]()
  assert theirs.architectures == [hf_names.FAMILIES[family].architecture]
  for key, value in written.items():
    if key not in ('architectures', 'model_type', 'pad_token_id', 'rope_scaling', 'rope_theta'):
      default = getattr(defaults, key, value)
      if not isinstance(default, dict) and key not in UNLIKE:
        assert default in (value, None), key


@pytest.mark.parametrize('name', presets.names())
def test_presets_survive_config_json(name):
  config = presets.preset(name)
  again = hf_names.config_from_hf(hf_names.config_to_hf(config))
  assert hf_names.config_to_hf(again) == hf_names.config_to_hf(config)
  assert again.layers[0].mixer.units == config.layers[0].mixer.units and again.rope == config.rope


@pytest.mark.parametrize(
  'keys',
  [
    {'rope_theta': 5e5, 'rope_scaling': {'type': 'llama3', **LLAMA3}},
    {'rope_theta': 5e5, 'rope_scaling': {'rope_type': 'llama3', **LLAMA3}},
    {'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 5e5, **LLAMA3}},
    {
      'rope_theta': 5e5,
      'rope_scaling': None,
      'rope_parameters': {'rope_type': 'llama3', **LLAMA3},
    },
  ],
)
def test_both_spellings_of_rope_mean_the_same(keys):
  config = hf_names.config_from_hf({'model_type': 'llama', **keys})
  assert config.rope == RopeConfig(
    theta=5e5,
    kind='llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=8192,
  )


def test_both_spellings_of_two_ropes_mean_the_same():
  older = {
    'rope_theta': 5e5,
    'rope_local_base_freq': 2e4,
    'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
    'sliding_window_pattern': 2,
  }
  newer = {
    'rope_parameters': {
      'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 5e5},
      'sliding_attention': {'rope_type': 'default', 'rope_theta': 2e4},
    },
    'layer_types': ['sliding_attention', 'full_attention'] * 13,
  }
  read = lambda keys: hf_names.config_from_hf({'model_type': 'gemma3_text', **keys})
  assert read(older) == read(newer)
  theirs = transformers.Gemma3TextConfig(**older).to_dict()
  assert read(theirs) == read(newer)
  assert read(older).rope == RopeConfig(theta=5e5, kind='linear', factor=8.0)
  own = [layer.mixer.rope for layer in read(older).layers[:4]]
  assert own == [RopeConfig(theta=2e4), None] * 2


def test_pythia_keys_of_older_versions():
  hf = {'model_type': 'gpt_neox', 'rotary_pct': 0.5, 'rotary_emb_base': 5000}
  config = hf_names.config_from_hf(
    {**hf, 'hidden_size': 64, 'num_attention_heads': 4, 'num_hidden_layers': 1}
  )
  assert config.rope.theta == 5000.0 and config.layers[0].mixer.rotary_width == 8


@pytest.mark.parametrize('key', ['num_local_experts', 'num_experts', 'n_routed_experts'])
def test_the_number_of_experts_has_three_names(key):
  for family in ('mixtral', 'qwen3_moe', 'olmoe', 'gpt_oss'):
    config = hf_names.config_from_hf({'model_type': family, key: 17})
    assert {layer.ffn.experts for layer in config.layers} == {17}


def test_yarn_without_an_original_length_uses_the_maximum():
  scaling = {'type': 'yarn', 'factor': 4.0}
  hf = {'model_type': 'qwen2', 'max_position_embeddings': 512, 'rope_scaling': scaling}
  assert hf_names.config_from_hf(hf).rope.original_max_positions == 512


@pytest.mark.parametrize(
  ('family', 'keys', 'message'),
  [
    ('phi3', {'rope_scaling': {'type': 'longrope'}}, "'longrope'.*supported: default$"),
    ('llama', {'rope_scaling': {'type': 'su'}}, "'su'.*supported: default, linear, dynamic"),
    ('llama', {'rope_scaling': {'type': 'linear'}}, "'linear' in config.json lacks factor"),
    ('llama', {'rope_scaling': {'type': 'yarn'}}, "'yarn' in config.json lacks factor"),
    ('llama', {'rope_scaling': {'type': 'llama3', 'factor': 2}}, 'lacks low_freq_factor, high'),
    ('llama', {'rope_parameters': {'full_attention': {}}}, 'one dictionary for all layers'),
    ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor = 0.5'),
    ('phi3', {'partial_rotary_factor': 0.01}, 'rotates 0 dimensions'),
    ('llama', {'hidden_act': 'xielu'}, "hidden_act = 'xielu'.*supported: silu"),
    ('llama', {'hidden_size': '64'}, "hidden_size in config.json must be an integer, not '64'"),
    ('llama', {'hidden_size': True}, 'hidden_size .* must be an integer'),
    ('llama', {'num_attention_heads': 0}, 'num_attention_heads .* at least 1'),
    ('llama', {'num_attention_heads': 33}, 'no multiple of num_attention_heads 33'),
    ('llama', {'num_key_value_heads': 5}, '32 query heads do not divide into 5'),
    ('llama', {'tie_word_embeddings': None}, 'tie_word_embeddings .* true or false'),
    ('llama', {'eos_token_id': ['</s>']}, "'</s>' is not"),
    ('llama', {'quantization_config': {'quant_method': 'gptq'}}, r'\(gptq\).*already quantized'),
    ('mistral', {'layer_types': ['full_attention'] * 32}, 'contradicts sliding_window'),
    ('qwen2', {'layer_types': ['sliding_attention'] * 32}, 'no sliding_window is set'),
    ('qwen2', {'layer_types': ['linear_attention'] * 32}, 'supported: full_attention, sliding'),
    ('qwen3', {'layer_types': ['full_attention']}, '1 entries, but there are 32 layers'),
    ('gemma2', {'use_bidirectional_attention': True}, 'use_bidirectional_attention = True'),
    ('gemma3_text', {'use_bidirectional_attention': True}, 'use_bidirectional_attention = True'),
    ('gemma3_text', {'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping = 50.0'),
    ('gemma3_text', {'rope_scaling': {'rope_type': 'yarn', 'factor': 2}}, "'yarn'.*: default, lin"),
    ('gemma3_text', {'rope_parameters': {'rope_theta': 1e4}}, 'must have full_attention and slid'),
    (
      'gemma3_text',
      {'rope_parameters': {'sliding_attention': {'rope_type': 'linear', 'factor': 2}}},
      "'linear'.*supported: default$",
    ),
    ('gemma3_text', {'sliding_window': None}, 'no sliding_window is set'),
    ('smollm3', {'no_rope_layers': [1, 0]}, 'no_rope_layers .* 2 entries, but there are 36 layers'),
    ('smollm3', {'no_rope_layers': [2] * 36}, 'no_rope_layers .* list of 0 and 1'),
    ('smollm3', {'layer_types': ['sliding_attention'] * 36}, 'set use_sliding_window to true'),
    ('granite', {'logits_scaling': 0}, 'logits_scaling .* must be above 0'),
    ('gpt2', {'add_cross_attention': True}, 'add_cross_attention = True'),
    ('gpt2', {'n_head': 11}, 'n_embd 768 .* no multiple of n_head 11'),
    ('lama', {}, r"'lama' is not supported; supported: deepseek_v2, .*did you mean llama"),
    ('ministral', {}, 'did you mean mistral'),
    ('mixtral', {'num_experts_per_tok': 9}, 'cannot choose 9 experts of 8'),
    ('mixtral', {'num_local_experts': 0}, 'num_local_experts .* at least 1'),
    ('mixtral', {'norm_topk_prob': False}, 'norm_topk_prob = False'),
    ('qwen3_moe', {'num_experts': 4}, 'num_experts_per_tok .* cannot choose 8 experts of 4'),
    ('qwen3_moe', {'num_experts': 8, 'n_routed_experts': 9}, 'num_experts = 8, n_routed_exp.* = 9'),
    ('qwen2_moe', {'scoring_func': 'sigmoid'}, "scoring_func = 'sigmoid'"),
    ('qwen2_moe', {'mlp_only_layers': 3}, 'mlp_only_layers .* numbers of layers, not 3'),
    (
      'qwen3_next',
      {'layer_types': ['sliding_attention'] * 48},
      'supported: full_attention, linear',
    ),
    ('qwen3_next', {'layer_types': ['full_attention']}, '1 entries, but there are 48 layers'),
    ('qwen3_next', {'hidden_act': 'gelu'}, "hidden_act = 'gelu' .* supported: silu"),
    ('qwen3_next', {'linear_num_value_heads': 24}, '24 value heads do not divide into 16 key'),
    ('olmoe', {'routed_scaling_factor': 2.5}, 'routed_scaling_factor = 2.5'),
    ('olmoe', {'clip_qkv': 8.0}, 'clip_qkv = 8.0'),
    ('olmoe', {'head_dim': 64}, 'head_dim is 64 for 16 heads and a hidden_size of 2048'),
    ('gpt_oss', {'swiglu_alpha': 1.0}, 'swiglu_alpha = 1.0'),
    ('gpt_oss', {'quantization_config': {'quant_method': 'gptq'}}, r'\(gptq\).*already quantized'),
    ('mixtral', {'quantization_config': {'quant_method': 'mxfp4'}}, r'\(mxfp4\).*already quant'),
    ('granitemoe', {'residual_multiplier': 0}, 'residual_multiplier .* must be above 0, not 0.0'),
  ],
)
def test_what_cannot_be_computed_is_named(family, keys, message):
  with pytest.raises(ValueError, match=message):
    hf_names.config_from_hf({'model_type': family, **keys})


def test_a_config_without_model_type_is_refused():
  with pytest.raises(ValueError, match='no model_type; supported: deepseek_v2'):
    hf_names.config_from_hf({})


def _config(family, **changes) -> ModelConfig:
  sizes = {'vocab_size': 99, 'num_hidden_layers': 3, 'n_layer': 3}
  return hf_names.config_from_hf({'model_type': family, **sizes}).replace(**changes)


def _with_layer(family, index, *, mixer=None, ffn=None, **changes) -> ModelConfig:
  config = _config(family)
  layers = list(config.layers)
  layer = dataclasses.replace(layers[index], **changes)
  layers[index] = layer.with_mixer(**(mixer or {})).with_ffn(**(ffn or {}))
  return config.replace(layers=tuple(layers))


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (
      _with_layer('llama', 1, ffn={'width': 32}),
      r'layers 1: ffn\.width = 32 \(it would be 11008\)',
    ),
    (_with_layer('llama', 0, ffn={'width': 32}), r'layers 1, 2: ffn\.width = 11008'),
    (_with_layer('llama', 2, mixer={'window': 5}), r'layers 2: mixer\.window = 5'),
    (_with_layer('mistral', 2, mixer={'window': None}), r'layers 2: mixer\.window = None'),
    (_with_layer('gpt_neox', 1, parallel=False), 'layers 1: parallel'),
    (_with_layer('gpt2', 1, mixer={'query_scale': 0.3}), r'layers 1: mixer\.query_scale = 0\.3'),
    (_with_layer('gemma2', 0, mixer={'query_scale': 0.3}), 'query_scale'),
    (_with_layer('llama', 1, mixer={'rotates': False}), r'layers 1: mixer\.rotates = False'),
    (
      _with_layer('llama', 1, mixer={'rope': RopeConfig(theta=9.0)}),
      r'layers 1: mixer\.rope = Rop',
    ),
    (_with_layer('olmo2', 2, pre_norms=True), r'layers 2: pre_norms = True'),
    (_with_layer('gemma3_text', 1, mixer={'rope': None}), r'layers 1: mixer\.rope = None'),
    (_with_layer('qwen3_next', 1, mixer={'conv_width': 3}), r'layers 1: mixer\.conv_width = 3'),
    (_config('qwen3_next', norm_offset=0.0), r'norm_offset = 0\.0 \(it would be 1\.0\)'),
    (_config('llama', norm='layer'), r"norm = 'layer' \(it would be 'rms'\)"),
    (_config('llama', logit_softcap=3.0), r'logit_softcap = 3.0'),
    (_config('llama', head_bias=True), 'head_bias'),
    (_config('llama', rope=None), 'cannot describe learned positions'),
    (_config('llama', rope=RopeConfig(kind='ntk', factor=2.0)), "the rope kind 'ntk'"),
    (_config('phi3', rope=RopeConfig(kind='linear', factor=2.0)), "rope type 'linear'"),
    (_config('llama', width=4008), 'transformers reads a llama only where hidden_size'),
    (_config('gemma2', embedding_scale=2.0), 'embedding_scale = 2.0'),
  ],
)
def test_what_config_json_cannot_say_is_named(config, message):
  with pytest.raises(ValueError, match=message):
    hf_names.config_to_hf(config)


def test_values_equal_to_their_defaults_are_no_difference():
  for changes in ({'query_scale': 128**-0.5}, {'rotary_width': 128}):
    hf_names.config_to_hf(_with_layer('llama', 1, mixer=changes))


@pytest.mark.parametrize('head_width', [16, 24, 80, 96, 100, 128])
def test_rotary_widths_survive_their_fraction(head_width):
  for width in range(2, head_width, 2):
    fraction = rope.rotary_fraction(head_width, width)
    assert int(head_width * fraction) == width == rope.rotary_width(head_width, fraction)
  assert rope.rotary_width(head_width, rope.rotary_fraction(head_width, None)) is None


def test_parameters_without_a_name_are_listed():
  with pytest.raises(
    ValueError, match=r'llama checkpoint has no names for 1 .*attention_post_norm'
  ):
    shapes = {'layers.0.attention_post_norm.scale': (4,)}
    hf_names.entries(hf_names.find('llama'), _config('llama'), shapes)


@pytest.mark.parametrize('codec', [PLAIN, TRANSPOSE])
def test_fused_parts_lie_one_after_the_other(codec, rng):
  parts = [rng.normal(size=(5, n)) for n in (4, 2, 2)]
  joined = codec.join(parts, HEADS)
  expected = np.concatenate(parts, 1)
  np.testing.assert_array_equal(joined, expected.T if codec.transpose else expected)
  assert codec.shape([p.shape for p in parts]) == joined.shape
  for part, back in zip(parts, codec.split(joined, [p.shape for p in parts], HEADS)):
    np.testing.assert_array_equal(part, back)


def test_interleaved_parts_alternate_head_by_head():
  # Two heads of width two: q0 q0 k0 k0 v0 v0 q1 q1 k1 k1 v1 v1.
  query, key, value = (np.arange(4) + 10 * part for part in (1, 2, 3))
  joined = INTERLEAVED.join([query, key, value], HEADS)
  assert joined.tolist() == [10, 11, 20, 21, 30, 31, 12, 13, 22, 23, 32, 33]
  back = INTERLEAVED.split(joined, [(4,)] * 3, HEADS)
  np.testing.assert_array_equal(back, [query, key, value])


def test_interleaved_parts_may_have_more_of_a_head_than_others():
  key, values = np.arange(2) + 10, np.arange(6) + 20
  joined = INTERLEAVED.join([key, values], HEADS)
  assert joined.tolist() == [10, 20, 21, 22, 11, 23, 24, 25]
  for part, back in zip((key, values), INTERLEAVED.split(joined, [(2,), (6,)], HEADS)):
    np.testing.assert_array_equal(part, back)


def test_kernels_of_channels_have_one_input_more():
  one, other = np.arange(6).reshape(3, 2), np.arange(3).reshape(3, 1) + 10
  joined = DEPTHWISE.join([one, other], HEADS)
  assert joined.tolist() == [[[0, 2, 4]], [[1, 3, 5]], [[10, 11, 12]]]
  assert joined.shape == DEPTHWISE.shape([one.shape, other.shape])
  for part, back in zip((one, other), DEPTHWISE.split(joined, [(3, 2), (3, 1)], HEADS)):
    np.testing.assert_array_equal(part, back)


def test_paired_rows_alternate_between_the_halves_of_a_head():
  # Two heads of width four; row n of theirs is written as n. Elements 0 and 2 of a head rotate
  # together in ours, 0 and 1 in theirs.
  ours_IO = np.arange(8)[None, :] + np.array([[0], [100]])
  theirs_OI = PAIRED.join([ours_IO], Heads(2, 4))
  assert theirs_OI[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
  np.testing.assert_array_equal(PAIRED.split(theirs_OI, [(2, 8)], Heads(2, 4))[0], ours_IO)
  bias = PAIRED.join([np.arange(8)], Heads(2, 4))
  assert bias.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_an_offset_is_theirs_alone():
  codec = Codec(offset=1.0)
  ours = np.array([0.25, -0.5], np.float16)
  (back,) = codec.split(codec.join([ours], HEADS), [(2,)], HEADS)
  assert codec.join([ours], HEADS).tolist() == [1.25, 0.5]
  assert back.tolist() == ours.tolist() and back.dtype == np.float16
