"""Adapter folders against the library PEFT on tiny transformers models, both ways."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft as library
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from model import adapters, hf, peft
from model.adapters import AdapterConfig
from model.peft_config import PeftConfig
from model.transformer import linears, parameters
from ops.linear import roles

# What PEFT 0.21 asks of transformers 5, which warns.
pytestmark = pytest.mark.filterwarnings('ignore:.*gradient_checkpointing:FutureWarning')
LOGITS = 1e-5  # the largest difference of float32 logits of order 1
TINY = {
  'vocab_size': 61,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'pad_token_id': None,
}
NEOX = {key: value for key, value in TINY.items() if key != 'num_key_value_heads'}
GPT2 = {'vocab_size': 61, 'n_embd': 32, 'n_layer': 2, 'n_head': 4, 'n_positions': 64}
FAMILIES = {
  'llama': ('Llama', TINY),
  'phi3': ('Phi3', TINY),
  'gpt2': ('GPT2', {**GPT2, 'bos_token_id': 1, 'eos_token_id': 2}),
  'gpt_neox': ('GPTNeoX', NEOX),
}
TOKENS = np.random.default_rng(0).integers(3, 61, (2, 12))


@functools.cache
def _folder(family, tmp):
  """A folder of a tiny model as transformers writes it."""
  torch.manual_seed(0)
  name, config = FAMILIES[family]
  made = getattr(transformers, f'{name}Config')(**config)
  made._attn_implementation = 'eager'
  model = transformers.AutoModelForCausalLM.from_config(made)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  model.save_pretrained(tmp / family)
  return tmp / family


@pytest.fixture(scope='module')
def tmp(tmp_path_factory):
  return tmp_path_factory.mktemp('models')


def _theirs(folder):
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation='eager')
  return model.eval()


def _their_logits(model):
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.numpy()


def _our_logits(model):
  return np.asarray(jax.jit(lambda tokens: model(tokens))(jnp.asarray(TOKENS)))


def _peft_config(targets, **options):
  return library.LoraConfig(
    r=4, lora_alpha=6, target_modules=targets, task_type='CAUSAL_LM', **options
  )


TARGETS = {
  'llama': ['q_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj'],
  'phi3': ['qkv_proj', 'gate_up_proj', 'down_proj'],
  'gpt2': ['c_attn', 'c_fc', 'mlp.c_proj'],
  'gpt_neox': ['query_key_value', 'dense', 'dense_4h_to_h'],
}
PATTERNS = {'rank_pattern': {'layers.1.self_attn.q_proj': 2}, 'alpha_pattern': {'up_proj': 3.5}}
THEIR_CASES = {
  **{f: (f, TARGETS[f], {'fan_in_fan_out': f == 'gpt2'}) for f in FAMILIES},
  'rslora': ('llama', TARGETS['llama'], {'use_rslora': True}),
  'patterns': ('llama', TARGETS['llama'], PATTERNS),
  'rslora patterns': ('llama', TARGETS['llama'], {'use_rslora': True, **PATTERNS}),
  'dora': ('llama', TARGETS['llama'], {'use_dora': True}),
  'dora fused': ('phi3', TARGETS['phi3'], {'use_dora': True}),
  'dora gpt2': ('gpt2', TARGETS['gpt2'], {'use_dora': True, 'fan_in_fan_out': True}),
  'head saved': ('llama', ['q_proj'], {'modules_to_save': ['lm_head']}),
}


def _their_adapter(family, targets, options, tmp, folder):
  """Writes a random adapter by PEFT; returns the logits with it."""
  torch.manual_seed(1)
  model = library.get_peft_model(_theirs(_folder(family, tmp)), _peft_config(targets, **options))
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.add_(0.1 * torch.rand_like(parameter))
  model.save_pretrained(folder)
  return _their_logits(model.eval())


@pytest.mark.parametrize('case', THEIR_CASES)
@pytest.mark.quick(case=('phi3', 'gpt_neox', 'rslora patterns', 'dora gpt2', 'head saved'))
def test_their_adapter_gives_equal_logits_and_is_written_again_with_equal_bytes(
  case, tmp, tmp_path
):
  family, targets, options = THEIR_CASES[case]
  expected = _their_adapter(family, targets, options, tmp, tmp_path / 'theirs')
  base, _ = hf.load_pretrained(_folder(family, tmp))
  model, config = peft.load(tmp_path / 'theirs', base)
  np.testing.assert_allclose(_our_logits(model), expected, atol=LOGITS)
  saved = ('head',) if 'modules_to_save' in options else ()
  peft.save(model, tmp_path / 'ours', config=config, saved=saved)
  ours, theirs = (load_file(tmp_path / f / 'adapter_model.safetensors') for f in ('ours', 'theirs'))
  assert ours.keys() == theirs.keys()
  for name in theirs:
    assert ours[name].tobytes() == theirs[name].tobytes(), name
  again = library.PeftModel.from_pretrained(_theirs(_folder(family, tmp)), tmp_path / 'ours')
  np.testing.assert_allclose(_their_logits(again.eval()), expected, atol=LOGITS)


OUR_CASES = {
  'llama': ('llama', AdapterConfig(rank=3, alpha=5.0)),
  'rslora': ('llama', AdapterConfig(rank=3, alpha=5.0, rslora=True)),
  'dora': ('llama', AdapterConfig(rank=3, dora=True)),
  'patterns': (
    'llama',
    AdapterConfig(
      rank=3,
      targets=('*.query', '*.ffn.*', 'head'),
      ranks={'layers.1.*': 2},
      alphas={'*.down': 7.0},
    ),
  ),
  'trained apart in fused modules': ('phi3', AdapterConfig(rank=3, alpha=5.0)),
  'a part of a fused module': (
    'gpt_neox',
    AdapterConfig(rank=2, targets=('*.query', '*.value'), ranks={'*.value': 3}),
  ),
  'conv': ('gpt2', AdapterConfig(rank=3)),
}


@pytest.mark.parametrize('case', OUR_CASES)
@pytest.mark.quick(
  case=('patterns', 'trained apart in fused modules', 'a part of a fused module', 'conv')
)
def test_our_adapter_gives_equal_logits_in_peft(case, tmp, tmp_path):
  family, config = OUR_CASES[case]
  base, _ = hf.load_pretrained(_folder(family, tmp))
  fresh = adapters.attach(base, config, key=jax.random.key(0))
  model = _trained_sides(fresh)
  peft.save(model, tmp_path / 'ours', config=PeftConfig(rslora=config.rslora))
  theirs = library.PeftModel.from_pretrained(_theirs(_folder(family, tmp)), tmp_path / 'ours')
  np.testing.assert_allclose(_our_logits(model), _their_logits(theirs.eval()), atol=LOGITS)
  again, _ = peft.load(tmp_path / 'ours', base)
  np.testing.assert_allclose(_our_logits(again), _our_logits(model), atol=LOGITS)
  peft.save(again, tmp_path / 'again', config=PeftConfig(rslora=config.rslora))
  first, second = (
    (tmp_path / f / 'adapter_model.safetensors').read_bytes() for f in ('ours', 'again')
  )
  assert first == second


def _trained_sides(model):
  """Moves the adapters away from where they start."""
  rng = np.random.default_rng(2)
  for path, w in adapters.adapted(model).items():
    leaves, structure = jax.tree.flatten(w)
    moved = [
      leaf + jnp.asarray(0.1 * rng.random(leaf.shape), jnp.float32) if role == 'adapter' else leaf
      for leaf, role in zip(leaves, roles(w), strict=True)
    ]
    linears(model)[path].weight.set_value(jax.tree.unflatten(structure, moved))
  return model


@pytest.fixture(scope='module')
def written(tmp, tmp_path_factory):
  folder = tmp_path_factory.mktemp('adapter')
  _their_adapter('llama', ['q_proj', 'up_proj'], {}, tmp, folder)
  return folder


def _changed(written, folder, *, config=None, tensors=lambda tensors: tensors):
  folder.mkdir()
  about = json.loads((written / 'adapter_config.json').read_text()) | (config or {})
  (folder / 'adapter_config.json').write_text(json.dumps(about))
  stored = load_file(written / 'adapter_model.safetensors')
  save_file(tensors(dict(stored)), folder / 'adapter_model.safetensors')
  return folder


def _without(part):
  return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


BAD = {
  'another key': ({'layer_replication': [[0, 2]]}, None, r'layer_replication = \[\[0, 2\]\]'),
  'a bias': ({'bias': 'all'}, None, "bias = 'all'"),
  'a changed base': ({'init_lora_weights': 'pissa_niter_16'}, None, 'belongs to a changed base'),
  'another kind': ({'peft_type': 'IA3'}, None, "peft_type = 'IA3'"),
  'another rank': ({'r': 5}, None, 'sides of rank 4 and 4, and 5 in adapter_config.json'),
  'a side is missing': (
    {},
    _without('layers.0.self_attn.q_proj.lora_B'),
    r'layers\.0\.self_attn\.q_proj\.lora_B\.weight is missing',
  ),
  'an unknown tensor': (
    {},
    lambda t: t | {'base_model.model.model.layers.0.oddity': np.zeros(3, np.float32)},
    r'model\.layers\.0\.oddity \(3,\) is unknown',
  ),
  'an unlisted module': (
    {},
    lambda t: t | {'base_model.model.lm_head.weight': np.zeros((61, 32), np.float32)},
    'lm_head.weight is stored whole, but adapter_config.json does not list it',
  ),
  'another prefix': (
    {},
    lambda t: {name.removeprefix('base_model.'): a for name, a in t.items()},
    'do not begin with base_model.model.',
  ),
}


@pytest.mark.parametrize('what', BAD)
def test_what_does_not_fit_is_named(what, written, tmp, tmp_path):
  config, tensors, message = BAD[what]
  folder = _changed(written, tmp_path / 'bad', config=config, tensors=tensors or (lambda t: t))
  base, _ = hf.load_pretrained(_folder('llama', tmp))
  with pytest.raises(ValueError, match=message):
    peft.load(folder, base)


def test_an_adapter_for_another_base_is_refused(written, tmp):
  other = {**TINY, 'hidden_size': 64}
  config = transformers.LlamaConfig(**other)
  transformers.LlamaForCausalLM(config).save_pretrained(tmp / 'other')
  wide, _ = hf.load_pretrained(tmp / 'other')
  with pytest.raises(ValueError, match=r'q_proj is 64 x 64 here, and 32 x 32 for the adapter'):
    peft.load(written, wide)
  neox, _ = hf.load_pretrained(_folder('gpt_neox', tmp))
  with pytest.raises(ValueError, match=r'q_proj is no linear layer of the model'):
    peft.load(written, neox)


def test_a_folder_without_its_files_is_refused(tmp, tmp_path):
  base, _ = hf.load_pretrained(_folder('llama', tmp))
  with pytest.raises(ValueError, match=r'has no adapter_config\.json'):
    peft.load(tmp_path, base)
  (tmp_path / 'adapter_config.json').write_text('{}')
  with pytest.raises(ValueError, match='pickled adapters are not read'):
    peft.load(tmp_path, base)
  with pytest.raises(ValueError, match='this model has no adapters'):
    peft.save(base, tmp_path / 'new')


def test_the_base_stays_as_it_was(written, tmp):
  base, _ = hf.load_pretrained(_folder('llama', tmp))
  before = [np.asarray(p.get_value()) for p in parameters(base).values()]
  peft.load(written, base)
  after = [np.asarray(p.get_value()) for p in parameters(nnx.clone(base)).values()]
  assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
