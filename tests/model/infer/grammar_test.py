"""Grammars: a random walk through their masks writes what they say, checked without them."""

import json
import re

import numpy as np
import pytest

from model.infer.grammar import Vocabulary
from model.tokenizer import Tokenizer

SCHEMA = {
  'type': 'object',
  'properties': {'name': {'enum': ['né', 'x y']}, 'n': {'type': 'integer', 'maximum': 500}},
  'required': ['name', 'n'],
  'additionalProperties': False,
}
VOCAB_SIZE = 301  # rows of the model: two more than tokens, and no multiple of 32


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer.train_bpe(['{"name": "né", "n": 12} 🎉 x y ab abab'] * 3, 299)


@pytest.fixture(scope='module')
def vocabulary(tokenizer):
  return Vocabulary(tokenizer, VOCAB_SIZE, tokenizer.eos_ids)


def _allowed(guide):
  mask = guide.mask()
  assert (mask.dtype, mask.shape) == (np.uint32, (10,))
  bits = np.unpackbits(mask.view(np.uint8), bitorder='little')
  assert not bits[VOCAB_SIZE:].any()
  return np.flatnonzero(bits)


def _walk(guide, tokenizer, rng):
  tokens = []
  while True:
    token = rng.choice(_allowed(guide))
    guide.advance(token)
    if token in tokenizer.eos_ids:
      return tokenizer.decode(tokens)
    tokens.append(token)


def test_json_schemas(vocabulary, tokenizer, rng):
  grammar = vocabulary.json(SCHEMA)
  for _ in range(20):
    value = json.loads(_walk(grammar.guide(), tokenizer, rng))
    assert set(value) == {'name', 'n'}
    assert value['name'] in SCHEMA['properties']['name']['enum']
    assert type(value['n']) is int and value['n'] <= 500


@pytest.mark.parametrize(
  'make, pattern', [('regex', '(ab){2,4}|🎉+x'), ('lark', 'start: "ab" "x"+')]
)
def test_regular_expressions_and_grammars(vocabulary, tokenizer, rng, make, pattern):
  grammar = getattr(vocabulary, make)(pattern)
  expected = '(ab){2,4}|🎉+x' if make == 'regex' else 'abx+'
  for _ in range(20):
    assert re.fullmatch(expected, _walk(grammar.guide(), tokenizer, rng))


def test_tokens_that_are_allowed_are_all_that_continue_the_text(vocabulary, tokenizer):
  guide = vocabulary.regex('abab?x').guide()
  for token in tokenizer.encode('aba'):
    guide.advance(token)
  texts = {token: tokenizer.decode([token]) for token in range(1, tokenizer.vocab_size)}
  fits = [t for t, text in texts.items() if text and re.match(f'{re.escape(text)}', 'bx')]
  fits += [t for t, text in texts.items() if text == 'x']
  assert sorted(_allowed(guide)) == sorted(fits)


def test_guides_of_a_grammar_do_not_know_each_other(vocabulary, tokenizer):
  grammar = vocabulary.regex('abx')
  first, second = grammar.guide(), grammar.guide()
  first.advance(tokenizer.encode('ab')[0])
  assert list(_allowed(first)) != list(_allowed(second))


def test_after_a_token_that_is_not_allowed_only_the_end_may_come(vocabulary, tokenizer):
  guide = vocabulary.regex('ab').guide()
  for _ in range(2):
    guide.advance(tokenizer.encode('x')[0])
    assert list(_allowed(guide)) == list(tokenizer.eos_ids)


@pytest.mark.parametrize(
  'make, value, message',
  [
    ('regex', '(a', 'regular expression cannot be followed.*unclosed group'),
    ('json', {'type': 'nope'}, 'JSON schema cannot be followed.*nope'),
    ('json', {'$ref': 'http://example.org/x'}, 'JSON schema cannot be followed'),
    ('json', {'minimum': float('inf')}, 'JSON schema cannot be followed'),
    ('lark', 'start: nothing', 'grammar cannot be followed'),
  ],
)
def test_what_cannot_be_followed_is_refused(vocabulary, make, value, message):
  with pytest.raises(ValueError, match=f'(?s){message}'):
    getattr(vocabulary, make)(value)


def test_a_model_without_an_end_token_follows_no_grammar(tokenizer):
  with pytest.raises(ValueError, match='no end token'):
    Vocabulary(tokenizer, VOCAB_SIZE, ()).regex('a')


def test_bytes_of_tokens_join_to_the_text(vocabulary, tokenizer):
  text = 'né 🎉 {"n": 12}'
  pieces = [vocabulary.bytes_of(token) for token in tokenizer.encode(text)]
  assert b''.join(pieces).decode() == text
  assert vocabulary.bytes_of(0) == b'<|endoftext|>'
