"""Families with experts against transformers on tiny random checkpoints, in each layout."""

import collections
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from model import hf, hf_names, kv_cache, transformer
from model.eval import cost

# Both compute in float32 and add in different orders; logits are of order 1.
LOGIT_TOLERANCE = 1e-4
VOCABULARY = 99
LENGTH = 20
DECODED = 4  # tokens that are decoded one by one after the others

TINY = {
  'vocab_size': VOCABULARY,
  'hidden_size': 64,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'pad_token_id': None,
  'num_experts_per_tok': 2,
}
QWEN = {**TINY, 'num_experts': 5, 'moe_intermediate_size': 24}
SLIDING = {'use_sliding_window': True, 'sliding_window': 6}
MULTIPLIERS = {
  'embedding_multiplier': 12.0,
  'attention_multiplier': 0.1,
  'residual_multiplier': 0.22,
  'logits_scaling': 6.0,
}
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 20.0,
  'factor': 4.0,
  'original_max_position_embeddings': 16,
  'beta_fast': 2.0,
  'beta_slow': 0.5,
  'truncate': False,
}
NEXT = {
  **QWEN,
  'num_hidden_layers': 4,
  'head_dim': 24,
  'shared_expert_intermediate_size': 40,
  'linear_num_key_heads': 2,
  'linear_num_value_heads': 6,
  'linear_key_head_dim': 12,
  'linear_value_head_dim': 8,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0, 'partial_rotary_factor': 0.25},
}
LATENT = {
  **{key: value for key, value in TINY.items() if key != 'num_key_value_heads'},
  'n_routed_experts': 8,
  'moe_intermediate_size': 24,
  'num_experts_per_tok': 3,
  'n_shared_experts': 2,
  'kv_lora_rank': 20,
  'q_lora_rank': 12,
  'qk_nope_head_dim': 10,
  'qk_rope_head_dim': 8,
  'v_head_dim': 14,
}
GROUPS = {'n_group': 4, 'topk_group': 2, 'routed_scaling_factor': 1.5}
CASES = {
  'mixtral': ('Mixtral', {**TINY, 'num_local_experts': 4, 'sliding_window': 6}),
  'qwen3_moe': ('Qwen3Moe', {**QWEN, **SLIDING, 'head_dim': 24, 'norm_topk_prob': True}),
  'qwen3_moe-dense': (
    'Qwen3Moe',
    {**QWEN, 'num_hidden_layers': 3, 'decoder_sparse_step': 2, 'tie_word_embeddings': True},
  ),
  'olmoe': ('Olmoe', {**TINY, 'num_experts': 6, 'num_experts_per_tok': 3}),
  'olmoe-tied': (
    'Olmoe',
    {
      **TINY,
      'num_experts': 4,
      'tie_word_embeddings': True,
      'norm_topk_prob': True,
      'attention_bias': True,
    },
  ),
  'qwen2_moe': ('Qwen2Moe', {**QWEN, **SLIDING, 'shared_expert_intermediate_size': 40}),
  'qwen2_moe-dense': (
    'Qwen2Moe',
    {
      **QWEN,
      'shared_expert_intermediate_size': 16,
      'num_hidden_layers': 3,
      'mlp_only_layers': [1],
      'qkv_bias': False,
      'norm_topk_prob': True,
      'tie_word_embeddings': True,
    },
  ),
  'granitemoe': ('GraniteMoe', {**TINY, **MULTIPLIERS, 'num_local_experts': 5}),
  'granitemoeshared': (
    'GraniteMoeShared',
    {
      **TINY,
      **MULTIPLIERS,
      'num_local_experts': 4,
      'shared_intermediate_size': 40,
      'attention_bias': True,
      'tie_word_embeddings': True,
    },
  ),
  'qwen3_next': ('Qwen3Next', NEXT),
  'qwen3_next-dense': (
    'Qwen3Next',
    {
      **NEXT,
      'num_hidden_layers': 2,
      'layer_types': ['full_attention', 'linear_attention'],
      'mlp_only_layers': [0],
      'linear_num_value_heads': 2,
      'linear_conv_kernel_dim': 3,
      'attention_bias': True,
      'norm_topk_prob': False,
      'tie_word_embeddings': True,
    },
  ),
  'deepseek_v2': (
    'DeepseekV2',
    {
      **LATENT,
      **GROUPS,
      'topk_method': 'group_limited_greedy',
      'num_hidden_layers': 3,
      'first_k_dense_replace': 1,
      'attention_bias': True,
      'rope_parameters': {**YARN, 'mscale': 0.7, 'mscale_all_dim': 0.9},
    },
  ),
  'deepseek_v2-lite': (
    'DeepseekV2',
    {**LATENT, 'q_lora_rank': None, 'topk_method': 'greedy', 'tie_word_embeddings': True},
  ),
  'deepseek_v3': (
    'DeepseekV3',
    {
      **LATENT,
      **GROUPS,
      'num_key_value_heads': 4,
      'first_k_dense_replace': 1,
      'rope_parameters': {**YARN, 'mscale': 1.0, 'mscale_all_dim': 1.0},
    },
  ),
  'gpt_oss': (
    'GptOss',
    {**TINY, 'num_local_experts': 5, 'head_dim': 24, 'sliding_window': 6, 'rope_parameters': YARN},
  ),
  'gpt_oss-tied': (
    'GptOss',
    {
      **TINY,
      'num_local_experts': 4,
      'head_dim': 16,
      'attention_bias': False,
      'swiglu_limit': 0.5,
      'layer_types': ['full_attention'] * 2,
      'tie_word_embeddings': True,
    },
  ),
}

