import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import axes


def test_binds_each_letter_to_its_size():
  q, k = np.zeros((2, 5, 6, 8)), np.zeros((2, 7, 3, 8))
  expected = {'B': 2, 'T': 5, 'N': 6, 'H': 8, 'S': 7, 'K': 3}
  assert axes.check('BTNH,BSKH', q, k) == expected


@pytest.mark.parametrize('shape', [(4,), (2, 4), (2, 3, 4)])
def test_an_ellipsis_stands_for_any_leading_axes(shape):
  assert axes.check('...D,D', np.zeros(shape), np.zeros(4)) == {'D': 4}


def test_an_ellipsis_alone_takes_anything():
  assert axes.check('...', np.zeros((2, 3))) == {}


def test_none_stands_in_for_an_absent_array():
  assert axes.check('BT,BS', np.zeros((2, 3)), None) == {'B': 2, 'T': 3}


def test_a_repeated_letter_must_agree_within_one_array():
  assert axes.check('DD', np.zeros((3, 3))) == {'D': 3}
  with pytest.raises(ValueError, match='axis D'):
    axes.check('DD', np.zeros((3, 4)))


def test_names_the_axis_that_disagrees():
  with pytest.raises(ValueError, match=r'axis H of BSKH\(2, 7, 3, 9\) is 9, but was 8'):
    axes.check('BTNH,BSKH', np.zeros((2, 5, 6, 8)), np.zeros((2, 7, 3, 9)))


@pytest.mark.parametrize(
  ('spec', 'shapes', 'message'),
  [
    ('BT', [(2, 3, 4)], 'BT has 2 axes'),
    ('...BT', [(3,)], 'BT has 2 axes'),
    ('BT', [(2,), (2,)], 'describes 1 arrays, but 2'),
    ('BT,BS', [(2, 3)], 'describes 2 arrays, but 1'),
    ('Bx', [(2, 3)], "'x' in Bx is not an axis letter"),
  ],
)
def test_refuses_what_it_cannot_bind(spec, shapes, message):
  with pytest.raises(ValueError, match=message):
    axes.check(spec, *map(np.zeros, shapes))


def test_works_on_traced_arrays():
  seen = []
  jax.jit(lambda x: seen.append(axes.check('BT', x)) or x)(jnp.zeros((2, 3)))
  assert seen == [{'B': 2, 'T': 3}]


def test_a_blank_is_an_axis_of_any_size():
  assert axes.check('B_T,_B', np.zeros((2, 5, 3)), np.zeros((7, 2))) == {'B': 2, 'T': 3}
  with pytest.raises(ValueError, match='B_ has 2 axes'):
    axes.check('B_', np.zeros(2))


def test_fields_are_checked_where_they_are_arrays():
  shape = jax.ShapeDtypeStruct((2, 4), jnp.float32)
  axes.check_fields('...BT,...B', shape, jnp.zeros(2))
  for stand_in in (None, object(), 3, jnp.zeros(())):
    axes.check_fields('...BT,...B', shape, stand_in)
  with pytest.raises(ValueError, match='axis B'):
    axes.check_fields('...BT,...B', shape, np.zeros(3))
