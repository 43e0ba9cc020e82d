"""Every architecture against transformers: a tiny random model, written as a GGUF file."""

import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from model import hf, transformer
from model.gguf import architectures

# Both compute in float32 and add in different orders; logits are of order 1.
LOGIT_TOLERANCE = 1e-4
VOCABULARY = 99
LENGTH = 40
SHAPE = {
  'vocab_size': VOCABULARY,
  'hidden_size': 64,
  'intermediate_size': 96,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'pad_token_id': None,
}


def _rope(kind, **values):
  return {'rope_parameters': {'rope_type': kind, 'rope_theta': 500.0, **values}}


_LLAMA3 = _rope(
  'llama3',
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,  # puts wavelengths in all three bands
)
CASES = {
  'llama': ('Llama', {**SHAPE, 'rms_norm_eps': 1e-3}),
  'llama-tied-biases': (
    'Llama',
    {**SHAPE, 'tie_word_embeddings': True, 'attention_bias': True, 'mlp_bias': True},
  ),
  'llama-head-dim': ('Llama', {**SHAPE, 'head_dim': 24}),
  'llama-llama3': ('Llama', {**SHAPE, 'head_dim': 32, **_LLAMA3}),
  'llama-linear': ('Llama', {**SHAPE, **_rope('linear', factor=3.0)}),
  'mistral': ('Mistral', {**SHAPE, 'sliding_window': None}),
  'qwen2': ('Qwen2', {**SHAPE, 'tie_word_embeddings': True}),
  'qwen2-yarn': (
    'Qwen2',
    {**SHAPE, **_rope('yarn', factor=4.0, original_max_position_embeddings=16, beta_fast=4.0)},
  ),
  'qwen3': ('Qwen3', {**SHAPE, 'head_dim': 24}),
  'gemma2': (
    'Gemma2',
    {**SHAPE, 'head_dim': 24, 'query_pre_attn_scalar': 24, 'sliding_window': 8},
  ),
  'gemma3': (
    'Gemma3Text',
    {
      **SHAPE,
      'num_hidden_layers': 6,
      'head_dim': 24,
      'query_pre_attn_scalar': 24,
      'sliding_window': 8,
      'rope_parameters': {
        'full_attention': {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 1e6},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
      },
    },
  ),
  'smollm3': ('SmolLM3', {**SHAPE, 'num_hidden_layers': 4, **_rope('default')}),
  'olmo2': ('Olmo2', SHAPE),
  'granite': (
    'Granite',
    {
      **SHAPE,
      'embedding_multiplier': 3.0,
      'logits_scaling': 2.0,
      'residual_multiplier': 0.5,
      'attention_multiplier': 0.25,
    },
  ),
  'phi3-window': ('Phi3', {**SHAPE, 'sliding_window': 8}),
  'phi3-partial': ('Phi3', {**SHAPE, **_rope('default', partial_rotary_factor=0.75)}),
  'gpt2': (
    'GPT2',
    {'vocab_size': VOCABULARY, 'n_embd': 64, 'n_layer': 3, 'n_head': 4, 'n_positions': 48},
  ),
  'neox-parallel': ('GPTNeoX', {**SHAPE, **_rope('default', partial_rotary_factor=0.25)}),
  'neox-sequential': (
    'GPTNeoX',
    {
      **SHAPE,
      **_rope('default', partial_rotary_factor=1.0),
      'use_parallel_residual': False,
    },
  ),
}
# One of each architecture; the rest is slow.
QUICK = (
  'llama-tied-biases',
  'llama-llama3',
  'mistral',
  'qwen2-yarn',
  'qwen3',
  'gemma2',
  'gemma3',
  'smollm3',
  'olmo2',
  'granite',
  'phi3-partial',
  'gpt2',
  'neox-parallel',
)
# The converter writes no frequency base for a GPT-NeoX, and llama.cpp assumes this one.
for _case in ('neox-parallel', 'neox-sequential'):
  CASES[_case][1]['rope_parameters']['rope_theta'] = 10000.0


def _build(case, **changes):
  family, arguments = CASES[case]
  arguments = {**json.loads(json.dumps(arguments)), **changes}
  config = getattr(transformers, f'{family}Config')(**arguments)
  config._attn_implementation = 'eager'
  model = transformers.AutoModelForCausalLM.from_config(config)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():  # every parameter differs from its initial value
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.dim() == 1:
        parameter.add_(0.3 * noise)
      else:
        parameter.copy_(0.15 * noise)
  return model.eval()


