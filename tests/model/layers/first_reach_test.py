"""First tokens that are never met from beyond a reach: against numpy, caches, and far positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import kv_cache
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, parameters
from ops import masks, patterns, rope
from ops.attention import attention
from ops.rope import RopeConfig

SAME = 1e-5
FAR = 1e-3  # angles at positions of thousands are rounded in float32
PATTERN, REACH = patterns.parse('window4+first2'), 6
ROPE = RopeConfig(theta=100.0)
SHAPE = {'query_heads': 2, 'kv_heads': 1, 'head_width': 8}


def _by_distance(q_BTNH, k_BSKH, v_BSKH, scale):
  """Every pair by itself: the key is turned by how far it lies before the query."""
  positions = np.arange(q_BTNH.shape[1])
  distance = positions[:, None] - positions[None]
  first = positions[None] < 2
  capped = np.where(first, np.minimum(positions[:, None], REACH) - positions[None], distance)
  seen = (distance >= 0) & (first | (distance < 4))
  cos, sin = rope.cos_sin(jnp.asarray(capped.reshape(1, -1)), ROPE, 8)
  pairs = len(positions), len(positions), 8
  cos, sin = cos.reshape(pairs), sin.reshape(pairs)
  turned = jnp.concatenate([-q_BTNH[..., 4:], q_BTNH[..., :4]], -1)
  rotated = jnp.einsum('BTNH,TSH->BNTSH', q_BTNH, cos)
  rotated += jnp.einsum('BTNH,TSH->BNTSH', turned, sin)
  scores = scale * jnp.einsum('BNTSH,BSH->BNTS', rotated, k_BSKH[:, :, 0])
  weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
  return jnp.einsum('BNTS,BSH->BTNH', weights, v_BSKH[:, :, 0])


def _in_the_op(q_BTNH, k_BSKH, v_BSKH, scale):
  mask = masks.causal(q_BTNH.shape[0], q_BTNH.shape[1], pattern=PATTERN)
  own = rope.cos_sin(mask.q_positions_BT, ROPE, 8)
  capped = rope.cos_sin(jnp.minimum(mask.q_positions_BT, REACH), ROPE, 8)
  q, q_first, k = (
    rope.rotate(x, *angles) for x, angles in ((q_BTNH, own), (q_BTNH, capped), (k_BSKH, own))
  )
  return attention(q, k, v_BSKH, mask, scale=scale, q_first_BTNH=q_first)


def test_values_and_gradients_are_those_of_pairs_by_their_distance():
  draw = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
  arrays = draw((2, 21, 2, 8)), draw((2, 21, 1, 8)), draw((2, 21, 1, 8))
  weights = draw((2, 21, 2, 8))
  found, expected = (
    jax.jit(jax.value_and_grad(lambda *xs, fn=fn: (fn(*xs, 0.5) * weights).sum(), (0, 1, 2)))(
      *arrays
    )
    for fn in (_in_the_op, _by_distance)
  )
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, atol=10 * SAME)


@pytest.fixture(scope='module')
def model():
  mixer = AttentionConfig(**SHAPE, sparse=PATTERN, first_reach=REACH)
  layer = LayerConfig(mixer=mixer, ffn=FeedForwardConfig(width=24))
  config = ModelConfig(
    family='llama', vocab_size=40, width=16, layers=(layer,) * 2, max_positions=64, rope=ROPE
  )
  made, rng = Transformer(config, rngs=nnx.Rngs(0)), np.random.default_rng(1)
  for path, param in parameters(made).items():
    if 'norm' not in path:
      value = rng.standard_normal(param.get_value().shape) / 2
      param.set_value(jnp.asarray(value, jnp.float32))
  return made


@pytest.fixture(scope='module')
def run(model):
  """A function (tokens_BT, positions_BT, cache) -> (logits_BTV, cache)."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(tokens_BT, positions_BT, cache):
    made = nnx.merge(graphdef, state)
    x_BTD, cache = made.hidden(tokens_BT, positions_BT=positions_BT, cache=cache)
    return made.logits(x_BTD), cache

  return run


TOKENS_BT = np.random.default_rng(2).integers(0, 40, (2, 30), np.int32)


def _positions(begin, end):
  return np.broadcast_to(np.arange(begin, end, dtype=np.int32), (2, end - begin))


@pytest.mark.parametrize('pieces, format', [(1, 'float'), (7, 'float'), (1, 'int8')])
def test_a_cache_gives_what_a_whole_pass_gives(model, run, pieces, format):
  whole, _ = run(TOKENS_BT, None, None)
  cache = kv_cache.init(model.config, 2, 32, format=format)
  assert cache[0].capacity is None  # it holds the window and the first tokens alone
  found = []
  for begin in range(0, 28, pieces):
    part = slice(begin, begin + pieces)
    logits, cache = run(TOKENS_BT[:, part], _positions(begin, begin + pieces), cache)
    found.append(logits)
  difference = np.abs(np.concatenate(found, 1) - whole[:, :28])
  if format == 'float':
    assert difference.max() < 10 * SAME
  else:  # codes of a tiny model; some logits, which are of order 1, move by some tenths
    assert difference.mean() < 0.05


def test_what_is_predicted_does_not_depend_on_how_far_the_text_has_come(run):
  """True positions are what a twin without the reach shows."""
  far = lambda begin: np.concatenate([_positions(0, 2), _positions(begin, begin + 28)], 1)
  near, further = (run(TOKENS_BT, far(begin), None)[0] for begin in (10, 3010))
  np.testing.assert_allclose(near[:, 2:], further[:, 2:], atol=FAR * np.abs(near).max())


@pytest.mark.parametrize(
  'options, message',
  [
    ({'sparse': None}, 'needs a rope and a window with first tokens'),
    ({'sparse': patterns.parse('window4')}, 'needs a rope and a window with first tokens'),
    ({'rotates': False}, 'needs a rope'),
    ({'first_reach': 4}, 'must be at least 5, where the first tokens leave the window'),
  ],
)
def test_a_reach_needs_first_tokens_outside_of_a_window(options, message):
  with pytest.raises(ValueError, match=message):
    AttentionConfig(**{**SHAPE, 'sparse': PATTERN, 'first_reach': REACH, **options})


def test_formats_that_do_not_turn_queries_are_refused(model):
  with pytest.raises(ValueError, match='a cache in int4 does not rotate queries'):
    kv_cache.init(model.config, 1, 64, format='int4')
