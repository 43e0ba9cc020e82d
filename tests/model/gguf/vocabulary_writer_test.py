"""Vocabularies that are written: from files of both kinds, and from Hugging Face folders."""

import json
import pathlib

import pytest
import tokenizers
import transformers

from model.config import ModelConfig
from model.gguf import pre_tokenizers, to_tokenizer, vocabulary_writer
from model.gguf.container import Container
from model.hf_names import config_from_hf
from model.tokenizer import Tokenizer

PREFIX = 'tokenizer.ggml.'


def _config(vocab_size, **ids) -> ModelConfig:
  hf = {'model_type': 'llama', 'hidden_size': 8, 'num_attention_heads': 1, 'vocab_size': vocab_size}
  return config_from_hf({**hf, 'num_hidden_layers': 1, 'bos_token_id': None, **ids})


def _container(metadata):
  return Container(pathlib.Path('m.gguf'), metadata, {})


def _again(metadata):
  """What is written of the tokenizer that is read from metadata, and the notes."""
  config = _config(len(metadata[f'{PREFIX}tokens']), eos_token_id=None)
  return vocabulary_writer.describe(to_tokenizer(_container(metadata)), config)


@pytest.mark.parametrize('pre', ['gpt-2', 'smollm', 'llama-bpe', 'qwen2', 'tekken', 'default'])
def test_byte_level_comes_back(pre, byte_level):
  metadata = {
    **byte_level,
    f'{PREFIX}pre': pre,
    f'{PREFIX}add_bos_token': True,
    f'{PREFIX}padding_token_id': byte_level[f'{PREFIX}eos_token_id'],
    'tokenizer.chat_template': '{{ messages }}',
  }
  found, notes = _again(metadata)
  assert notes == []
  size = len(metadata[f'{PREFIX}tokens'])
  metadata[f'{PREFIX}tokens'] = [*metadata[f'{PREFIX}tokens'][:-1], f'[PAD{size - 1}]']
  assert found == {**metadata, f'{PREFIX}add_eos_token': False}


def test_every_way_to_split_has_a_name_of_its_own():
  for name, row in pre_tokenizers.PRE_TOKENIZERS.items():
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = row.build()
    if row.composed:
      built.normalizer = row.normalizer()
    found, notes = pre_tokenizers.name_of(built, row.ignore_merges, vocabulary_writer.TRAPS)
    other = pre_tokenizers.PRE_TOKENIZERS[found]
    assert notes == []
    assert (other.patterns, other.digits) == (row.patterns, row.digits), name
    assert (other.composed, other.ignore_merges) == (row.composed, row.ignore_merges), name


@pytest.mark.parametrize('prefix', [True, False])
def test_sentencepiece_comes_back(prefix, pieces, lines):
  metadata = {**pieces, f'{PREFIX}add_space_prefix': prefix, f'{PREFIX}add_bos_token': True}
  found, notes = _again(metadata)
  assert notes == []
  for key in ('model', 'pre', 'tokens', 'token_type', 'add_space_prefix', 'add_bos_token'):
    assert found[f'{PREFIX}{key}'] == metadata[f'{PREFIX}{key}'], key
  assert (found[f'{PREFIX}bos_token_id'], found[f'{PREFIX}unknown_token_id']) == (1, 0)
  ours, theirs = (to_tokenizer(_container(one)).encode_many(lines) for one in (found, metadata))
  assert ours == theirs


def test_scores_are_those_of_the_sentencepiece_file(sentencepiece_model, pieces, tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(sentencepiece_model)
  (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "LlamaTokenizer"}')
  size = len(pieces[f'{PREFIX}tokens'])
  found, _ = vocabulary_writer.describe(Tokenizer.load(tmp_path), _config(size))
  assert found[f'{PREFIX}scores'][:-2] == pieces[f'{PREFIX}scores'][:-2]
  assert found[f'{PREFIX}token_type'][:-2] == pieces[f'{PREFIX}token_type'][:-2]
  assert found[f'{PREFIX}tokens'][-2:] == [f'[PAD{size - 2}]', f'[PAD{size - 1}]']
  assert found[f'{PREFIX}token_type'][-2:] == [5, 5]


@pytest.mark.parametrize(
  'kind, pre', [(transformers.GPT2Tokenizer, 'gpt-2'), (transformers.Qwen2Tokenizer, 'qwen2')]
)
def test_folders_of_transformers(kind, pre, byte_level, lines, tmp_path):
  tokens = byte_level[f'{PREFIX}tokens'][:-1]
  merges = [tuple(merge.split(' ')) for merge in byte_level[f'{PREFIX}merges']]
  special = dict.fromkeys(('unk_token', 'bos_token', 'eos_token', 'pad_token'), '<|end|>')
  kind(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, **special).save_pretrained(
    tmp_path
  )
  tokenizer = Tokenizer.load(tmp_path)
  found, notes = vocabulary_writer.describe(tokenizer, _config(len(tokens) + 4))
  assert notes == [] and found[f'{PREFIX}pre'] == pre
  end = tokens.index('<|end|>')
  for name in ('bos', 'eos', 'padding', 'unknown'):
    assert found[f'{PREFIX}{name}_token_id'] == end
  assert to_tokenizer(_container(found)).encode_many(lines) == tokenizer.encode_many(lines)


def test_a_trained_tokenizer_is_smollm_and_fills_up_with_padding():
  tokenizer = Tokenizer.train_bpe(['some words and some more words'] * 3, 300)
  found, notes = vocabulary_writer.describe(tokenizer, _config(310))
  assert notes == [] and found[f'{PREFIX}pre'] == 'smollm'
  assert found[f'{PREFIX}tokens'][-1] == '[PAD309]'


def test_what_is_lost_is_said(byte_level):
  metadata = {**byte_level, f'{PREFIX}add_bos_token': False}
  tokenizer = to_tokenizer(_container(metadata))
  size = len(byte_level[f'{PREFIX}tokens'])
  _, notes = vocabulary_writer.describe(tokenizer, _config(size - 2, eos_token_id=[1, 2, 3, 4]))
  assert notes[0] == f'1 tokens beyond the {size - 2} rows of the model are left out: <tool>'
  assert 'only 3 of the 5 tokens that end a text are in the file' in notes


def test_what_differs_is_said(byte_level):
  data = json.loads(to_tokenizer(_container(byte_level)).files['tokenizer.json'])
  data['normalizer'] = {'type': 'Lowercase'}
  tokenizer = Tokenizer.from_files({'tokenizer.json': json.dumps(data).encode()})
  _, notes = vocabulary_writer.describe(tokenizer, _config(len(byte_level[f'{PREFIX}tokens'])))
  assert notes[0] == 'the normalization of text before it is split is not in the file (gpt-2)'
  assert notes[1].startswith('the tokenizer in the file gives other ids for')


def test_unknown_vocabularies_and_splits_are_refused(byte_level):
  built = tokenizers.Tokenizer(tokenizers.models.Unigram([('a', 0.0), ('b', -1.0)], 0, False))
  tokenizer = Tokenizer.from_files({'tokenizer.json': built.to_str().encode()})
  with pytest.raises(ValueError, match='of the kind Unigram is not written to GGUF files; BPE is'):
    vocabulary_writer.describe(tokenizer, _config(8))
  built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={'a': 0}, merges=[]))
  built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
  with pytest.raises(
    ValueError, match='splits text in a way that has no name in GGUF files; known'
  ):
    vocabulary_writer.describe(
      Tokenizer.from_files({'tokenizer.json': built.to_str().encode()}), _config(8)
    )
