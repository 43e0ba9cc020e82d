"""Tokenizers from GGUF metadata against transformers' classes and the sentencepiece library."""

import json
import pathlib

import pytest
import sentencepiece
import tokenizers
import transformers
from sentencepiece import sentencepiece_model_pb2

from model import hf
from model.gguf import pre_tokenizers, to_tokenizer, vocabulary
from model.gguf.container import Container

PREFIX = 'tokenizer.ggml.'
# What stands in the lines, and the token types of the vocabularies say it.
MARKS = {'<|end|>': True, '<|start|>': True, '<tool>': False}


def _container(metadata, **changes):
  changes = {f'{PREFIX}{key}': value for key, value in changes.items()}
  return Container(pathlib.Path('m.gguf'), {**metadata, **changes}, {})


def _reference(kind, metadata):
  """The tokenizer of that name in transformers, from the same vocabulary."""
  tokens = metadata[f'{PREFIX}tokens'][:-1]
  merges = [tuple(merge.split(' ')) for merge in metadata[f'{PREFIX}merges']]
  vocab = {token: i for i, token in enumerate(tokens)}
  special = dict.fromkeys(('unk_token', 'bos_token', 'eos_token', 'pad_token'), '<|end|>')
  built = kind(vocab=vocab, merges=merges, **special)
  for mark, is_special in MARKS.items():
    built.add_tokens([tokenizers.AddedToken(mark, special=is_special, normalized=False)])
  return built


def _smollm(vocab, merges, **special):
  """As the file of SmolLM2 has it: single digits, then what GPT-2 does."""
  built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
  built.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  built.decoder = tokenizers.decoders.ByteLevel()
  return transformers.PreTrainedTokenizerFast(tokenizer_object=built, **special)


@pytest.mark.parametrize(
  'pre, kind',
  [
    ('gpt-2', transformers.GPT2Tokenizer),
    ('qwen2', transformers.Qwen2Tokenizer),
    ('olmo', transformers.GPTNeoXTokenizer),
    ('smollm', _smollm),
  ],
)
def test_byte_level_ids_equal_transformers(pre, kind, byte_level, lines):
  reference = _reference(kind, byte_level)
  ours = to_tokenizer(_container(byte_level, pre=pre))
  lines = [*lines, 'e\u0301 composed', '  \n 12 34']
  for line, ids in zip(lines, ours.encode_many(lines)):
    assert ids == reference.encode(line, add_special_tokens=False), repr(line)
    if 'e\u0301' not in line:
      assert ours.decode(ids) == line


@pytest.mark.parametrize(
  'pre, text, pieces',
  [
    ('llama-bpe', "I'LL 12345 x\n\n y", ['I', "'LL", ' ', '123', '45', ' x', '\n\n', ' y']),
    ('qwen2', "I'LL 123 (x)", ['I', "'LL", ' ', '1', '2', '3', ' (', 'x', ')']),
    ('gpt-2', "I'LL 123  x", ['I', "'", 'LL', ' 123', ' ', ' x']),
    ('smollm', 'v12 3', ['v', '1', '2', ' ', '3']),
    ('default', 'a=1234 b', ['a', '=', '123', '4', ' b']),
    ('tekken', 'HTTPServer camelCase', ['HTTPServer', ' camel', 'Case']),
    ('gpt-4o', "camelCase's 1234", ['camel', "Case's", ' ', '123', '4']),
    ('deepseek-coder', 'a\nb 12', ['a', '\n', 'b', ' ', '1', '2']),
  ],
)
def test_text_is_split_as_the_name_says(pre, text, pieces):
  split = pre_tokenizers.find(pre).build().pre_tokenize_str(text)
  assert [text[start:end] for _, (start, end) in split] == pieces


def test_whole_pieces_that_are_tokens_need_no_merges_where_the_name_says_so(byte_level):
  added = [*byte_level[f'{PREFIX}tokens'][:-1], 'zqzq']
  for pre, ids in (('llama-bpe', [len(added) - 1]), ('dbrx', None)):
    found = to_tokenizer(
      _container(byte_level, pre=pre, tokens=added, token_type=[1] * len(added))
    ).encode('zqzq')
    assert found == ids if ids else len(found) > 1


def test_sentencepiece_ids_equal_the_library(sentencepiece_model, pieces, lines):
  library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
  ours = to_tokenizer(_container(pieces))
  lines = [line for line in lines if '<tool>' not in line]
  for line, ids in zip(lines, ours.encode_many(lines)):
    assert ids == library.encode(line), repr(line)
    assert ours.decode(ids) == library.decode(ids)
  assert (ours.bos_id, ours.eos_ids) == (1, (2,))


def test_scores_and_not_ids_say_which_pieces_merge_first(pieces, lines):
  """The same tokens with ids in the opposite order give the same pieces."""
  keys = [f'{PREFIX}{key}' for key in ('tokens', 'scores', 'token_type')]
  turned = {**pieces, **{key: pieces[key][::-1] for key in keys}}
  last = len(pieces[f'{PREFIX}tokens']) - 1
  ids = {'unknown_token_id': last, 'bos_token_id': last - 1, 'eos_token_id': last - 2}
  ours = to_tokenizer(_container(turned, **ids))
  for line, expected in zip(lines, to_tokenizer(_container(pieces)).encode_many(lines)):
    assert [last - i for i in ours.encode(line)] == expected, repr(line)


