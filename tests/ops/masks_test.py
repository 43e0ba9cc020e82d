import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import masks
from ops.masks import AttentionMask
from ops.patterns import Window


def picture(mask, row=0):
  return [''.join('.X'[int(seen)] for seen in line) for line in np.asarray(mask.dense())[row]]


def ints(*rows):
  return jnp.asarray(rows, jnp.int32)


def test_causal():
  assert picture(masks.causal(2, 4), row=1) == ['X...', 'XX..', 'XXX.', 'XXXX']


def test_a_window_counts_the_query_itself():
  assert picture(masks.causal(1, 5, pattern=Window(2))) == [
    'X....',
    'XX...',
    '.XX..',
    '..XX.',
    '...XX',
  ]
  assert picture(masks.causal(1, 3, pattern=Window(1))) == ['X..', '.X.', '..X']


def test_a_window_longer_than_the_text_hides_nothing():
  assert picture(masks.causal(1, 3, pattern=Window(9))) == picture(masks.causal(1, 3))


def test_packed_documents_see_only_themselves():
  mask = masks.packed(ints([0, 1, 0, 1, 2]), ints([4, 4, 2, 2, 2]))
  assert picture(mask) == ['X....', 'XX...', '..X..', '..XX.', '..XXX']


def test_packed_documents_with_a_window():
  mask = masks.packed(ints([0, 1, 0, 1, 2]), ints([1, 1, 2, 2, 2]), pattern=Window(2))
  assert picture(mask) == ['X....', 'XX...', '..X..', '..XX.', '...XX']


def test_late_queries_over_a_cache():
  mask = masks.over_cache(ints([3, 4], [1, 2]), 6, pattern=Window(3))
  assert picture(mask, row=0) == ['.XXX..', '..XXX.']
  assert picture(mask, row=1) == ['XX....', 'XXX...']


def test_keys_in_any_order_as_in_a_ring_buffer():
  mask = AttentionMask(ints([6]), ints([4, 5, 6, 3]), pattern=Window(3))
  assert picture(mask) == ['XXX.']


def test_only_causal_is_contiguous():
  assert masks.causal(1, 3).contiguous
  assert not masks.over_cache(ints([0, 1, 2]), 3).contiguous
  assert not masks.packed(ints([0, 1, 2]), ints([0, 0, 0])).contiguous


def test_is_a_pytree_whose_pattern_is_static():
  mask = masks.causal(1, 4, pattern=Window(2))
  assert len(jax.tree.leaves(mask)) == 2
  traced = jax.jit(lambda m: (m.dense(), m.pattern.size + 0))(mask)
  np.testing.assert_array_equal(traced[0], mask.dense())
  back = jax.tree.unflatten(jax.tree.structure(mask), jax.tree.leaves(mask))
  assert (back.pattern, back.contiguous, back.q_segments_BT) == (Window(2), True, None)


def test_an_inconsistent_mask_is_refused():
  positions = ints([0, 1])
  with pytest.raises(ValueError, match='both have segments'):
    AttentionMask(positions, positions, positions)
  with pytest.raises(ValueError, match='not contiguous'):
    AttentionMask(positions, positions, positions, positions, contiguous=True)
  with pytest.raises(ValueError, match='not 0'):
    masks.causal(1, 2, pattern=Window(0))
  with pytest.raises(ValueError, match='axis S'):
    AttentionMask(positions, positions, positions, ints([0, 1, 2])).dense()
