"""GGUF files against llama.cpp; skipped where the package llama-cpp-python is not installed.

  LISSOM_GGUF=model.gguf python -m pytest tests/model/gguf/llama_cpp_test.py

also compares the tokens of 10,000 lines, and the logits, of that model. llama.cpp multiplies
quantized weights by activations that it rounds to 8 bits, so logits are compared on the weights
written out in float32.
"""

import ctypes
import os
import pathlib
import pydoc_data.topics
import random
import sysconfig
import unicodedata

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from model import hf
from model.gguf import pre_tokenizers, read, to_tokenizer

llama_cpp = pytest.importorskip('llama_cpp')

# Both compute in float32 and add in different orders; logits are of order 1.
LOGIT_TOLERANCE = 1e-4
PREFIX = 'tokenizer.ggml.'
K_TYPES = {'Q2_K': 10, 'Q3_K': 12, 'Q4_K': 15, 'Q5_K': 17, 'Q6_K': 18}  # llama.cpp's file types
FLOAT32_FILE = 0
FLOAT32_CACHE = {'type_k': 0, 'type_v': 0}
# llama.cpp's patterns for these leave combining marks out of words; those of the originals do not.
NO_MARKS = ('tekken', 'gpt-4o')


def _llama(vocab_size, **changes):
  config = transformers.LlamaConfig(
    vocab_size=vocab_size,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    **changes,
  )
  torch.manual_seed(0)
  return transformers.LlamaForCausalLM(config).eval()


def _open(path, **options):
  return llama_cpp.Llama(str(path), verbose=False, **options)


def _assert_same_tokens(path, lines):
  theirs = _open(path, vocab_only=True)
  ours = to_tokenizer(read(path)).encode_many(lines)
  for line, ids in zip(lines, ours):
    assert ids == theirs.tokenize(line.encode(), add_bos=False, special=True), repr(line)


@pytest.mark.parametrize('pre', pre_tokenizers.PRE_TOKENIZERS)
def test_byte_level_ids(pre, byte_level, lines, write_gguf, tmp_path):
  metadata = {**byte_level, f'{PREFIX}pre': pre}
  model = _llama(len(byte_level[f'{PREFIX}tokens']))
  path = write_gguf(model, tmp_path / 'm.gguf', tokenizer=metadata)
  if pre in NO_MARKS:
    lines = [line for line in lines if not any(unicodedata.category(c)[0] == 'M' for c in line)]
  _assert_same_tokens(path, lines)


@pytest.mark.parametrize('prefix', [True, False])
def test_sentencepiece_ids(prefix, pieces, lines, write_gguf, tmp_path):
  metadata = {**pieces, f'{PREFIX}add_space_prefix': prefix}
  model = _llama(len(pieces[f'{PREFIX}tokens']))
  path = write_gguf(model, tmp_path / 'm.gguf', tokenizer=metadata)
  _assert_same_tokens(path, lines)


def _requantize(source, target, file_type):
  options = llama_cpp.llama_model_quantize_default_params()
  options.ftype, options.pure, options.allow_requantize = file_type, True, True
  names = str(source).encode(), str(target).encode()
  assert llama_cpp.llama_model_quantize(*names, ctypes.byref(options)) == 0
  return target


@pytest.mark.parametrize('kind', K_TYPES)
def test_k_types(kind, byte_level, write_gguf, tmp_path):
  """The weights equal those that llama.cpp dequantizes itself."""
  model = _llama(len(byte_level[f'{PREFIX}tokens']), head_dim=64)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      **{**model.config.to_dict(), 'hidden_size': 256, 'intermediate_size': 512}
    )
  )
  path = write_gguf(model, tmp_path / 'm.gguf', tokenizer=byte_level)
  small = _requantize(path, tmp_path / 'small.gguf', K_TYPES[kind])
  assert kind in {tensor.tensor_type.name for tensor in gguf.GGUFReader(small).tensors}
  wide = _requantize(small, tmp_path / 'wide.gguf', FLOAT32_FILE)
  ours, theirs = read(small).tensors, read(wide).tensors
  assert ours.keys() == theirs.keys()
  for name, tensor in ours.items():
    np.testing.assert_allclose(
      tensor.read(), theirs[name].read(), rtol=1e-6, atol=1e-7, err_msg=name
    )


def _their_logits(path, ids):
  theirs = _open(path, n_ctx=len(ids), logits_all=True, **FLOAT32_CACHE)
  theirs.eval(list(ids))
  return np.array(theirs.scores[: len(ids)])


def _our_logits(path, ids):
  model, _ = hf.load_pretrained(path)
  return np.asarray(model(jnp.asarray([ids], jnp.int32)))[0]


@pytest.mark.parametrize(
  'rope',
  [
    {'rope_type': 'default'},
    {'rope_type': 'linear', 'factor': 2.0},
    {
      'rope_type': 'llama3',
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 32,
    },
  ],
  ids=lambda rope: rope['rope_type'],
)
def test_logits(rope, byte_level, write_gguf, tmp_path):
  size = len(byte_level[f'{PREFIX}tokens'])
  model = _llama(size, rope_parameters={'rope_theta': 500.0, **rope}, initializer_range=0.15)
  path = write_gguf(model, tmp_path / 'm.gguf', tokenizer=byte_level)
  ids = np.random.default_rng(0).integers(0, size, 64).tolist()
  np.testing.assert_allclose(_our_logits(path, ids), _their_logits(path, ids), atol=LOGIT_TOLERANCE)


@pytest.fixture
def real():
  if 'LISSOM_GGUF' not in os.environ:
    pytest.skip('LISSOM_GGUF names no file')
  return pathlib.Path(os.environ['LISSOM_GGUF'])


def test_tokens_of_a_real_model_on_ten_thousand_lines(real, lines):
  found = [line for text in pydoc_data.topics.topics.values() for line in text.splitlines(True)]
  for path in sorted(pathlib.Path(sysconfig.get_paths()['stdlib']).glob('*.py')):
    found += path.read_text(encoding='utf-8').splitlines(True)
  random.Random(0).shuffle(found)
  _assert_same_tokens(real, found[:10_000] + lines)


def test_logits_of_a_real_model(real, tmp_path):
  """On the weights in float32; logits of a trained model are of order 10."""
  wide = _requantize(real, tmp_path / 'wide.gguf', FLOAT32_FILE)
  ids = to_tokenizer(read(real)).encode(pydoc_data.topics.topics['while'])[:128]
  np.testing.assert_allclose(
    _our_logits(real, ids), _their_logits(wide, ids), atol=10 * LOGIT_TOLERANCE
  )