def _tokens():
  return np.random.default_rng(1).integers(0, VOCABULARY, (2, LENGTH))


def _their_logits(model):
  with torch.no_grad():
    return model(torch.tensor(_tokens())).logits.float().numpy()


def _our_logits(model):
  graphdef, state = nnx.split(model)
  run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
  return np.asarray(run(state, jnp.asarray(_tokens(), jnp.int32)))


def test_every_architecture_has_a_case():
  names = {'GPTNeoX': 'gptneox', 'Mistral': 'llama', 'Gemma3Text': 'gemma3'}
  covered = {names.get(family, family.lower()) for family, _ in CASES.values()}
  assert covered == set(architectures.ARCHITECTURES)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.quick(case=QUICK)
def test_logits_equal_those_of_the_original(case, write_gguf, tmp_path):
  theirs = _build(case)
  ours, tokenizer = hf.load_pretrained(write_gguf(theirs, tmp_path / 'model.gguf'))
  assert tokenizer is None
  np.testing.assert_allclose(_our_logits(ours), _their_logits(theirs), atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize('case', ['llama-llama3', 'gemma2', 'qwen2-yarn', 'phi3-partial', 'gpt2'])
@pytest.mark.quick(case=('phi3-partial', 'gpt2'))
def test_a_model_is_saved_as_a_folder_that_transformers_reads(case, write_gguf, tmp_path):
  theirs = _build(case)
  ours, _ = hf.load_pretrained(write_gguf(theirs, tmp_path / 'model.gguf'))
  hf.save_pretrained(ours, None, tmp_path / 'folder')
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'folder', attn_implementation='eager'
  )
  np.testing.assert_allclose(_their_logits(again), _their_logits(theirs), atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize('kind', ['F16', 'BF16', 'Q8_0', 'Q5_1', 'Q5_0', 'Q4_1', 'Q4_0'])
def test_blocks_of_weights_are_dequantized(kind, write_gguf, tmp_path):
  theirs = _build('llama')
  path = write_gguf(theirs, tmp_path / 'model.gguf', kind=gguf.GGMLQuantizationType[kind])
  ours = transformer.parameters(hf.load_pretrained(path)[0])
  bits = {'F16': 11, 'BF16': 8}.get(kind) or int(kind[1]) - 1
  for name, row in (('gate', 'gate_proj'), ('down', 'down_proj')):
    weight_IO = np.asarray(ours[f'layers.1.ffn.{name}.weight'].get_value())
    exact_IO = theirs.state_dict()[f'model.layers.1.mlp.{row}.weight'].numpy().T
    assert weight_IO.dtype == np.float32
    error = np.abs(weight_IO - exact_IO).max() / np.abs(exact_IO).max()
    assert 2.0**-bits / 100 < error < 2.0**-bits  # a step of the type's grid, and not nothing


def test_dtype_is_that_of_the_parameters(write_gguf, tmp_path):
  path = write_gguf(_build('qwen2'), tmp_path / 'model.gguf')
  model, _ = hf.load_pretrained(path, jnp.bfloat16)
  exact, _ = hf.load_pretrained(path)
  rounded = transformer.parameters(model)
  for name, param in transformer.parameters(exact).items():
    np.testing.assert_array_equal(param.get_value().astype(jnp.bfloat16), rounded[name].get_value())


def test_a_llama_with_a_window_is_a_mistral(write_gguf, tmp_path):
  theirs = _build('mistral', sliding_window=8)
  path = write_gguf(theirs, tmp_path / 'model.gguf', attention__sliding_window=8)
  ours, _ = hf.load_pretrained(path)
  assert ours.config.family == 'mistral'
  np.testing.assert_allclose(_our_logits(ours), _their_logits(theirs), atol=LOGIT_TOLERANCE)


def test_a_folder_with_one_file_is_that_file(write_gguf, tmp_path):
  path = write_gguf(_build('llama'), tmp_path / 'a.gguf')
  assert hf.load_pretrained(tmp_path)[0].config == hf.load_pretrained(path)[0].config
  (tmp_path / 'b.gguf').write_bytes(path.read_bytes())
  with pytest.raises(ValueError, match=r'2 GGUF files; name one of them: a\.gguf, b\.gguf'):
    hf.load_pretrained(tmp_path)


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path):
  with pytest.raises(ValueError, match=r'there is no file .*absent\.gguf'):
    hf.load_pretrained(tmp_path / 'absent.gguf')


