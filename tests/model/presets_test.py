"""Tests the published counts, and counts by Hugging Face of the same shapes on the meta device."""

import collections

import pytest
import torch
import transformers

from model import hf_names, presets
from model.config import from_json, to_json
from model.eval import cost
from model.layers.mixers.latent import LatentConfig

MODEL_CLASSES = {
  'deepseek_v2': (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
  'deepseek_v3': (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
  'gemma2': (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
  'gemma3_text': (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
  'gpt2': (transformers.GPT2Config, transformers.GPT2LMHeadModel),
  'gpt_neox': (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
  'granite': (transformers.GraniteConfig, transformers.GraniteForCausalLM),
  'llama': (transformers.LlamaConfig, transformers.LlamaForCausalLM),
  'mistral': (transformers.MistralConfig, transformers.MistralForCausalLM),
  'olmo2': (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
  'olmoe': (transformers.OlmoeConfig, transformers.OlmoeForCausalLM),
  'phi3': (transformers.Phi3Config, transformers.Phi3ForCausalLM),
  'qwen3': (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
  'qwen3_next': (transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM),
  'smollm3': (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
}


# What `_hugging_face_count` gives by itself.
OTHERS = ('vocab_size', 'tie_word_embeddings', 'bos_token_id', 'eos_token_id', 'pad_token_id')


def _hugging_face_shape(config):
  if config.family == 'qwen3_next':
    keys = hf_names.config_to_hf(config)  # which other tests compare
    return {key: keys[key] for key in keys if key not in OTHERS}
  layer = config.layers[0]
  if isinstance(layer.mixer, LatentConfig):
    # The config of a checkpoint, which other tests read and write.
    return hf_names.config_to_hf(config)
  if config.family == 'gpt2':
    return {
      'n_positions': config.max_positions,
      'n_embd': config.width,
      'n_layer': len(config.layers),
      'n_head': layer.mixer.query_heads,
      'n_inner': layer.ffn.width,
    }
  shape = {
    'hidden_size': config.width,
    'num_hidden_layers': len(config.layers),
    'num_attention_heads': layer.mixer.query_heads,
    'intermediate_size': layer.ffn.width,
    'max_position_embeddings': config.max_positions,
  }
  if config.family != 'gpt_neox':
    shape['num_key_value_heads'] = layer.mixer.kv_heads
  if config.family == 'olmoe':
    shape |= {
      'num_experts': layer.ffn.experts,
      'num_experts_per_tok': layer.ffn.router.choices,
    }
  elif config.family not in ('gpt_neox', 'phi3'):
    shape['head_dim'] = layer.mixer.head_width
  return shape


def _hugging_face_count(config):
  config_class, model_class = MODEL_CLASSES[config.family]
  tokens = {'pad_token_id': None, 'bos_token_id': None, 'eos_token_id': None}
  shape = _hugging_face_shape(config)
  with torch.device('meta'):
    common = {'vocab_size': config.vocab_size, 'tie_word_embeddings': config.tied}
    model = model_class(config_class(**common | shape | tokens))
  biases = [b for name, b in model.named_buffers() if name.endswith('e_score_correction_bias')]
  return sum(p.numel() for p in (*model.parameters(), *biases))  # shared parameters once


def test_no_preset_is_missing_from_the_table_of_published_counts():
  assert sorted(presets.PARAMETERS) == presets.names()


@pytest.mark.parametrize('name', presets.names())
@pytest.mark.quick(name=[name for name in presets.PARAMETERS if not name.startswith('tiny-')])
def test_the_published_count_is_matched(name):
  config = presets.preset(name)
  # Layers that are alike have as many parameters; each kind is built once or twice.
  kinds = collections.Counter(config.layers)
  count = lambda *layers: cost.parameters(config.replace(layers=layers)).total
  once = count(*kinds)
  more = ((n - 1) * (count(*kinds, kind) - once) for kind, n in kinds.items() if n > 1)
  assert once + sum(more) == presets.PARAMETERS[name]


@pytest.mark.parametrize('name', presets.names())
def test_hugging_face_counts_the_same(name):
  assert _hugging_face_count(presets.preset(name)) == presets.PARAMETERS[name]


def test_pythia_publishes_its_non_embedding_count_too():
  assert cost.parameters(presets.preset('pythia-70m')).non_embedding == 18_915_328


@pytest.mark.parametrize('name', presets.names())
def test_presets_survive_json(name):
  config = presets.preset(name)
  assert from_json(to_json(config)) == config


def test_traits_of_the_families():
  gemma, pythia = presets.preset('gemma-2-2b'), presets.preset('pythia-70m')
  assert [layer.mixer.window for layer in gemma.layers[:4]] == [4096, None, 4096, None]
  assert gemma.layers[0].mixer.query_scale == 1 / 16 and gemma.embedding_scale == 48.0
  assert pythia.layers[0].mixer.rotary_width == 16 and pythia.layers[0].parallel
  assert presets.preset('llama-3.1-8b').rope.factor == 8.0
  assert presets.preset('gpt2').rope is None


@pytest.mark.parametrize(
  ('wrong', 'near'), [('llama3.1-8b', 'llama-3.1-8b'), ('GPT-2', 'gpt2'), ('qwen3', 'qwen3-0.6b')]
)
def test_an_unknown_name_lists_the_nearest(wrong, near):
  with pytest.raises(ValueError, match='did you mean') as error:
    presets.preset(wrong)
  assert near in str(error.value)


def test_a_name_near_none_lists_all_presets():
  with pytest.raises(ValueError, match='tinyllama'):
    presets.preset('????')
