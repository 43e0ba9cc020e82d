"""Recall through caches, of a model made by hand whose every answer is known.

Its first layer tells each token which one came before it, and its second finds the token that
followed the last one earlier in the text: an induction head, of which each key matches exactly.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import cache_spec
from model.config import ModelConfig
from model.eval import cost, recall
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, parameters

V, P, FILLER, SHARP = 130, 140, 100, 40.0
TOKEN, PLACE, BEFORE, FOUND = (
  slice(a, b) for a, b in ((0, V), (V, V + P), (V + P, 2 * V + P), (2 * V + P, 3 * V + P))
)
WIDTH = FOUND.stop
LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=1, kv_heads=1, head_width=P), ffn=FeedForwardConfig(width=1)
)
CONFIG = ModelConfig(
  family='llama', vocab_size=V, width=WIDTH, layers=(LAYER,) * 2, max_positions=P, rope=None
)


@functools.cache
def _model() -> Transformer:
  model = Transformer(CONFIG, rngs=nnx.Rngs(0))
  values = {
    path: np.zeros(p.shape, np.float32)
    for path, p in parameters(model).items()
    if 'norm' not in path
  }
  values['embedding.table'][:, TOKEN] = np.eye(V)
  values['positions.table'][:, PLACE] = np.eye(P)
  for layer, ones in ((0, 2), (1, 3)):  # how many ones a state has: its norm divides by the root
    at = lambda name, layer=layer: values[f'layers.{layer}.attention.{name}.weight']
    root = np.sqrt(ones / WIDTH)
    sharp = np.sqrt(SHARP * np.sqrt(P)) * root
    if layer == 0:
      at('query')[PLACE] = sharp * np.eye(P, k=-1)  # that at 1 asks for 0
      at('key')[PLACE] = sharp * np.eye(P)
    else:
      at('query')[TOKEN, :V] = at('key')[BEFORE, :V] = sharp * np.eye(V)
    at('value')[TOKEN, :V] = root * np.eye(V)
    at('output')[:V, BEFORE if layer == 0 else FOUND] = np.eye(V)
  values['head.weight'][FOUND] = np.eye(V)
  for path, value in values.items():
    parameters(model)[path].set_value(jnp.asarray(value))
  return model


def _case(protocol, depth, rows=3):
  """Needles `key, first, second`; every other token of a row is there once."""
  rng = np.random.default_rng(0)
  tokens = np.stack([rng.permutation(V)[: FILLER + 3] for _ in range(rows)])
  needles_BT, fillers_BT = tokens[:, :3], tokens[:, 3:]
  contexts_BT = recall.placed(fillers_BT, needles_BT, depth)
  return recall.PROTOCOLS[protocol](contexts_BT, needles_BT[:, :1], needles_BT[:, 1:], given=1)


@pytest.mark.parametrize(
  'format, depth, aware, agnostic',
  [
    ('float', 0.5, 1, 1),
    ('streaming48', 0.5, 0, 0),
    ('streaming48', 0.9, 1, 1),
    ('int8+snapkv48', 0.4, 1, 0),  # it keeps what was asked for, if it has seen the question
  ],
)
def test_what_is_found_is_what_was_kept(format, depth, aware, agnostic):
  for protocol, expected in (('query-aware', aware), ('query-agnostic', agnostic)):
    found = recall.measure(_model(), _case(protocol, depth), format)
    assert (found.answers, found.tokens) == (expected, expected), protocol
    weights = sum(p.get_value().nbytes for p in parameters(_model()).values())
    assert found.peak_bytes > weights + found.cache_bytes
    held = cost.kv_cache_bytes(CONFIG, 105, jnp.float32, format)  # as many tokens are needed
    assert found.cache_bytes == 3 * held


def test_protocols_differ_in_what_is_compressed():
  context, question, answer = np.arange(6)[None], np.array([[7, 8]]), np.array([[1, 2, 3]])
  aware = recall.query_aware(context, question, answer, given=1)
  assert aware.read_BT.tolist() == [[0, 1, 2, 3, 4, 5, 7, 8]]
  assert aware.fed_BT.tolist() == [[1]] and aware.expected_BT.tolist() == [[2, 3]]
  again = recall.query_aware(context, question, answer)
  assert again.fed_BT.tolist() == [[7, 8]] and again.expected_BT.tolist() == [[1, 2, 3]]
  agnostic = recall.query_agnostic(context, question, answer, given=1)
  assert agnostic.read_BT.tolist() == context.tolist()
  assert agnostic.fed_BT.tolist() == [[7, 8, 1]] and agnostic.expected_BT.tolist() == [[2, 3]]


def test_a_needle_is_placed_at_its_depth():
  place = functools.partial(recall.placed, np.arange(4)[None], np.array([[9, 9]]))
  assert place(0.0).tolist() == [[9, 9, 0, 1, 2, 3]]
  assert place(0.5).tolist() == [[0, 1, 9, 9, 2, 3]]
  assert place(1.0).tolist() == [[0, 1, 2, 3, 9, 9]]
  with pytest.raises(ValueError, match='a depth is between 0, the begin, and 1, the end, not'):
    place(1.1)


def test_bad_input_is_refused():
  rows = np.zeros((1, 3), int)
  with pytest.raises(ValueError, match='of 3 tokens of an answer, 3 cannot be given'):
    recall.query_aware(rows, rows, rows, given=3)
  with pytest.raises(ValueError, match='axis B'):
    recall.query_agnostic(rows, rows, np.zeros((2, 3), int))
  with pytest.raises(ValueError, match='201 positions are needed, but the model has learned 140'):
    case = recall.query_agnostic(np.zeros((1, 200), int), rows[:, :1], rows[:, :1])
    recall.measure(_model(), case, cache_spec.of('float'))


def test_an_answer_is_right_if_all_of_its_tokens_are():
  found = recall.Recall(
    right_BT=np.array([[True, False], [True, True]]), cache_bytes=0, peak_bytes=0
  )
  assert found.answers_B.tolist() == [False, True]
  assert (found.answers, found.tokens) == (0.5, 0.75)