def test_pieces_around_special_tokens(sentencepiece_model, pieces):
  """Each stretch of text is on its own, with a leading space unless the file says otherwise."""
  library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
  size = library.get_piece_size()
  text = 'self<turn>json  x<tool><s>def'
  parts = [library.encode(part) for part in ('self', 'json  x', 'def')]
  expected = [*parts[0], size, *parts[1], size + 1, 1, *parts[2]]
  assert to_tokenizer(_container(pieces)).encode(text) == expected


def test_a_file_may_say_that_text_begins_without_a_space(sentencepiece_model, pieces, lines):
  proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model)
  proto.normalizer_spec.add_dummy_prefix = False
  library = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
  ours = to_tokenizer(_container(pieces, add_space_prefix=False))
  for line in lines:
    if '<tool>' not in line:
      assert ours.encode(line) == library.encode(line), repr(line)
  assert ours.decode(ours.encode(' json')) == ' json'


def test_settings_special_tokens_and_template(byte_level):
  metadata = {**byte_level, 'tokenizer.chat_template': '{{ messages[0].content }}{{ eos_token }}'}
  tokens = byte_level[f'{PREFIX}tokens']
  end, start = tokens.index('<|end|>'), tokens.index('<|start|>')
  ours = to_tokenizer(_container(metadata, padding_token_id=start, eos_token_id=7))
  # A control token with a name that ends turns does so too; the file's own comes first.
  assert (ours.bos_id, ours.eos_ids) == (start, (7, end))
  settings = json.loads(ours.files['tokenizer_config.json'])
  assert settings['pad_token'] == '<|start|>' and settings['add_bos_token'] is False
  assert ours.apply_chat_template([{'role': 'user', 'content': 'hi'}]) == f'hi{tokens[7]}'
  assert ours.vocab_size == len(tokens) - 1  # padding is no token
  assert ours.decode([end, tokens.index('<tool>')], skip_special=True) == '<tool>'


@pytest.mark.parametrize(
  'changes, adds',
  [
    ({}, False),
    ({'pre': 'llama-bpe'}, True),
    ({'pre': 'llama-bpe', 'add_bos_token': False}, False),
    ({'add_bos_token': True, 'add_eos_token': True}, True),
  ],
)
def test_a_saved_model_gives_transformers_the_same_tokens(
  changes, adds, byte_level, lines, write_gguf, tmp_path
):
  size = len(byte_level[f'{PREFIX}tokens'])
  config = transformers.LlamaConfig(
    vocab_size=size, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
  )
  metadata = _container(byte_level, **changes).metadata
  network = transformers.LlamaForCausalLM(config)
  path = write_gguf(network, tmp_path / 'm.gguf', tokenizer=metadata)
  model, tokenizer = hf.load_pretrained(path)
  assert (model.config.bos_id, model.config.eos_ids) == (size - 3, (size - 4,))
  hf.save_pretrained(model, tokenizer, tmp_path / 'folder')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'folder')
  for line in lines:
    ids = tokenizer.encode(line)
    assert theirs.encode(line, add_special_tokens=False) == ids
    eos = [size - 4] if changes.get('add_eos_token') else []
    assert theirs.encode(line) == [size - 3] * adds + ids + eos
    assert theirs.decode(ids) == tokenizer.decode(ids)
  assert hf.load_pretrained(tmp_path / 'folder')[1].encode_many(lines) == tokenizer.encode_many(
    lines
  )


@pytest.mark.parametrize(
  'changes, match',
  [
    ({'model': 't5'}, r"tokenizer\.ggml\.model = 't5' is not supported; supported: gpt2, llama"),
    ({'pre': 'poro-chat'}, r"tokenizer\.ggml\.pre = 'poro-chat' is not supported; .*smollm"),
    ({'merges': []}, r'tokenizer\.ggml\.merges is missing'),
    ({'tokens': []}, r'token_type has \d+ entries, but there are 0 tokens'),
    ({'token_type': [1]}, r'token_type has 1 entries, but there are \d+ tokens'),
    ({'merges': ['zzz yyy']}, 'the vocabulary is damaged'),
    ({'bos_token_id': 99999}, r'bos_token_id = 99999 is no id of one of \d+ tokens'),
    ({'add_bos_token': 'yes'}, "add_bos_token must be of bool, not 'yes'"),
    ({'tokens': [1, 2]}, r'tokenizer\.ggml\.tokens must be a list of str'),
  ],
)
def test_damaged_vocabularies_are_named(changes, match, byte_level):
  with pytest.raises(ValueError, match=f'm.gguf: .*{match}'):
    to_tokenizer(_container(byte_level, **changes))


def test_sentencepiece_needs_scores_and_no_vocabulary_is_none(pieces):
  with pytest.raises(ValueError, match=r'tokenizer\.ggml\.scores is missing'):
    to_tokenizer(_container(pieces, scores=[]))
  assert to_tokenizer(_container({})) is None
  assert vocabulary.special_ids(_container({}))['eos_token_id'] is None
