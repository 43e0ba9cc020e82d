"""Attention to chosen blocks, against loops in float64 and against dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import block_selection, masks
from ops.attention import attention
from ops.block_selection import Blocks

B, T, N, K, H, BLOCK = 2, 23, 4, 2, 8, 4
SCALE = 0.4
FLOAT32 = 1e-5  # of values and gradients of order 1
CHOOSE_ONE = Blocks(size=BLOCK, top_k=1)
ALL = T  # more blocks than there are
# Two documents, of which the first ends within a block, and padding.
SEGMENTS_BT = np.array([[1] * 10 + [2] * 13, [1] * 3 + [2] * 15 + [0] * 5], np.int32)


def _arrays(seed=0, length=T):
  rng = np.random.default_rng(seed)
  return [rng.standard_normal((B, length, n, H)).astype(np.float32) for n in (N, K, K, N)]


def _whole(q, k, v, top_k, segments=None, softcap=None, first=False):
  blocks = Blocks(size=BLOCK, top_k=top_k, first=first)
  return block_selection.whole(q, k, v, blocks, segments, scale=SCALE, softcap=softcap)[0]


_run = jax.jit(_whole, static_argnums=(3, 5, 6))


def _seen_by_hand(q, k, top_k, segments=None, first=False):
  """[B, N, T, T] by the definition: sorted means of the blocks before the query's own."""
  if segments is None:
    segments = np.ones((B, T), int)
  seen = np.zeros((B, N, T, T), bool)
  for b, n, t in np.ndindex(B, N, T):
    mine = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
    blocks = {j: [s for s in mine if s // BLOCK == j] for j in range(t // BLOCK + 1)}
    own = blocks.pop(t // BLOCK)
    keys = k[b, :, n // (N // K)].astype(np.float64)
    fits = {j: float(q[b, t, n] @ keys[at].mean(0)) for j, at in blocks.items() if at}
    if fits and first:
      fits[min(fits)] = np.inf
    for j in sorted(fits, key=fits.get, reverse=True)[:top_k]:
      own = own + blocks[j]
    seen[b, n, t, own] = True
  return seen


def _by_hand(q, k, v, seen, softcap=None):
  y = np.zeros(q.shape)
  for b, n, t in np.ndindex(B, N, T):
    at = np.flatnonzero(seen[b, n, t])
    scores = SCALE * k[b, at, n // (N // K)].astype(np.float64) @ q[b, t, n]
    if softcap:
      scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max())
    y[b, t, n] = weights / weights.sum() @ v[b, at, n // (N // K)]
  return y


@pytest.mark.parametrize(
  'top_k, segments, softcap, first',
  [
    (1, None, None, False),
    (2, None, 3.0, True),
    (2, SEGMENTS_BT, None, False),
    (1, SEGMENTS_BT, None, True),
  ],
)
def test_values_are_those_of_the_definition(top_k, segments, softcap, first):
  q, k, v, _ = _arrays()
  found = _run(q, k, v, top_k, segments, softcap, first)
  seen = _seen_by_hand(q, k, top_k, segments, first)
  np.testing.assert_allclose(found, _by_hand(q, k, v, seen, softcap), atol=FLOAT32)


def test_a_query_sees_what_the_picture_says():
  """Derived from outputs: equal scores, and values that name their places."""
  k = np.zeros((1, 12, 1, 16), np.float32)
  k[0, :, 0, 0] = np.repeat([2, 1, 3], 4)  # so the third block would be chosen first, if it could
  q = np.zeros((1, 12, 1, 16), np.float32)
  q[0, :, 0, 0] = 1e-6  # scores are equal, as far as float32 tells, and their order is not
  q[0, -1, 0, 0] = -1e-6
  v = np.eye(12, 16, dtype=np.float32)[None, :, None]
  run = jax.jit(lambda *a: block_selection.whole(*a, CHOOSE_ONE, scale=1.0, softcap=None)[0])
  found = run(q, k, v)[0, :, 0, :12]
  pictures = ['#...........', '##..........', '###.........', '####........']
  pictures += ['#####.......', '######......', '#######.....', '########....']
  pictures += ['####....#...', '####....##..', '####....###.', '....########']
  assert [''.join('.#'[int(w > 0)] for w in row) for row in found] == pictures
  np.testing.assert_allclose(found.sum(1), 1, atol=FLOAT32)
  np.testing.assert_allclose(found[-1, 4:], 1 / 8, atol=FLOAT32)


def _with_slopes(fn, q, k, v, weigh):
  """What fn returns, and the slopes of its sum with these weights."""

  def run(q, k, v, weigh):
    y, pull = jax.vjp(fn, q, k, v)
    return y, *pull(weigh)

  return jax.jit(run)(q, k, v, weigh)


@pytest.mark.parametrize('segments, softcap', [(None, 2.0), (SEGMENTS_BT, None)])
def test_all_blocks_are_dense_attention_with_its_gradients(segments, softcap):
  q, k, v, weigh = _arrays(1)
  if segments is None:
    mask = masks.causal(B, T)
  else:
    mask = masks.packed(masks.causal(B, T).q_positions_BT, jnp.asarray(segments))
  dense = lambda q, k, v: attention(q, k, v, mask, scale=SCALE, softcap=softcap, impl='reference')
  ours = lambda q, k, v: _whole(q, k, v, ALL, segments, softcap)
  _check_equal(ours, dense, q, k, v, weigh)


def _check_equal(ours, theirs, *arrays):
  for found, expected in zip(_with_slopes(ours, *arrays), _with_slopes(theirs, *arrays)):
    np.testing.assert_allclose(found, expected, atol=FLOAT32)


def test_gradients_are_those_of_attention_under_the_same_mask():
  """The choice is constant. The logarithms of the sums have gradients too."""
  q, k, v, weigh = _arrays(2)
  seen = jnp.asarray(_seen_by_hand(q, k, 2))

  def masked(q, k, v):
    k, v = (jnp.repeat(x, N // K, 2) for x in (k, v))
    scores = jnp.where(seen, SCALE * jnp.einsum('BTNH,BSNH->BNTS', q, k), -jnp.inf)
    logs = jax.nn.logsumexp(scores, -1)
    y = jnp.einsum('BNTS,BSNH->BTNH', jnp.exp(scores - logs[..., None]), v)
    return y + logs.swapaxes(1, 2)[..., None]

  def ours(q, k, v):
    y, logs = block_selection.whole(q, k, v, Blocks(size=BLOCK, top_k=2), scale=SCALE, softcap=None)
    return y + logs[..., None]

  _check_equal(ours, masked, q, k, v, weigh)


@pytest.mark.parametrize('at', [8, 13])
def test_no_query_depends_on_what_follows(at):
  """At the start of a block and within one, whose mean would tell."""
  q, k, v, _ = _arrays(3)
  other = [np.concatenate([x[:, :at], 5 * y[:, at:]], 1) for x, y in zip((q, k, v), _arrays(4))]
  found, others = _run(q, k, v, 1), _run(*other, 1)
  np.testing.assert_array_equal(found[:, :at], others[:, :at])
  assert np.abs(found[:, at:] - others[:, at:]).max() > 0.1


def test_documents_of_a_row_do_not_depend_on_each_other():
  q, k, v, _ = _arrays(3)
  before = np.arange(T) < 10
  other = [np.where(before[None, :, None, None], y, x) for x, y in zip((q, k, v), _arrays(4))]
  found, others = (np.asarray(_run(*one, 2, SEGMENTS_BT)) for one in ((q, k, v), other))
  np.testing.assert_array_equal(found[0, 10:], others[0, 10:])
  assert np.abs(found[0, :10] - others[0, :10]).max() > 0.1


def test_choices_can_be_made_in_parts_and_tiles_in_steps(monkeypatch):
  q, k, v, weigh = _arrays(5)
  ours = lambda q, k, v: _whole(q, k, v, 2)
  at_once = _with_slopes(ours, q, k, v, weigh)
  monkeypatch.setattr(block_selection, 'AT_ONCE', 200)
  monkeypatch.setattr(block_selection, 'MOST_ROWS', 4)
  for found, expected in zip(_with_slopes(ours, q, k, v, weigh), at_once):
    np.testing.assert_allclose(found, expected, atol=FLOAT32)


def _products(jaxpr, times=1) -> float:
  """Multiplications of all matrix products of a program, loops multiplied out."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      ((contracted, _), _) = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      total += times * np.prod([shape[i] for i in contracted]) * eqn.outvars[0].aval.size
    inner = times * eqn.params.get('length', 1)
    for value in eqn.params.values():
      if hasattr(value, 'jaxpr') or hasattr(value, 'eqns'):
        total += _products(getattr(value, 'jaxpr', value), inner)
  return total


def test_the_cost_grows_with_the_text_and_the_means_alone_with_its_square():
  block, top_k, lengths = 64, 2, (1024, 4096)
  shapes = lambda t: [jax.ShapeDtypeStruct((1, t, n, 16), jnp.float32) for n in (4, 2, 2)]
  blocks = Blocks(size=block, top_k=top_k)
  fn = lambda q, k, v: block_selection.whole(q, k, v, blocks, scale=1.0, softcap=None)[0]
  slope = jax.grad(lambda *a: fn(*a).sum(), argnums=(0, 1, 2))
  for program, products in ((fn, 2), (slope, 7)):  # the backward pass has five, one of them anew
    counts = []
    for t in lengths:
      means = 4 * 16 * t * t / block
      counts.append(_products(jax.make_jaxpr(program)(*shapes(t)).jaxpr) - means)
      needed = products * 4 * 16 * t * (top_k + 1) * block
      assert needed <= counts[-1] < 1.4 * needed
    assert counts[1] < 4.1 * counts[0]
  held = [jax.jit(slope).lower(*shapes(t)).compile().memory_analysis() for t in lengths]
  assert held[1].temp_size_in_bytes < 4.4 * held[0].temp_size_in_bytes
  assert held[1].temp_size_in_bytes < 4 * 4096**2 * 4 / 3  # a third of the scores of all pairs


def test_a_token_multiplies_chosen_blocks_and_means():
  slots, block, top_k = 4096, 64, 2
  shapes = [(1, 1, 4, 16), (1, slots, 2, 16), (1, slots, 2, 16), (1, slots // block, 2, 16)]
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  places = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  blocks = Blocks(size=block, top_k=top_k)
  step = lambda *a: block_selection.attend(*a, blocks, scale=1.0, softcap=None)[0]
  found = _products(jax.make_jaxpr(step)(*arrays, places).jaxpr)
  assert found == 4 * 16 * (2 * (top_k + 1) * block + slots // block) + 4 * 16 * (top_k + 1)
  held = jax.jit(step).lower(*arrays, places).compile().memory_analysis().temp_size_in_bytes
  assert held < 4 * 16 * 2 * slots * 4 / 2  # far from a copy of the cache


@pytest.mark.parametrize(
  'block, top_k, message',
  [(0, 1, 'block must be an integer of at least 1, not 0'), (4, 0, 'top_k must be .* not 0')],
)
def test_bad_counts_are_refused(block, top_k, message):
  with pytest.raises(ValueError, match=message):
    Blocks(size=block, top_k=top_k)


def test_bad_shapes_are_refused():
  q, k, v, _ = _arrays()
  with pytest.raises(ValueError, match='23 keys are not 5 blocks of 4'):
    means, places = jnp.zeros((B, 5, K, H)), jnp.zeros((B, T), jnp.int32)
    block_selection.attend(q, k, v, means, places, CHOOSE_ONE, scale=1.0, softcap=None)
  with pytest.raises(ValueError, match='as many queries as keys, not 3 and 23'):
    block_selection.whole(q[:, :3], k, v, CHOOSE_ONE, scale=1.0, softcap=None)
