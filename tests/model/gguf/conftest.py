"""Writes GGUF files as llama.cpp's converter does, with the writer and the names of `gguf`.

Names and values that the converter takes from config.json and changes in tensors are spelled out
here again, so that the reader's tables are compared with something else than themselves.
"""

import io
import json
import pathlib

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch

_PERMUTED = ('q_proj.weight', 'q_proj.bias', 'k_proj.weight', 'k_proj.bias')
_LLAMAS = ('llama', 'smollm3', 'granite')
_TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')


@pytest.fixture(scope='session')
def write_gguf():
  """A function that writes a transformers model: (model, path, kind, change, **metadata).

  `kind` is the type of the matrices, `change` gets the tensors by their GGUF names before they are
  written, and `metadata` holds further keys, without the architecture in front.
  """
  return _write


@pytest.fixture(scope='session')
def byte_level():
  """The metadata of a byte-level vocabulary that would merge across words if nothing split them.

  Its last tokens are a control token, one that is marked as user-defined, and padding.
  """
  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=1500,
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    max_token_length=12,
    show_progress=False,
  )
  trained.train_from_iterator(_texts(), trainer)
  ids = trained.get_vocab()
  tokens = [*sorted(ids, key=ids.get), '<|end|>', '<|start|>', '<tool>', '[PAD0]']
  types = [gguf.TokenType.NORMAL] * len(ids) + [3, 3, gguf.TokenType.USER_DEFINED, 5]
  merges = json.loads(trained.to_str())['model']['merges']
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'gpt-2',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': list(map(int, types)),
    'tokenizer.ggml.merges': [' '.join(merge) for merge in merges],
    'tokenizer.ggml.bos_token_id': len(ids) + 1,
    'tokenizer.ggml.eos_token_id': len(ids),
  }


@pytest.fixture(scope='session')
def sentencepiece_model():
  """The bytes of a sentencepiece model of Llama's kind."""
  model = io.BytesIO()
  lines = [line for text in _texts() for line in text.splitlines() if line]
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines * 10),
    model_writer=model,
    vocab_size=900,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  return model.getvalue()


@pytest.fixture(scope='session')
def pieces(sentencepiece_model):
  """The metadata of that model."""
  model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
  ids = range(model.get_piece_size())
  kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6)]
  return {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.pre': 'default',
    'tokenizer.ggml.tokens': [*map(model.id_to_piece, ids), '<turn>', '<tool>'],
    'tokenizer.ggml.scores': [*map(model.get_score, ids), -1000.0, -1000.0],
    'tokenizer.ggml.token_type': [
      *(next((kind for test, kind in kinds if test(i)), 1) for i in ids),
      *(3, 4),
    ],
  }


def _texts():
  source = pathlib.Path(json.__file__).read_text()
  return [
    source,
    "We've 1,234 things; I'LL say don't.  They're 3.14!\n\n\t\tnaïve café – 日本語 😀\n",
    'HTTPServer camelCase x_1 == y[2] -> "quoted" (parenthesized)...\r\n    indented\n',
  ] * 3


@pytest.fixture(scope='session')
def lines():
  """Lines of prose, of code, and of what tokenizers stumble over."""
  rng = np.random.default_rng(0)
  parts = [' ', '  ', '\n', '\n\n', '\t', '\r\n', '\u00a0', '\u3000', '0', '1234567', '½', 'é']
  parts += [
    'ñ',
    'ß',
    '中文',
    '日本',
    'हि',
    '🚀',
    '👩\u200d👧',
    '_',
    '--',
    '...',
    '"',
    "'s",
    "'LL",
    '’s',
  ]
  parts += ['a', 'word', ' the', 'CamelCase', 'x=1', '{', '//', '#', '<|end|>', '<tool>', '<|en']
  mixed = [''.join(rng.choice(parts, rng.integers(1, 12))) for _ in range(500)]
  return [line for text in _texts()[:3] for line in text.splitlines(keepends=True)] + mixed


