"""Folders that are written, as transformers loads them with the package compressed-tensors.

Slow, because each case compiles a model. transformers widens the layers on the first call, or while
it loads where `dequantize` is set: 5.24 has no zero points for packed layers otherwise, and makes
bfloat16 of fours whatever the dtype of the model. It rounds inputs by amax / 127.5 and to -128,
where vLLM and Lissom have amax / 127 and -127; so their products are compared without rounding.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from model import compressed_tensors
from model.transformer import parameters
from ops import quantized
from ops.activations import ActivationQuantized

pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore:You passed .quantization_config'),  # is how it is said
]
LOGIT_TOLERANCE = 1e-4  # of float32 sums in another order; logits are of order 1
BFLOAT16_TOLERANCE = 0.03  # of weights that are rounded to 8 bits
TOKENS = np.random.default_rng(1).integers(0, 99, (2, 16))
EXPERTS = {'num_experts_per_tok': 2, 'moe_intermediate_size': 32}
LATENT = {
  'n_routed_experts': 4,
  'n_shared_experts': 1,
  'first_k_dense_replace': 1,
  'num_key_value_heads': 4,
  'kv_lora_rank': 32,
  'q_lora_rank': 32,
  'qk_nope_head_dim': 16,
  'qk_rope_head_dim': 16,
  'v_head_dim': 16,
  **EXPERTS,
}
FAMILIES = {
  'llama': {'tie_word_embeddings': True},
  'mistral': {'sliding_window': None},
  'qwen2': {},
  'qwen3': {'head_dim': 32},
  'gemma2': {'head_dim': 32, 'query_pre_attn_scalar': 32, 'sliding_window': 8},
  'gemma3_text': {'head_dim': 32, 'query_pre_attn_scalar': 32, 'sliding_window': 8},
  'olmo2': {},
  'granite': {},
  'smollm3': {},
  'phi3': {},
  'gpt_neox': {},
  'mixtral': {'num_local_experts': 4, 'num_experts_per_tok': 2},
  'qwen2_moe': {'num_experts': 4, 'shared_expert_intermediate_size': 64, **EXPERTS},
  'qwen3_moe': {'num_experts': 4, 'head_dim': 32, **EXPERTS},
  'olmoe': {'num_experts': 4, 'num_experts_per_tok': 2},
  'granitemoe': {'num_local_experts': 4, 'num_experts_per_tok': 2},
  'qwen3_next': {
    'num_experts': 4,
    'head_dim': 32,
    'shared_expert_intermediate_size': 64,
    'linear_num_key_heads': 2,
    'linear_num_value_heads': 4,
    'linear_key_head_dim': 16,
    'linear_value_head_dim': 16,
    'layer_types': ['full_attention', 'linear_attention'],
    **EXPERTS,
  },
  'gpt_oss': {'num_local_experts': 4, 'num_experts_per_tok': 2, 'head_dim': 32},
  'deepseek_v2': {'topk_method': 'greedy', **LATENT},
  'deepseek_v3': {'n_group': 2, 'topk_group': 1, **LATENT},
}


def _logits(folder, dequantize):
  config = transformers.CompressedTensorsConfig(dequantize=True) if dequantize else None
  options = {} if config is None else {'quantization_config': config}
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True, **options
  )
  assert not any(info.values()), info
  for module in model.modules():
    module.quantization_enabled = False
  with torch.no_grad():
    return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def _without_rounding(model):
  for param in parameters(model).values():
    w = param.get_value()
    if isinstance(w, ActivationQuantized):
      param.set_value(w.values)
  return model


def _check(model, folder, dequantize=False, tolerance=LOGIT_TOLERANCE):
  compressed_tensors.write(folder, model, None)
  theirs = _logits(folder, dequantize)
  ours = np.asarray(_without_rounding(model)(jnp.asarray(TOKENS)))
  np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize('family', FAMILIES)
def test_each_family_in_int4(family, tiny_model, random_codes, tmp_path):
  weight = lambda rng, path, shape: random_codes(rng, shape, 'int4', 32)
  _check(tiny_model(family, weight, **FAMILIES[family]), tmp_path / 'm')


@pytest.mark.parametrize(
  'form, dequantize, tolerance',
  [
    ({'format': 'int4', 'group_size': 32, 'symmetric': False}, True, LOGIT_TOLERANCE),
    ({'format': 'int4', 'group_size': -1}, False, LOGIT_TOLERANCE),
    ({'format': 'int8', 'group_size': -1}, False, LOGIT_TOLERANCE),
    ({'format': 'int3', 'group_size': 32}, False, LOGIT_TOLERANCE),
    ({'format': 'fp8_e4m3'}, False, LOGIT_TOLERANCE),
    ({'format': 'mxfp4'}, True, LOGIT_TOLERANCE),
    ({'format': 'mxfp8'}, True, LOGIT_TOLERANCE),
    ({'format': 'nvfp4'}, True, BFLOAT16_TOLERANCE),
  ],
)
def test_each_format(form, dequantize, tolerance, tiny_model, tmp_path):
  def weight(rng, path, shape):
    return quantized.quantize(jnp.asarray(0.3 * rng.standard_normal(shape), 'float32'), **form)

  _check(tiny_model('llama', weight), tmp_path / 'm', dequantize, tolerance)


@pytest.mark.parametrize('static', [False, True])
def test_layers_that_round_their_inputs(static, tiny_model, random_codes, tmp_path):
  scale = jnp.float32(0.05) if static else None
  weight = lambda rng, path, shape: ActivationQuantized(random_codes(rng, shape, 'int8'), scale, 8)
  _check(tiny_model('llama', weight), tmp_path / 'm')
