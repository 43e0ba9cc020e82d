"""Every family against transformers on tiny random checkpoints, both ways."""

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

from model import hf, kv_cache, transformer
from model.layers.mixers import slots

# Both compute in float32 and add in different orders; logits are of order 1.
LOGIT_TOLERANCE = 1e-4
VOCABULARY = 99
EMBEDDING = 'model.embed_tokens.weight'
LENGTH = 40

TINY = {
  'vocab_size': VOCABULARY,
  'hidden_size': 64,
  'intermediate_size': 96,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'max_position_embeddings': 64,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'pad_token_id': None,
}
GROUPED = {**TINY, 'num_key_value_heads': 2}
FOUR_LAYERS = {**GROUPED, 'num_hidden_layers': 4}
SHORT = {**GROUPED, 'max_position_embeddings': 16}  # the text goes past it
NEOX = {**TINY, 'rope_parameters': {'rope_theta': 1e4, 'partial_rotary_factor': 0.25}}
TINY_GPT2 = {
  'vocab_size': VOCABULARY,
  'n_embd': 64,
  'n_layer': 3,
  'n_head': 4,
  'n_positions': 48,
  'bos_token_id': 1,
  'eos_token_id': 2,
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
_YARN = _rope('yarn', factor=4.0, original_max_position_embeddings=16)
_YARN_FULL = _rope(
  'yarn',
  factor=4.0,
  original_max_position_embeddings=32,
  beta_fast=2.0,
  beta_slow=0.5,
  mscale=0.8,
  mscale_all_dim=0.5,
  truncate=False,
)
_YARN_FULL['rope_parameters']['rope_theta'] = 20.0  # so that the ramp has inner points
_TWO_ROPES = {
  'layer_types': ['sliding_attention', 'full_attention'],
  'rope_parameters': {
    'sliding_attention': {'rope_type': 'default', 'rope_theta': 20.0},
    'full_attention': {'rope_type': 'linear', 'rope_theta': 500.0, 'factor': 4.0},
  },
}
_MULTIPLIERS = {
  'embedding_multiplier': 3.0,
  'logits_scaling': 2.0,
  'residual_multiplier': 0.4,
  'attention_multiplier': 0.3,
}
CASES = {
  'llama-mha': ('Llama', TINY),
  'llama-gqa': ('Llama', GROUPED),
  'llama-tied': ('Llama', {**GROUPED, 'tie_word_embeddings': True}),
  'llama-biases': ('Llama', {**GROUPED, 'attention_bias': True, 'mlp_bias': True}),
  'llama-head-dim': ('Llama', {**GROUPED, 'head_dim': 24, 'hidden_act': 'gelu'}),
  'llama-linear': ('Llama', {**SHORT, **_rope('linear', factor=3.0)}),
  'llama-dynamic': ('Llama', {**SHORT, **_rope('dynamic', factor=2.0)}),
  'llama-llama3': ('Llama', {**GROUPED, **_LLAMA3}),
  'llama-yarn': ('Llama', {**GROUPED, **_YARN}),
  'llama-yarn-full': ('Llama', {**GROUPED, **_YARN_FULL}),
  'mistral-window': ('Mistral', {**GROUPED, 'sliding_window': 8}),
  'mistral-full': ('Mistral', {**GROUPED, 'sliding_window': None, 'head_dim': 32}),
  'qwen2': ('Qwen2', {**GROUPED, 'tie_word_embeddings': True}),
  'qwen2-late-window': (
    'Qwen2',
    {**GROUPED, 'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 1},
  ),
  'qwen2-layer-types': (
    'Qwen2',
    {
      **FOUR_LAYERS,
      'use_sliding_window': True,
      'sliding_window': 8,
      'layer_types': ['sliding_attention', 'full_attention'] * 2,
    },
  ),
  'qwen3': ('Qwen3', {**GROUPED, 'head_dim': 24, 'attention_bias': True}),
  'gemma2': (
    'Gemma2',
    {**FOUR_LAYERS, 'head_dim': 24, 'query_pre_attn_scalar': 40, 'sliding_window': 8},
  ),
  'gemma2-uncapped': (
    'Gemma2',
    {
      **GROUPED,
      'head_dim': 16,
      'query_pre_attn_scalar': 16,
      'attn_logit_softcapping': None,
      'final_logit_softcapping': None,
      'layer_types': ['full_attention'] * 2,
      'tie_word_embeddings': False,
    },
  ),
  'gemma3': (
    'Gemma3Text',
    {**GROUPED, 'head_dim': 24, 'query_pre_attn_scalar': 40, 'sliding_window': 8, **_TWO_ROPES},
  ),
  'gemma3-plain': ('Gemma3Text', {**GROUPED, 'head_dim': 16, 'final_logit_softcapping': 3.0}),
  'smollm3': ('SmolLM3', {**FOUR_LAYERS, **_rope('default'), 'tie_word_embeddings': True}),
  'smollm3-window': (
    'SmolLM3',
    {
      **GROUPED,
      'no_rope_layers': [0, 1],
      'use_sliding_window': True,
      'sliding_window': 8,
      'attention_bias': True,
      'mlp_bias': True,
    },
  ),
  'olmo2': ('Olmo2', {**GROUPED, 'attention_bias': True}),
  'olmo2-head-dim': ('Olmo2', {**GROUPED, 'head_dim': 24}),
  'granite': ('Granite', {**GROUPED, **_MULTIPLIERS, 'mlp_bias': True}),
  'phi3-window': ('Phi3', {**GROUPED, 'sliding_window': 8}),
  'phi3-partial': (
    'Phi3',
    {**TINY, **_rope('default', partial_rotary_factor=0.75), 'tie_word_embeddings': True},
  ),
  'gpt2': ('GPT2', TINY_GPT2),
  'gpt2-scaled-by-layer': (
    'GPT2',
    {
      **TINY_GPT2,
      'n_inner': 80,
      'scale_attn_by_inverse_layer_idx': True,
      'activation_function': 'relu',
      'tie_word_embeddings': False,
    },
  ),
  'neox-parallel': ('GPTNeoX', NEOX),
  'neox-sequential': (
    'GPTNeoX',
    {
      **TINY,
      **_rope('linear', factor=2.0, partial_rotary_factor=1.0),
      'use_parallel_residual': False,
      'attention_bias': False,
      'hidden_act': 'gelu_new',
    },
  ),
}

# One of each family, and the traits that no other has; the rest is slow.
QUICK = (
  'llama-gqa',
  'llama-biases',
  'llama-llama3',
  'mistral-window',
  'qwen2-late-window',
  'qwen3',
  'gemma2',
  'gemma3',
  'smollm3-window',
  'olmo2',
  'granite',
  'phi3-window',
  'gpt2-scaled-by-layer',
  'neox-parallel',
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
  return model.eval()


def _build(case):
  family, arguments = CASES[case]
  config = getattr(transformers, f'{family}Config')(**json.loads(json.dumps(arguments)))
  config._attn_implementation = 'eager'
  return _random_(transformers.AutoModelForCausalLM.from_config(config))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """A function from a case to (folder, torch model); each is made once."""

  @functools.cache
  def make(case):
    folder = tmp_path_factory.mktemp(case)
    model = _build(case)
    model.save_pretrained(folder)
    return folder, model

  return make


def _tokens():
  return np.random.default_rng(1).integers(0, VOCABULARY, (2, LENGTH))


def _their_logits(model):
  with torch.no_grad():
    return model(torch.tensor(_tokens())).logits.float().numpy()


def _our_logits(model):
  graphdef, state = nnx.split(model)
  run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
  return np.asarray(run(state, jnp.asarray(_tokens(), jnp.int32)))


def _arrays(model):
  return {
    path: np.asarray(param.get_value()) for path, param in transformer.parameters(model).items()
  }


def _assert_same_arrays(ours, others):
  assert ours.keys() == others.keys()
  for name, array in ours.items():
    assert array.dtype == others[name].dtype, name
    np.testing.assert_array_equal(array, others[name], err_msg=name)


def _edit_tensors(folder, edit):
  path = folder / 'model.safetensors'
  tensors = load_file(path)
  edit(tensors)
  save_file(tensors, path, {'format': 'pt'})


@pytest.mark.parametrize('case', CASES)
@pytest.mark.quick(case=QUICK)
def test_logits_match_transformers(case, checkpoint):
  folder, theirs = checkpoint(case)
  ours, tokenizer = hf.load_pretrained(folder)
  assert tokenizer is None
  np.testing.assert_allclose(_our_logits(ours), _their_logits(theirs), atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize('case', ['gemma3', 'smollm3-window', 'olmo2', 'granite'])
@pytest.mark.quick(case=('gemma3', 'smollm3-window'))
def test_logits_over_a_cache_match_transformers(case, checkpoint):
  """A prefill in two parts, then tokens one by one, past window and spare."""
  folder, theirs = checkpoint(case)
  model, _ = hf.load_pretrained(folder)
  windows = [layer.mixer.window for layer in model.config.layers if layer.mixer.window]
  assert all(window + slots.SPARE + 20 < LENGTH for window in windows)
  graphdef, state = nnx.split(model)

  @jax.jit
  def step(state, tokens_BT, positions_BT, cache):
    model = nnx.merge(graphdef, state)
    x_BTD, cache = model.hidden(tokens_BT, positions_BT=positions_BT, cache=cache)
    return model.logits(x_BTD), cache

  tokens_BT = jnp.asarray(_tokens(), jnp.int32)
  positions_BT = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens_BT.shape)
  cache, found = kv_cache.init(model.config, 2, LENGTH), []
  for part in (slice(10), slice(10, 25), *(slice(t, t + 1) for t in range(25, LENGTH))):
    logits_BTV, cache = step(state, tokens_BT[:, part], positions_BT[:, part], cache)
    found.append(logits_BTV)
  actual, expected = np.concatenate(found, 1), _their_logits(theirs)
  np.testing.assert_allclose(actual, expected, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.quick(case=QUICK)
def test_transformers_loads_what_is_saved(case, checkpoint, tmp_path):
  folder, theirs = checkpoint(case)
  model, _ = hf.load_pretrained(folder)
  hf.save_pretrained(model, None, tmp_path / 'saved')
  loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'saved', attn_implementation='eager', output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys']
  assert type(loaded) is type(theirs)
  for name, tensor in theirs.state_dict().items():
    assert torch.equal(loaded.state_dict()[name], tensor), name
  np.testing.assert_allclose(
    _their_logits(loaded.eval()), _their_logits(theirs), atol=LOGIT_TOLERANCE, rtol=0
  )
  again, _ = hf.load_pretrained(tmp_path / 'saved')
  assert again.config == model.config
  _assert_same_arrays(_arrays(again), _arrays(model))


@pytest.mark.parametrize('case', ['llama-gqa', 'phi3-window', 'gpt2', 'neox-parallel'])
@pytest.mark.quick(case=('phi3-window', 'gpt2'))
def test_shards_hold_the_same_tensors(case, checkpoint, tmp_path):
  folder, theirs = checkpoint(case)
  model, _ = hf.load_pretrained(folder)
  hf.save_pretrained(model, None, tmp_path / 'saved', max_shard_bytes=50_000)
  names = {path.name for path in (tmp_path / 'saved').glob('*.safetensors')}
  index = json.loads((tmp_path / 'saved/model.safetensors.index.json').read_text())
  assert len(names) > 2 and names == set(index['weight_map'].values())
  _assert_same_arrays(_arrays(hf.load_pretrained(tmp_path / 'saved')[0]), _arrays(model))
  loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'saved')
  for name, tensor in theirs.state_dict().items():
    assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_stored_dtypes_are_kept_or_cast(dtype, tmp_path):
  _build('llama-tied').to(dtype).save_pretrained(tmp_path)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  kept, _ = hf.load_pretrained(tmp_path)
  name = str(dtype).removeprefix('torch.')
  assert kept.dtype == jnp.float32
  assert {str(a.dtype) for a in _arrays(kept).values()} == {name}
  np.testing.assert_allclose(_our_logits(kept), _their_logits(theirs), atol=LOGIT_TOLERANCE, rtol=0)
  cast, _ = hf.load_pretrained(tmp_path, dtype=jnp.float32)
  assert {str(a.dtype) for a in _arrays(cast).values()} == {'float32'}
  hf.save_pretrained(kept, None, tmp_path / 'saved')
  config = json.loads((tmp_path / 'saved/config.json').read_text())
  assert config['dtype'] == config['torch_dtype'] == name
  _assert_same_arrays(_arrays(hf.load_pretrained(tmp_path / 'saved')[0]), _arrays(kept))


def test_gemma2_in_bfloat16_rounds_the_embedding_scale(tmp_path):
  # sqrt(width) is cast to the dtype of the activations before it multiplies; 80 ** 0.5 is inexact.
  config = transformers.Gemma2Config(**{**GROUPED, 'hidden_size': 80, 'head_dim': 16})
  theirs = _random_(transformers.Gemma2ForCausalLM(config)).to(torch.bfloat16)
  theirs.save_pretrained(tmp_path)
  ours, _ = hf.load_pretrained(tmp_path, dtype=jnp.bfloat16)
  with torch.no_grad():
    expected = theirs.model.embed_tokens(torch.tensor(_tokens())).float().numpy()
  actual = ours.embed(jnp.asarray(_tokens(), jnp.int32)).astype(jnp.float32)
  np.testing.assert_array_equal(actual, expected)


def test_buffers_of_old_checkpoints_are_ignored(checkpoint, tmp_path):
  for case, names in {
    'llama-gqa': ['model.layers.0.self_attn.rotary_emb.inv_freq'],
    'gpt2': ['transformer.h.0.attn.bias', 'transformer.h.0.attn.masked_bias'],
    'neox-parallel': [
      'gpt_neox.layers.0.attention.bias',
      'gpt_neox.layers.0.attention.masked_bias',
      'gpt_neox.layers.0.attention.rotary_emb.inv_freq',
    ],
  }.items():
    source, _ = checkpoint(case)
    folder = shutil.copytree(source, tmp_path / case)
    _edit_tensors(folder, lambda t, names=names: t.update({n: np.zeros(3) for n in names}))
    plain, _ = hf.load_pretrained(source)
    _assert_same_arrays(_arrays(hf.load_pretrained(folder)[0]), _arrays(plain))


@pytest.mark.parametrize('case', ['gpt2', 'llama-tied'])
def test_bare_checkpoints_lack_the_prefix(case, checkpoint, tmp_path):
  source, theirs = checkpoint(case)
  folder = shutil.copytree(source, tmp_path / 'bare')
  tensors = load_file(folder / 'model.safetensors')
  prefix = theirs.base_model_prefix + '.'
  bare = {name.removeprefix(prefix): array for name, array in tensors.items()}
  assert bare.keys() != tensors.keys()
  save_file(bare, folder / 'model.safetensors')
  plain, _ = hf.load_pretrained(source)
  _assert_same_arrays(_arrays(hf.load_pretrained(folder)[0]), _arrays(plain))


def test_tied_checkpoint_may_store_an_equal_head_only(checkpoint, tmp_path):
  folder = shutil.copytree(checkpoint('llama-tied')[0], tmp_path / 'tied')
  copy = lambda t: t.update({'lm_head.weight': t[EMBEDDING].copy()})
  _edit_tensors(folder, copy)
  assert 'head.weight' not in _arrays(hf.load_pretrained(folder)[0])
  _edit_tensors(folder, lambda t: t.update({'lm_head.weight': t['lm_head.weight'] + 1}))
  with pytest.raises(ValueError, match='tie_word_embeddings'):
    hf.load_pretrained(folder)
