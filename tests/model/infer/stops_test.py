"""Stop strings: the text is that of an oracle that looks at one character after the other."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.infer.stops import StoppedText
from model.tokenizer import Tokenizer

TEXT = 'abc abca né 東京 🎉 aab stop'


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer.train_bpe([TEXT] * 3, 290)


def _oracle(text, stops, included):
  """The text before (or after) the stop string that is complete first, of equals the longest."""
  for end in range(len(text) + 1):
    met = [stop for stop in stops if text[:end].endswith(stop)]
    if met:
      stop = max(met, key=len)
      return text[: end if included else end - len(stop)], stop
  return text, None


@settings(max_examples=150, deadline=None)
@given(
  st.text('abc n🎉', max_size=12),
  st.lists(st.text('abc n🎉', min_size=1, max_size=4), max_size=3),
  st.booleans(),
)
def test_the_oracle_agrees(tokenizer, text, stops, included):
  prompt = tokenizer.encode('ab')
  found = StoppedText(tokenizer, prompt, stops, included=included)
  pieces = []
  for token in tokenizer.encode(text):
    pieces.append(found.push(token))
    assert found.given == len(''.join(pieces)) <= found.known
    if found.stop is not None:
      break
  pieces.append(found.end())
  assert (''.join(pieces), found.stop) == _oracle(text, stops, included)
  assert found.given == found.known == len(''.join(pieces))


def test_the_beginning_of_a_stop_string_is_held_back(tokenizer):
  text = StoppedText(tokenizer, [], ['stop'])
  bytes_of = {c: tokenizer.encode(c)[0] for c in 'stoxp'}
  assert [text.push(bytes_of[c]) for c in 'xsto'] == ['x', '', '', '']
  assert (text.push(bytes_of['s']), text.push(bytes_of['x'])) == ('sto', 'sx')
  assert [text.push(bytes_of[c]) for c in 'stop'] == ['', '', '', '']
  assert (text.stop, text.end()) == ('stop', '')


@pytest.mark.parametrize('special, text', [(False, 'ab'), (True, 'a<|endoftext|>b')])
def test_special_tokens_are_text_where_they_are_asked_for(tokenizer, special, text):
  found = StoppedText(tokenizer, tokenizer.encode('ab'), special=special)
  tokens = [*tokenizer.encode('a'), 0, *tokenizer.encode('b')]
  assert ''.join(map(found.push, tokens)) + found.end() == text


def test_an_empty_stop_string_is_refused(tokenizer):
  with pytest.raises(ValueError, match='at least one character'):
    StoppedText(tokenizer, [], ['a', ''])
