"""Streamed text against the decoding of the whole, of bytes and of sentencepiece."""

import functools
import io

import hypothesis
import sentencepiece
from hypothesis import strategies as st

from model.text_stream import TextStream
from model.tokenizer import Tokenizer

CORPUS = ['It is time that we can: né 東京 🎉, <s> and\n\n  two  spaces.', 'time can time and can']


@functools.cache  # hypothesis refuses fixtures of a function's scope
def _bytes():
  return Tokenizer.train_bpe(CORPUS, 330)


@functools.cache
def _pieces():
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS * 20),
    model_writer=model,
    vocab_size=320,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  config = b'{"tokenizer_class": "LlamaTokenizer"}'
  return Tokenizer.from_files(
    {'tokenizer.model': model.getvalue(), 'tokenizer_config.json': config}
  )


def _streamed(tokenizer, prompt, new):
  stream = TextStream(tokenizer, prompt)
  pieces = [stream.push(token) for token in new]
  return [*pieces, stream.end()]


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.text(max_size=8), st.lists(st.integers(0, 329), max_size=24))
def test_any_bytes_join_to_the_whole(prompt, new):
  tokenizer = _bytes()
  prompt = tokenizer.encode(prompt)
  pieces = _streamed(tokenizer, prompt, new)
  assert ''.join(pieces) == tokenizer.continuation(prompt, new)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
  st.text('ti mecan日🎉é\n<>s/', max_size=8), st.text('ti mecan日🎉é\n<>s/', max_size=16), st.data()
)
def test_sentencepiece_keeps_spaces_and_whole_characters(prompt, text, data):
  tokenizer = _pieces()
  prompt, new = tokenizer.encode(prompt), tokenizer.encode(text)
  at = data.draw(st.integers(0, len(new)))
  new = [*new[:at], tokenizer.eos_ids[0], *new[at:]]  # special tokens are left out
  hypothesis.assume('\ufffd' not in tokenizer.decode(new, skip_special=True))
  pieces = _streamed(tokenizer, prompt, new)
  assert ''.join(pieces) == tokenizer.continuation(prompt, new)
  assert '\ufffd' not in ''.join(pieces)


def test_the_first_word_keeps_its_space():
  tokenizer = _pieces()
  prompt, new = tokenizer.prompt('time'), tokenizer.encode('can')
  assert tokenizer.decode(new) == 'can'
  assert tokenizer.continuation(prompt, new) == ' can'
  assert ''.join(_streamed(tokenizer, prompt, new)) == ' can'
  assert ''.join(_streamed(tokenizer, [], new)) == 'can'


def test_characters_of_several_tokens_come_whole():
  for tokenizer in (_bytes(), _pieces()):
    new = tokenizer.encode('🎈')
    assert len(new) > 2
    pieces = _streamed(tokenizer, tokenizer.encode('a'), new)
    assert [piece for piece in pieces if piece] in (['🎈'], [' 🎈'], [' ', '🎈'])
    cut = _streamed(tokenizer, tokenizer.encode('a'), new[:-1])
    assert set(''.join(cut).strip(' ')) == {'\ufffd'} and cut[-1].startswith('\ufffd')


def test_a_long_stream_decodes_few_tokens_at_a_time(monkeypatch):
  tokenizer = _bytes()
  lengths, decode = [], Tokenizer.decode
  monkeypatch.setattr(
    Tokenizer, 'decode', lambda self, ids, **kw: lengths.append(len(ids)) or decode(self, ids, **kw)
  )
  stream = TextStream(tokenizer, tokenizer.encode(CORPUS[0] * 4))
  lengths.clear()
  for token in tokenizer.encode(CORPUS[1] * 50):
    stream.push(token)
  assert max(lengths[4:]) < 8