# One of each family; the rest is slow.
QUICK = (
  'mixtral',
  'qwen3_moe',
  'olmoe',
  'qwen2_moe-dense',
  'granitemoeshared',
  'qwen3_next',
  'deepseek_v2',
  'deepseek_v3',
  'gpt_oss',
)


def _random_(model, seed=0):
  """Makes every parameter differ from its initial value, so that a forgotten term shows."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.dim() == 1:
        parameter.add_(0.3 * noise)
      else:
        parameter.copy_(0.15 * noise)
    for name, buffer in model.named_buffers():
      if name.endswith('e_score_correction_bias'):
        buffer.copy_(0.2 * torch.rand(buffer.shape, generator=generator))
  return model.eval()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """A function from a case to (folder, folder of the other layout, logits of transformers)."""

  @functools.cache
  def make(case):
    family, arguments = CASES[case]
    config = getattr(transformers, f'{family}Config')(**json.loads(json.dumps(arguments)))
    config._attn_implementation = 'eager'
    torch.manual_seed(0)  # of the initial values that stay within the others, such as decays
    model = _random_(transformers.AutoModelForCausalLM.from_config(config))
    folder, other = (tmp_path_factory.mktemp(f'{case}-{name}') for name in ('hub', 'memory'))
    model.save_pretrained(folder, save_original_format=True)
    model.save_pretrained(other, save_original_format=False)
    with torch.no_grad():
      return folder, other, model(torch.tensor(_tokens())).logits.numpy()

  return make


def _tokens():
  return np.random.default_rng(1).integers(0, VOCABULARY, (2, LENGTH))


def _arrays(model):
  return {
    path: np.asarray(param.get_value()) for path, param in transformer.parameters(model).items()
  }


def _assert_same(ours, others):
  assert ours.keys() == others.keys()
  for name, array in ours.items():
    assert array.dtype == others[name].dtype, name
    np.testing.assert_array_equal(array, others[name], err_msg=name)


def _at_once(model):
  graphdef, state = nnx.split(model)
  run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
  return np.asarray(run(state, jnp.asarray(_tokens(), jnp.int32)))


def _decoded(model):
  """The logits over a cache, those of the last few tokens one by one."""
  graphdef, state = nnx.split(model)
  tokens_BT = jnp.asarray(_tokens(), jnp.int32)
  positions_BT = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens_BT.shape)

  @jax.jit
  def step(state, tokens_BT, positions_BT, cache):
    model = nnx.merge(graphdef, state)
    x_BTD, cache = model.hidden(tokens_BT, positions_BT=positions_BT, cache=cache)
    return model.logits(x_BTD), cache

  cache, parts = kv_cache.init(model.config, 2, LENGTH), []
  first = LENGTH - DECODED
  for part in (slice(first), *(slice(t, t + 1) for t in range(first, LENGTH))):
    logits_BTV, cache = step(state, tokens_BT[:, part], positions_BT[:, part], cache)
    parts.append(logits_BTV)
  return np.concatenate(parts, 1)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.quick(case=QUICK)
def test_logits_match_transformers(case, checkpoint):
  folder, _, expected = checkpoint(case)
  found = _at_once(hf.load_pretrained(folder)[0])
  np.testing.assert_allclose(found, expected, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize(
  'case',
  ['qwen3_moe', 'olmoe', 'granitemoe', 'gpt_oss', 'qwen3_next', 'deepseek_v2', 'deepseek_v3'],
)
@pytest.mark.quick(case=('gpt_oss',))
def test_decoded_logits_match_transformers(case, checkpoint):
  folder, _, expected = checkpoint(case)
  found = _decoded(hf.load_pretrained(folder)[0])
  np.testing.assert_allclose(found, expected, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.quick(case=QUICK)
def test_both_layouts_are_read_and_that_of_the_hub_is_written(case, checkpoint, tmp_path):
  folder, other, expected = checkpoint(case)
  model, _ = hf.load_pretrained(folder)
  _assert_same(_arrays(hf.load_pretrained(other)[0]), _arrays(model))
  hf.save_pretrained(model, None, tmp_path / 'saved')
  stored, written = (load_file(f / 'model.safetensors') for f in (folder, tmp_path / 'saved'))
  _assert_same(written, stored)
  loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'saved', attn_implementation='eager', output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys']
  with torch.no_grad():
    logits = loaded.eval()(torch.tensor(_tokens())).logits.numpy()
  np.testing.assert_allclose(logits, expected, atol=LOGIT_TOLERANCE, rtol=0)


def test_layers_that_predict_further_tokens_are_left_out(checkpoint, tmp_path):
  folder = shutil.copytree(checkpoint('qwen3_next')[0], tmp_path / 'more')
  tensors = load_file(folder / 'model.safetensors')
  tensors |= {name: np.ones((3, 3), np.float32) for name in ('mtp.fc.weight', 'mtp.norm.weight')}
  save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
  found = _arrays(hf.load_pretrained(folder)[0])
  _assert_same(found, _arrays(hf.load_pretrained(checkpoint('qwen3_next')[0])[0]))


W3 = 'model.layers.1.block_sparse_moe.experts.2.w3.weight'


@pytest.mark.parametrize(
  ('layout', 'name', 'change', 'message'),
  [
    (0, W3, None, f'missing: {W3}'),
    (0, W3, lambda a: a[1:], f'misshapen: {W3} is .47, 64., not .48, 64.'),
    (1, 'model.layers.0.mlp.experts.down_proj', lambda a: a[:3], 'misshapen: .* not .4, 64, 48.'),
    (1, 'model.layers.0.mlp.experts.gate_up_proj', None, 'missing: .*0.mlp.experts.gate_up_proj'),
  ],
)
def test_experts_that_are_missing_or_misshapen_are_named(
  checkpoint, tmp_path, layout, name, change, message
):
  folder = shutil.copytree(checkpoint('mixtral')[layout], tmp_path / 'damaged')
  tensors = load_file(folder / 'model.safetensors')
  array = tensors.pop(name)
  if change is not None:
    tensors[name] = np.ascontiguousarray(change(array))
  save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
  with pytest.raises(ValueError, match=rf'\(1\):\n  {message}'):
    hf.load_pretrained(folder)


@pytest.mark.parametrize(
  ('family', 'keys', 'message'),
  [
    ('deepseek_v2', {'norm_topk_prob': True}, 'norm_topk_prob = True in config.json'),
    ('deepseek_v2', {'topk_method': 'noaux_tc'}, "topk_method = 'noaux_tc'"),
    ('deepseek_v2', {'attention_bias': True, 'q_lora_rank': None}, 'attention_bias in config.json'),
    ('deepseek_v2', {'num_key_value_heads': 8}, 'num_key_value_heads = 8'),
    ('deepseek_v2', {'moe_layer_freq': 2}, 'moe_layer_freq = 2'),
    ('deepseek_v3', {'rope_interleave': False}, 'rope_interleave = False'),
    ('deepseek_v3', {'scoring_func': 'softmax'}, "scoring_func = 'softmax'"),
    ('deepseek_v3', {'kv_lora_rank': 0}, 'kv_lora_rank in config.json must be at least 1'),
  ],
)
def test_what_the_families_with_latents_lack_is_refused(family, keys, message):
  with pytest.raises(ValueError, match=message):
    hf_names.config_from_hf({'model_type': family, **keys})


# The sizes in config.json on the hub that are not the defaults of transformers, and the published
# parameters, in total and met by a token, the embedding included.
PUBLISHED = {
  'Mixtral-8x7B': ('mixtral', {}, 46_702_792_704, 12_879_925_248),
  'Qwen1.5-MoE-A2.7B': ('qwen2_moe', {}, 14_315_784_192, 2_689_173_504),
  'Qwen3-30B-A3B': (
    'qwen3_moe',
    {'num_hidden_layers': 48, 'head_dim': 128, 'norm_topk_prob': True},
    30_532_122_624,
    3_353_032_704,
  ),
  'OLMoE-1B-7B': ('olmoe', {'intermediate_size': 1024}, 6_919_161_856, 1_282_017_280),
  'gpt-oss-20b': (
    'gpt_oss',
    {'num_hidden_layers': 24, 'num_local_experts': 32},
    20_914_757_184,
    4_187_440_704,
  ),
  'Qwen3-Next-80B-A3B': ('qwen3_next', {}, 79_674_391_296, 3_874_929_408),
  'gpt-oss-120b': ('gpt_oss', {}, 116_829_156_672, 5_711_982_912),
  'DeepSeek-V3': ('deepseek_v3', {}, 671_026_419_200, 37_552_297_472),
  'DeepSeek-V2-Lite': (
    'deepseek_v2',
    {
      'hidden_size': 2048,
      'intermediate_size': 10944,
      'moe_intermediate_size': 1408,
      'num_hidden_layers': 27,
      'num_attention_heads': 16,
      'num_experts_per_tok': 6,
      'q_lora_rank': None,
      'first_k_dense_replace': 1,
    },
    15_706_484_224,
    2_661_150_208,
  ),
  'granite-3.1-1b-a400m': (
    'granitemoe',
    {
      'vocab_size': 49155,
      'hidden_size': 1024,
      'intermediate_size': 512,
      'num_hidden_layers': 24,
      'num_attention_heads': 16,
      'num_key_value_heads': 8,
      'num_local_experts': 32,
      'num_experts_per_tok': 8,
      'tie_word_embeddings': True,
    },
    1_334_628_352,
    428_658_688,
  ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_parameters_to_the_unit(name):
  family, sizes, total, active = PUBLISHED[name]
  config = hf_names.config_from_hf({'model_type': family, **sizes})
  assert _counted(config, 'total') == total
  assert _counted(config, 'active') == active


def _counted(config, what):
  """One of the counts of `cost.parameters`; each kind of layer is built once or twice."""
  kinds = collections.Counter(config.layers)
  count = lambda *layers: getattr(cost.parameters(config.replace(layers=layers)), what)
  once = count(*kinds)
  return once + sum((n - 1) * (count(*kinds, kind) - once) for kind, n in kinds.items())
