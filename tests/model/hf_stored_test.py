"""Checkpoints as training tools leave them, against transformers' model before it was saved."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file, save_model

from model import hf, transformer

# Both compute in float32 and add in different orders; logits are of order 1.
LOGIT_TOLERANCE = 1e-4
VOCABULARY, LENGTH = 99, 24
EMBEDDING = 'model.embed_tokens.weight'

SIZES = {
  'vocab_size': VOCABULARY,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'pad_token_id': None,
}
NEOX = {key: SIZES[key] for key in SIZES if key != 'num_key_value_heads'}
GPT2 = {'vocab_size': VOCABULARY, 'n_embd': 32, 'n_layer': 2, 'n_head': 4, 'n_positions': 32}
FAMILIES = {
  'Llama': SIZES,
  'Qwen2': SIZES,
  'Gemma2': {**SIZES, 'head_dim': 8},
  'Phi3': SIZES,
  'GPT2': GPT2,
  'GPTNeoX': NEOX,
}


def _build(family, tied=False):
  config = getattr(transformers, f'{family}Config')(**FAMILIES[family], tie_word_embeddings=tied)
  config._attn_implementation = 'eager'
  model = transformers.AutoModelForCausalLM.from_config(config)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():  # every one off its initial value
      parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
  return model.eval()


def _write(model, folder, tensors, metadata=None):
  model.config.save_pretrained(folder)
  save_file(tensors, folder / 'model.safetensors', {'format': 'pt', **(metadata or {})})


def _tensors(model):
  """What `save_pretrained` stores: a tied head once."""
  names = dict(model.named_parameters())
  return {name: tensor.clone() for name, tensor in model.state_dict().items() if name in names}


def _tokens():
  return np.random.default_rng(1).integers(0, VOCABULARY, (2, LENGTH))


def _logits(model):
  graphdef, state = nnx.split(model)
  run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
  return np.asarray(run(state, jnp.asarray(_tokens(), jnp.int32)))


def _assert_same_logits(folder, theirs):
  ours, _ = hf.load_pretrained(folder)
  with torch.no_grad():
    expected = theirs(torch.tensor(_tokens())).logits.numpy()
  np.testing.assert_allclose(_logits(ours), expected, atol=LOGIT_TOLERANCE, rtol=0)
  return ours


def _said(caplog):
  return [record.getMessage() for record in caplog.records if record.name == hf.LOG.name]


@pytest.mark.parametrize('family', FAMILIES)
def test_a_tied_model_may_be_written_by_save_model(family, tmp_path, caplog):
  theirs = _build(family, tied=True)
  path = tmp_path / 'model.safetensors'
  save_model(theirs, path)
  stored = load_file(path)
  # Of names that share a tensor it keeps the first by the alphabet.
  assert len(stored) == len(_tensors(theirs))
  assert ('lm_head.weight' in stored) == (family != 'GPTNeoX')
  theirs.config.save_pretrained(tmp_path)
  ours = _assert_same_logits(tmp_path, theirs)
  assert ours.config.tied and _said(caplog) == []


@pytest.mark.parametrize('family', FAMILIES)
def test_a_head_that_is_stored_alone_is_the_embedding(family, tmp_path, caplog):
  theirs = _build(family, tied=True)
  tensors = _tensors(theirs)
  table = theirs.get_input_embeddings().weight
  (name,) = (name for name, parameter in theirs.named_parameters() if parameter is table)
  tensors['lm_head.weight'] = tensors.pop(name)
  _write(theirs, tmp_path, tensors)
  ours = _assert_same_logits(tmp_path, theirs)
  assert ours.config.tied and _said(caplog) == []


def test_tensors_that_a_model_shares_are_found_by_the_metadata(tmp_path):
  theirs = _build('Llama')  # config.json does not tie, but these parameters are one
  theirs.lm_head.weight = theirs.model.embed_tokens.weight
  theirs.model.layers[1].mlp.up_proj.weight = theirs.model.layers[0].mlp.up_proj.weight
  save_model(theirs, tmp_path / 'model.safetensors')
  theirs.config.save_pretrained(tmp_path)
  assert not _assert_same_logits(tmp_path, theirs).config.tied


DTYPES = [torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize('dtype', DTYPES)
def test_an_equal_head_may_have_another_dtype(dtype, tmp_path):
  theirs = _build('Llama', tied=True)
  tensors = _tensors(theirs)
  tensors['lm_head.weight'] = tensors[EMBEDDING].to(dtype)
  _write(theirs, tmp_path, tensors)
  _assert_same_logits(tmp_path, theirs)
  tensors['lm_head.weight'][3, 4] += 0.5
  _write(theirs, tmp_path, tensors)
  with pytest.raises(ValueError, match='tie_word_embeddings to false if the stored head'):
    hf.load_pretrained(tmp_path)


def test_a_wider_head_equals_the_embedding_that_it_came_from(tmp_path):
  theirs = _build('Llama', tied=True)
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.copy_(parameter.bfloat16())
  tensors = {name: tensor.bfloat16() for name, tensor in _tensors(theirs).items()}
  tensors['lm_head.weight'] = tensors[EMBEDDING].float()
  _write(theirs, tmp_path, tensors)
  _assert_same_logits(tmp_path, theirs)


def _wrapped(model):
  wrapped = torch.compile(torch.nn.DataParallel(torch.compile(model)))  # nothing runs yet
  names = wrapped.state_dict()
  assert all(name.startswith('_orig_mod.module._orig_mod.') for name in names)
  return names


WRAPPED = {
  'data parallel': lambda model: torch.nn.DataParallel(model).state_dict(),
  'compiled': lambda model: torch.compile(model).state_dict(),
  'both': _wrapped,
  'inside': lambda model: {
    name.replace('.0.', '.0._checkpoint_wrapped_module.'): tensor
    for name, tensor in model.state_dict().items()
  },
  'bare': lambda model: {
    f'module.{name.removeprefix(f"{model.base_model_prefix}.")}': tensor
    for name, tensor in model.state_dict().items()
  },
}


@pytest.mark.parametrize(
  'family, kind',
  [
    *(('Llama', k) for k in WRAPPED),
    *((f, k) for f in ('GPT2', 'GPTNeoX') for k in ('both', 'bare')),
  ],
)
def test_names_of_wrappers_are_no_part_of_names(family, kind, tmp_path, caplog):
  theirs = _build(family)
  tensors = WRAPPED[kind](theirs)
  assert not tensors.keys() & theirs.state_dict().keys() or kind == 'inside'
  _write(theirs, tmp_path, {name: tensor.clone() for name, tensor in tensors.items()})
  _assert_same_logits(tmp_path, theirs)
  assert _said(caplog) == []


def test_a_tensor_with_and_without_a_wrapper_is_refused(tmp_path):
  theirs = _build('Llama')
  tensors = _tensors(theirs)
  tensors['module.model.norm.weight'] = tensors['model.norm.weight'] + 1
  _write(theirs, tmp_path, tensors)
  with pytest.raises(ValueError, match=r'model\.norm\.weight, module\.model\.norm\.weight; keep'):
    hf.load_pretrained(tmp_path)


EXTRAS = {
  'Llama': {
    'v_head.summary.weight': 'v_head.summary.weight',
    'score.weight': 'score.weight',
    'model.rotary_emb.inv_freq': 'model.rotary_emb.inv_freq',
    'model.layers.0.self_attn.rotary_emb.cos_cached': 'cos_cached (2)',
    'model.layers.1.self_attn.rotary_emb.cos_cached': 'layers.*.self_attn.rotary_emb.cos_cached',
    'model.layers.1.self_attn.rotary_emb.sin_cached': 'sin_cached',
  },
  'GPT2': {
    'transformer.h.0.attn.bias': 'transformer.h.*.attn.bias (2)',
    'transformer.h.1.attn.bias': 'transformer.h.*.attn.bias (2)',
    'transformer.h.1.attn.masked_bias': 'transformer.h.*.attn.masked_bias',
    'multiple_choice_head.summary.bias': 'multiple_choice_head.summary.bias',
  },
  'GPTNeoX': {
    'gpt_neox.layers.0.attention.bias': 'gpt_neox.layers.*.attention.bias',
    'gpt_neox.layers.0.attention.masked_bias': 'gpt_neox.layers.*.attention.masked_bias',
    'gpt_neox.layers.0.attention.rotary_emb.inv_freq': 'rotary_emb.inv_freq',
  },
}


@pytest.mark.parametrize(
  'family, prefix', [*((family, '') for family in EXTRAS), ('Llama', '_orig_mod.')]
)
def test_heads_of_other_tasks_and_buffers_are_left_out_and_named_once(
  family, prefix, tmp_path, caplog
):
  theirs = _build(family)
  extras = {name: torch.full((3,), torch.nan) for name in EXTRAS[family]}
  tensors = {prefix + name: t.clone() for name, t in {**theirs.state_dict(), **extras}.items()}
  _write(theirs, tmp_path, tensors)
  _assert_same_logits(tmp_path, theirs)
  (message,) = _said(caplog)
  assert message.startswith('tensors that are no weights of the model are left out: ')
  assert all(shown in message for shown in EXTRAS[family].values())
  assert '_orig_mod' not in message and '\n' not in message


def test_what_is_no_known_head_is_still_unexpected(tmp_path):
  theirs = _build('Llama')
  _write(theirs, tmp_path, {**_tensors(theirs), 'model.layers.0.mlp.score.weight': torch.ones(2)})
  with pytest.raises(ValueError, match=r'unexpected: model\.layers\.0\.mlp\.score\.weight \(2,\)'):
    hf.load_pretrained(tmp_path)


@pytest.mark.parametrize('family', ['Llama', 'GPT2'])
def test_float64_is_rounded_and_said_once(family, tmp_path, caplog):
  theirs = _build(family, tied=True).double()
  _write(theirs, tmp_path, _tensors(theirs))
  ours = _assert_same_logits(tmp_path, theirs)
  assert {p.get_value().dtype for p in transformer.parameters(ours).values()} == {
    jnp.dtype('float32')
  }
  (message,) = _said(caplog)
  assert message == 'tensors of float64 are rounded to float32: all of them'
  half, _ = hf.load_pretrained(tmp_path, jnp.bfloat16)
  assert {p.get_value().dtype for p in transformer.parameters(half).values()} == {
    jnp.dtype('bfloat16')
  }


def test_single_tensors_of_float64_are_named(tmp_path, caplog):
  theirs = _build('Llama')
  wide = {name: t.double() for name, t in _tensors(theirs).items() if 'layernorm' in name}
  _write(theirs, tmp_path, _tensors(theirs) | wide)
  _assert_same_logits(tmp_path, theirs)
  (message,) = _said(caplog)
  assert message.partition(': ')[2] == (
    'model.layers.*.input_layernorm.weight (2), model.layers.*.post_attention_layernorm.weight (2)'
  )


def test_what_float32_cannot_hold_is_named(tmp_path):
  theirs = _build('Llama').double()
  tensors = _tensors(theirs)
  tensors['model.norm.weight'][2] = 1e300
  _write(theirs, tmp_path, tensors)
  with pytest.raises(ValueError, match=r'NaN or infinity in \(1\):\n  model\.norm\.weight \(32,\)'):
    hf.load_pretrained(tmp_path)


def test_an_index_may_name_tensors_that_nobody_needs(tmp_path):
  theirs = _build('Llama')
  theirs.save_pretrained(tmp_path, max_shard_size='8KB')
  path = tmp_path / 'model.safetensors.index.json'
  index = json.loads(path.read_text())
  shard = index['weight_map'][EMBEDDING]
  index['weight_map']['model.layers.0.self_attn.rotary_emb.inv_freq'] = shard
  path.write_text(json.dumps(index))
  _assert_same_logits(tmp_path, theirs)
  tensors = load_file(tmp_path / shard)
  del tensors[EMBEDDING]
  save_file(tensors, tmp_path / shard, {'format': 'pt'})
  with pytest.raises(ValueError, match=r'missing: model\.embed_tokens\.weight \(99, 32\)'):
    hf.load_pretrained(tmp_path)


@pytest.mark.parametrize('text', ['', ' \n', '{}'])
def test_an_empty_generation_config_is_none(text, tmp_path):
  theirs = _build('Llama')
  theirs.save_pretrained(tmp_path)
  (tmp_path / 'generation_config.json').write_text(text)
  assert hf.load_config(tmp_path).eos_ids == (2,)
  _assert_same_logits(tmp_path, theirs)
  (tmp_path / 'generation_config.json').write_text('{"eos')
  with pytest.raises(ValueError, match=r'generation_config\.json is no JSON'):
    hf.load_pretrained(tmp_path)


# (config.json, generation_config.json) -> the padding token.
PADS = [((7, None), 7), ((None, 7), 7), ((5, 7), 5), ((0, None), 0), ((VOCABULARY, None), None)]


@pytest.mark.parametrize(('stored', 'pad'), PADS)
def test_the_padding_token_survives_saving(stored, pad, tmp_path):
  theirs = _build('Llama')
  theirs.save_pretrained(tmp_path)
  for name, value in zip(('config.json', 'generation_config.json'), stored):
    about = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps({**about, 'pad_token_id': value}))
  model, _ = hf.load_pretrained(tmp_path)
  assert model.config.pad_id == pad
  hf.save_pretrained(model, None, tmp_path / 'saved')
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'saved')
  assert again.config.pad_token_id == again.generation_config.pad_token_id == pad
  assert hf.load_config(tmp_path / 'saved') == model.config


def test_the_warnings_reach_people_by_the_standard_logger(tmp_path, capsys):
  theirs = _build('Llama')
  _write(theirs, tmp_path, {**_tensors(theirs), 'v_head.summary.bias': torch.ones(1)})
  handler = logging.StreamHandler()  # stands for logging's handler of last resort
  hf.LOG.addHandler(handler)
  hf.load_pretrained(tmp_path)
  hf.LOG.removeHandler(handler)
  shown = capsys.readouterr().err
  assert shown.count('v_head.summary.bias') == shown.count('\n') == 1
