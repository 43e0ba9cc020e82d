"""Perplexity by position and needles, against a whole forward pass of the model and numpy."""

import jax
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.eval import needle, positions
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer
from ops import patterns

VOCABULARY = 96
SAME = 1e-5  # relative, of losses of order 1
DEPTHS = (1.0, 0.0, 0.5)


@pytest.fixture(scope='module')
def model():
  """Two layers, of which one sees a window with sinks."""
  mixers = [
    AttentionConfig(query_heads=2, kv_heads=1, head_width=8, sparse=pattern)
    for pattern in (None, patterns.parse('window8+first2'))
  ]
  ffn = FeedForwardConfig(width=24)
  config = ModelConfig(
    family='llama',
    vocab_size=VOCABULARY,
    width=16,
    layers=tuple(LayerConfig(mixer=mixer, ffn=ffn) for mixer in mixers),
    max_positions=32,  # the rope goes on after it
  )
  made = Transformer(config, rngs=nnx.Rngs(0))
  made.embedding.table.set_value(20 * made.embedding.table.get_value())
  return made


@pytest.fixture(scope='module')
def log_probabilities(model):
  """A function tokens_T -> log softmax of the logits at every position, in float64."""
  graphdef, state = nnx.split(model)
  run = jax.jit(lambda state, tokens_BT: nnx.merge(graphdef, state)(tokens_BT))

  def of(tokens_T):
    logits = np.asarray(run(state, np.asarray(tokens_T)[None])[0], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  return of


def test_losses_by_position_are_those_of_a_whole_pass(model, log_probabilities):
  rows_BT = np.random.default_rng(0).integers(0, VOCABULARY, (2, 40), np.int32)
  nll_BT = positions.nll(model, rows_BT)
  expected_BT = np.stack([-log_probabilities(row)[np.arange(39), row[1:]] for row in rows_BT])
  np.testing.assert_allclose(nll_BT, expected_BT, rtol=SAME)
  first, second, last = positions.spans(nll_BT, [0, 1, 8, 30, 64])
  assert [(s.begin, s.end, s.tokens) for s in (first, second, last)] == [
    (1, 8, 14),
    (8, 30, 44),
    (30, 64, 20),
  ]
  np.testing.assert_allclose(second.nll, expected_BT[:, 7:29].mean(), rtol=SAME)
  assert first.ppl == pytest.approx(np.exp(expected_BT[:, :7].mean()), rel=SAME)


@pytest.mark.parametrize('edges', [[0], [4, 4], [-1, 3]])
def test_wrong_positions_are_refused(edges):
  with pytest.raises(ValueError, match='positions must increase from 0'):
    positions.spans(np.zeros((1, 9)), edges)


def test_texts_too_short_or_of_another_tokenizer_are_refused(model):
  with pytest.raises(ValueError, match='at least 2 tokens'):
    positions.nll(model, np.zeros((1, 1), np.int32))
  with pytest.raises(ValueError, match='a vocabulary of 96'):
    positions.nll(model, np.full((1, 4), VOCABULARY, np.int32))


class Letters:
  """A tokenizer of words: every word with the blank before it is a token, as they come."""

  def __init__(self):
    self.known = {}

  def __call__(self, text):
    words = [piece for piece in text.replace(' ', ' _').split(' ') if piece]
    return [self.known.setdefault(word, len(self.known) + 10) for word in words]

  def words(self, tokens):
    names = {number: word for word, number in self.known.items()}
    return [names.get(int(t), '#') for t in tokens]


def _haystack(seed=0, length=80, depths=DEPTHS):
  encode = Letters()
  return encode, needle.haystack(encode, [3] * 60, length, depths, seed=seed)


def test_needles_lie_at_their_depths_and_are_asked_for_at_the_end():
  encode, stack = _haystack()
  words, text = encode.words(stack.tokens_T), stack.tokens_T
  assert len(text) == 80 and len(set(stack.candidates)) == len(needle.WORDS)
  filler = words.count('#')
  for i, depth in enumerate(DEPTHS):
    start, asked = stack.places[i], stack.asked[i]
    word = needle.WORDS[stack.answers[i]]
    sentence = words[start : start + 6]
    assert sentence[:3] == ['\nThe', '_secret', '_word'] and sentence[-1] == '_is'
    assert words[start + 6] == words[asked + 1] == f'_{word}.'
    assert words[asked - 5 : asked + 1] == sentence
    assert words[:start].count('#') == round(depth * filler)
    assert text[asked + 1] == stack.candidates[stack.answers[i]]
  assert min(stack.asked) > max(i for i, word in enumerate(words) if word == '#')
  assert _haystack()[1].answers == stack.answers != _haystack(seed=1)[1].answers


def test_scores_are_those_of_a_whole_pass(model, log_probabilities):
  stacks = [_haystack(seed)[1] for seed in (0, 1)]
  found = needle.scores(model, stacks)
  for i, score in enumerate(found):
    shares, ranks = [], []
    for stack in stacks:
      all_ = np.exp(log_probabilities(stack.tokens_T)[stack.asked[i]])[list(stack.candidates)]
      right = all_[stack.answers[i]]
      shares.append(right / all_.sum())
      ranks.append(1 + (all_ > right).sum())
    assert score.depth == DEPTHS[i]
    assert score.probability == pytest.approx(np.mean(shares), rel=SAME)
    assert (score.rank, score.found) == (np.mean(ranks), np.mean(np.equal(ranks, 1)))


@pytest.mark.parametrize(
  'options, message',
  [
    ({'depths': (0.5, 1.5)}, 'depths between 0 and 1'),
    ({'depths': ()}, '1 to 16 depths'),
    ({'length': 40}, 'a haystack of 40 tokens has -'),
    ({'length': 200}, 'and the text has 60'),
  ],
)
def test_haystacks_that_cannot_be_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    _haystack(**options)


def test_words_need_first_tokens_of_their_own():
  with pytest.raises(ValueError, match='begins several words with the same token'):
    needle.haystack(lambda text: [1] * len(text), [3] * 900, 800, (0.5,), seed=0)