def _write(model, path, kind=gguf.GGMLQuantizationType.F32, change=None, tokenizer=None, **more):
  name = {'gpt_neox': 'gptneox', 'mistral': 'llama', 'gemma3_text': 'gemma3'}.get(
    model.config.model_type, model.config.model_type
  )
  writer = gguf.GGUFWriter(path, name)
  _write_config(writer, model.config)
  for key, value in more.items():
    _add(writer, f'{name}.{key.replace("__", ".")}', value)
  for key, value in (tokenizer or {}).items():
    _add(writer, key, value)
  tensors = dict(_tensors(model, name))
  if change is not None:
    change(tensors)
  for tensor_name, array in tensors.items():
    if array.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
      writer.add_tensor(tensor_name, array)
    else:
      writer.add_tensor(tensor_name, gguf.quants.quantize(array, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _add(writer, key, value):
  kinds = {bool: 'bool', int: 'uint32', float: 'float32', str: 'string', list: 'array'}
  for pairs in writer.kv_data:
    pairs.pop(key, None)  # what _write_config wrote
  getattr(writer, f'add_{kinds[type(value)]}')(key, value)


def _write_config(writer, config):
  writer.add_block_count(config.num_hidden_layers)
  writer.add_context_length(config.max_position_embeddings)
  writer.add_embedding_length(config.hidden_size)
  writer.add_head_count(config.num_attention_heads)
  if config.model_type == 'gpt2':
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
  elif config.model_type == 'gpt_neox':
    head = config.hidden_size // config.num_attention_heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_rope_dimension_count(int(head * config.rope_parameters['partial_rotary_factor']))
  else:
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _write_heads_and_rope(writer, config)


def _write_heads_and_rope(writer, config):
  head = getattr(config, 'head_dim', None) or config.hidden_size // config.num_attention_heads
  rope = config.rope_parameters
  if config.model_type == 'gemma3_text':
    rope = rope['full_attention']
  if config.model_type == 'granite':
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)
  if config.model_type == 'gemma2':
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
  if config.model_type == 'phi3':
    writer.add_rope_dimension_count(int(head * rope.get('partial_rotary_factor', 1.0)))
  else:
    writer.add_key_length(head)
    writer.add_value_length(head)
  if config.model_type in ('gemma2', 'gemma3_text', 'phi3'):
    writer.add_sliding_window(config.sliding_window or 0)
  if config.model_type in _LLAMAS:
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head)
  if config.model_type != 'gemma2':
    writer.add_rope_freq_base(rope['rope_theta'])
  if rope['rope_type'] in ('linear', 'yarn'):
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope['rope_type']))
    writer.add_rope_scaling_factor(rope['factor'])
  if rope['rope_type'] == 'yarn':
    writer.add_rope_scaling_orig_ctx_len(rope['original_max_position_embeddings'])
    if 'beta_fast' in rope:
      writer.add_rope_scaling_yarn_beta_fast(rope['beta_fast'])


def _tensors(model, name):
  config = model.config
  architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
  names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
  for key, tensor in model.state_dict().items():
    if key in model._tied_weights_keys and config.tie_word_embeddings:
      continue
    array = tensor.float().numpy()
    if name in _LLAMAS and key.endswith(_PERMUTED):
      kv = '.k_proj.' in key
      heads = config.num_key_value_heads if kv else config.num_attention_heads
      array = _permute(array, heads)
    if name in ('gemma2', 'gemma3') and key.endswith('norm.weight'):
      array = array + np.float32(1)
    if name == 'gpt2' and key.endswith(_TRANSPOSED):
      array = array.T
    if name == 'gptneox' and '.query_key_value.' in key:
      heads = array.reshape(config.num_attention_heads, 3, -1, *array.shape[1:])
      array = np.concatenate([heads[:, i].reshape(-1, *array.shape[1:]) for i in range(3)])
    yield names.get_name(key, ('.weight', '.bias')), np.ascontiguousarray(array)
  if name == 'llama' and config.rope_parameters['rope_type'] == 'llama3':
    yield 'rope_freqs.weight', _llama3_factors(config)


def _permute(array, heads):
  rows = array.shape[1:]
  return array.reshape(heads, 2, -1, *rows).swapaxes(1, 2).reshape(array.shape)


def _llama3_factors(config):
  """What each frequency is divided by, taken from the model that transformers would build."""
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  scaled, _ = ROPE_INIT_FUNCTIONS['llama3'](config, torch.device('cpu'))
  head = getattr(config, 'head_dim', None) or config.hidden_size // config.num_attention_heads
  plain = config.rope_parameters['rope_theta'] ** -(torch.arange(0, head, 2).float() / head)
  return (plain / scaled).numpy()
