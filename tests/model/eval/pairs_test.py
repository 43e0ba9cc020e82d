"""Where contexts end in tokens: the rules of lm-evaluation-harness, with transformers."""

import json

import pytest
import transformers

from model.eval import pairs
from model.tokenizer import END_OF_TEXT, Tokenizer

TEXTS = ['The quick brown fox jumps over the lazy dog, and the dog sleeps.', 'Größe 東京 🎉'] * 3
WITH_BOS = {
  'type': 'TemplateProcessing',
  'single': [
    {'SpecialToken': {'id': END_OF_TEXT, 'type_id': 0}},
    {'Sequence': {'id': 'A', 'type_id': 0}},
  ],
  'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 0}}],
  'special_tokens': {END_OF_TEXT: {'id': END_OF_TEXT, 'ids': [0], 'tokens': [END_OF_TEXT]}},
}


@pytest.fixture(scope='module', params=[False, True], ids=['plain', 'bos'])
def tokenizers(request, tmp_path_factory):
  """(ours, transformers') from the same files; with a BOS in front of each text, or without."""
  trained = Tokenizer.train_bpe(TEXTS, 300)
  if request.param:
    content = json.loads(trained.files['tokenizer.json'])
    files = dict(trained.files)
    files['tokenizer.json'] = json.dumps({**content, 'post_processor': WITH_BOS}).encode()
    trained = Tokenizer.from_files(files)
  folder = tmp_path_factory.mktemp('tokenizer')
  trained.save(folder)
  return trained, transformers.AutoTokenizer.from_pretrained(folder)


def _theirs(tokenizer, context, continuation):
  """`TemplateLM._encode_pair` and `HFLM.tok_encode` of lm-evaluation-harness 0.4.13."""

  def encode(text):
    if text.startswith(tokenizer.decode(tokenizer.bos_token_id)):
      return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(text)

  spaces = len(context) - len(context.rstrip())
  if spaces > 0:
    continuation = context[-spaces:] + continuation
    context = context[:-spaces]
  before = encode(context)
  return before, encode(context + continuation)[len(before) :]


CASES = [
  ('The quick brown', ' fox'),
  ('The quick brown ', 'fox'),  # the space goes to the continuation
  ('The dog\n\n  ', 'sleeps.'),
  ('The quick br', 'own fox'),  # within a word: as many tokens as the context has alone
  ('a', ' lazy dog, and the dog sleeps'),
  ('Größe', ' 東京 🎉'),  # several tokens a character
  ('🎉', '🎉'),
  (f'{END_OF_TEXT}The', ' fox'),
]


@pytest.mark.parametrize('context, continuation', CASES)
def test_contexts_end_where_the_harness_ends_them(tokenizers, context, continuation):
  ours, theirs = tokenizers
  request = pairs.request(ours, context, continuation)
  before, after = _theirs(theirs, context, continuation)
  assert (list(request.context), list(request.continuation)) == (before, after)
  assert len(after) > 0


def test_without_a_context_the_bos_comes_before(tokenizers):
  ours, theirs = tokenizers
  plain = theirs.encode('The fox', add_special_tokens=False)
  for context in ('', '  ') if not ours.codec.prefix else ('',):
    request = pairs.request(ours, context, 'The fox')
    after = theirs.encode(f'{context}The fox', add_special_tokens=False)
    assert (request.context, list(request.continuation)) == ((0,), after)
  request = pairs.request(ours, '', f'{END_OF_TEXT}The fox')
  assert (request.context, list(request.continuation)) == ((0,), plain)


def test_a_continuation_has_a_token(tokenizers):
  for context, continuation in (('The fox', ''), ('', ''), ('', END_OF_TEXT)):
    with pytest.raises(ValueError, match='adds no token to'):
      pairs.request(tokenizers[0], context, continuation)


def test_windows_are_those_of_the_harness():
  """The example of `LM.loglikelihood_rolling`, and texts of one window and of none."""
  found = pairs.windows(range(10), -1, 4)
  read = [[*one.context, *one.continuation][:-1] for one in found]
  assert read == [[-1, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8]]
  assert [list(one.continuation) for one in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
  (whole,) = pairs.windows(range(4), -1, 4)
  assert (whole.context, whole.continuation) == ((-1,), (0, 1, 2, 3))
  (short,) = pairs.windows([7], -1, 4)
  assert (short.context, short.continuation) == ((-1,), (7,))
  assert pairs.windows([], -1, 4) == []