def test_tensors_are_compared_with_the_config(write_gguf, tmp_path):
  def change(tensors):
    del tensors['blk.1.ffn_up.weight']
    tensors['blk.0.attn_norm.weight'] = np.zeros(65, np.float32)
    tensors['blk.0.attn_sinks.weight'] = np.zeros(4, np.float32)

  path = write_gguf(_build('llama'), tmp_path / 'damaged.gguf', change=change)
  with pytest.raises(ValueError) as caught:
    hf.load_pretrained(path)
  for line in (
    'damaged.gguf',
    'missing: blk.1.ffn_up.weight (96, 64)',
    'misshapen: blk.0.attn_norm.weight is (65,), not (64,)',
    'unexpected: blk.0.attn_sinks.weight (4,)',
  ):
    assert line in str(caught.value)


def test_rope_factors_of_another_number_are_refused(write_gguf, tmp_path):
  def change(tensors):
    tensors['rope_freqs.weight'] = np.ones(9, np.float32)

  path = write_gguf(_build('llama'), tmp_path / 'model.gguf', change=change)
  with pytest.raises(ValueError, match=r'rope_freqs\.weight is \(9,\), but 8 pairs'):
    hf.load_pretrained(path)


def test_an_architecture_that_is_not_read_is_named(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / 'model.gguf', 'qwen2moe')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with pytest.raises(ValueError, match=r"general\.architecture 'qwen2moe'.*did you mean qwen2"):
    hf.load_pretrained(tmp_path / 'model.gguf')


def test_a_key_that_is_needed_and_absent_is_named(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / 'model.gguf', 'llama')
  writer.add_tensor('token_embd.weight', np.zeros((4, 8), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(ValueError, match=r'model\.gguf: llama\.attention\.head_count is missing'):
    hf.load_pretrained(tmp_path / 'model.gguf')


def test_nan_is_refused(write_gguf, tmp_path):
  def change(tensors):
    tensors['output_norm.weight'][3] = np.nan

  path = write_gguf(_build('llama'), tmp_path / 'model.gguf', change=change)
  with pytest.raises(ValueError, match=r'NaN or infinity in.*\n.*output_norm\.weight'):
    hf.load_pretrained(path)


@pytest.mark.parametrize(
  'metadata, match',
  [
    ({'expert_count': 8}, r'llama\.expert_count = 8 is not supported'),
    ({'attention__causal': False}, r'llama\.attention\.causal = False'),
    ({'rope__scaling__type': 'longrope'}, r"llama\.rope\.scaling\.type = 'longrope'"),
    ({'rope__scaling__attn_factor': 1.5}, r'llama\.rope\.scaling\.attn_factor = 1\.5'),
    ({'rope__scale_linear': 'x'}, r"llama\.rope\.scale_linear must be a number, not 'x'"),
  ],
)
def test_what_is_not_computed_is_refused(metadata, match, write_gguf, tmp_path):
  path = write_gguf(_build('llama'), tmp_path / 'model.gguf', **metadata)
  with pytest.raises(ValueError, match=rf'model\.gguf: {match}'):
    hf.load_pretrained(path)


def test_layers_that_differ_are_refused_and_equal_ones_are_not(write_gguf, tmp_path):
  model, key = _build('llama'), 'attention__head_count_kv'
  path = write_gguf(model, tmp_path / 'equal.gguf', **{key: [2, 2, 2]})
  assert hf.load_pretrained(path)[0].config.layers[2].mixer.kv_heads == 2
  path = write_gguf(model, tmp_path / 'other.gguf', **{key: [2, 2, 1]})
  with pytest.raises(
    ValueError, match=r'llama\.attention\.head_count_kv differs from layer to layer'
  ):
    hf.load_pretrained(path)


def test_the_queries_of_the_largest_gemma2_are_scaled_by_width_over_heads(write_gguf, tmp_path):
  model = _build('gemma2', num_hidden_layers=46, hidden_size=32, intermediate_size=8)
  config = hf.load_pretrained(write_gguf(model, tmp_path / 'model.gguf'))[0].config
  assert {layer.mixer.query_scale for layer in config.layers} == {(32 / 4) ** -0.5}
