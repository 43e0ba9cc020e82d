"""Tokenizers that are one and the same, longer by some tokens, or different in one token."""

import json

import pytest

from model import shared_vocabulary
from model.tokenizer import Tokenizer

TEXTS = ['def main(argv):\n    return 1234 + 5678\n', 'the cat and the dog sat on the mat ' * 3]


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer.train_bpe(TEXTS, 270)


def _changed(tokenizer, change):
  data = json.loads(tokenizer.files['tokenizer.json'])
  change(data)
  return Tokenizer.from_files({**tokenizer.files, 'tokenizer.json': json.dumps(data).encode()})


def test_a_tokenizer_shares_all_with_its_copy(tokenizer):
  again = Tokenizer.train_bpe(TEXTS, 270)
  assert shared_vocabulary.length(tokenizer, again) == tokenizer.vocab_size == 270
  assert shared_vocabulary.fingerprint(tokenizer) == shared_vocabulary.fingerprint(again)


def test_added_tokens_do_not_count(tokenizer):
  token = {'id': 270, 'content': '<|tool|>', 'special': True, 'single_word': False}
  token |= {'lstrip': False, 'rstrip': False, 'normalized': False}
  longer = _changed(tokenizer, lambda data: data['added_tokens'].append(token))
  assert longer.vocab_size == 271
  assert shared_vocabulary.length(longer, tokenizer) == 270
  assert shared_vocabulary.length(tokenizer, longer) == 270
  assert shared_vocabulary.fingerprint(longer) != shared_vocabulary.fingerprint(tokenizer)


def test_a_tokenizer_of_equal_length_with_other_tokens_is_found_by_a_probe(tokenizer):
  other = Tokenizer.train_bpe(['a quick brown fox jumps over a lazy dog ' * 5], 270)
  assert other.vocab_size == tokenizer.vocab_size
  with pytest.raises(ValueError, match=r"a teacher of another tokenizer: 'The quick brown fox"):
    shared_vocabulary.length(other, tokenizer)


def test_two_tokens_that_change_places_are_found_though_no_probe_has_them(tokenizer):
  names = ['ĊĿ', 'ŀŁ']  # made up: no merge leads to them

  def add(order):
    def change(data):
      data['model']['vocab'] |= {name: 270 + at for at, name in enumerate(order)}

    return change

  one, two = _changed(tokenizer, add(names)), _changed(tokenizer, add(names[::-1]))
  assert one.encode(TEXTS[0]) == two.encode(TEXTS[0])
  with pytest.raises(ValueError, match=r"token 270 is 'ĊĿ' for the teacher and 'ŀŁ' for the stud"):
    shared_vocabulary.length(one, two)


def test_another_end_of_text_is_named(tokenizer):
  settings = json.loads(tokenizer.files['tokenizer_config.json'])
  del settings['eos_token']
  files = {'tokenizer_config.json': settings, 'generation_config.json': {'eos_token_id': 5}}
  files = {name: json.dumps(data).encode() for name, data in files.items()}
  other = Tokenizer.from_files({**tokenizer.files, **files})
  with pytest.raises(ValueError, match=r'a text ends with tokens \[5\] there and \[0\] here'):
    shared_vocabulary.length(other, tokenizer)
