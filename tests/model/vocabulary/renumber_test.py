"""New ids in the files of a tokenizer, by hand."""

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from model.tokenizer import Tokenizer
from model.vocabulary import renumber

VOCAB = {'<s>': 0, '</s>': 1, 'a': 2, 'b': 3, 'c': 4, 'ab': 5, 'abc': 6}


def _tokenizer(**files):
  built = tokenizers.Tokenizer(models.BPE(vocab=VOCAB, merges=[('a', 'b'), ('ab', 'c')]))
  built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  built.add_special_tokens(['<s>', '</s>'])
  data = {name: json.dumps(value).encode() for name, value in files.items()}
  return Tokenizer.from_files({'tokenizer.json': built.to_str().encode(), **data})


def test_merges_of_dropped_tokens_go_and_ids_move_in_every_file():
  settings = {
    'bos_token': '<s>',
    'eos_token': '</s>',
    'added_tokens_decoder': {'0': {'content': '<s>'}, '1': {'content': '</s>'}},
  }
  generation = {
    'eos_token_id': [1, 0],
    'pad_token_id': 1,
    'suppress_tokens': [2, 6, -1],
    'bad_words_ids': [[3, 4]],
    'top_k': 5,
  }
  tokenizer = _tokenizer(
    **{
      'tokenizer_config.json': settings,
      'generation_config.json': generation,
      'added_tokens.json': {'</s>': 1},
      'vocab.json': VOCAB,
    }
  )
  result = renumber.renumbered(tokenizer, [0, 1, 2, 3, 4, 6])
  data = json.loads(result.files['tokenizer.json'])
  assert data['model']['merges'] == []
  assert data['model']['vocab'] == {'<s>': 0, '</s>': 1, 'a': 2, 'b': 3, 'c': 4, 'abc': 5}
  assert result.encode('abc') == [2, 3, 4]  # without ab, nothing leads to abc
  assert 'vocab.json' not in result.files
  moved = json.loads(result.files['generation_config.json'])
  assert moved == {**generation, 'suppress_tokens': [2, 5, -1]}
  assert json.loads(result.files['added_tokens.json']) == {'</s>': 1}


def test_a_special_token_that_is_not_kept_is_named():
  with pytest.raises(ValueError, match=r'have to stay, but \[1\] do not'):
    renumber.renumbered(_tokenizer(), [0, 2, 3])
  suppressed = _tokenizer(**{'generation_config.json': {'suppress_tokens': [4]}})
  with pytest.raises(ValueError, match=r'have to stay, but \[4\] do not'):
    renumber.renumbered(suppressed, [0, 1, 2, 3])


def test_post_processors_of_all_kinds():
  template = {'type': 'TemplateProcessing', 'single': []}
  template['special_tokens'] = {'<s>': {'id': '<s>', 'ids': [7], 'tokens': ['<s>']}}
  pair = {'type': 'RobertaProcessing', 'sep': ['</s>', 8], 'cls': ['<s>', 7]}
  node = {'type': 'Sequence', 'processors': [{'type': 'ByteLevel'}, template, pair]}
  moved = renumber.processor(node, {7: 1, 8: 2})['processors']
  assert moved[0] == {'type': 'ByteLevel'}
  assert moved[1]['special_tokens']['<s>'] == {'id': '<s>', 'ids': [1], 'tokens': ['<s>']}
  assert (moved[2]['sep'], moved[2]['cls']) == (['</s>', 2], ['<s>', 1])
  assert renumber.processor(None, {}) is None
  assert template['special_tokens']['<s>']['ids'] == [7]  # what was given is not changed
