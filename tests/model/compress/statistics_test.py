"""Statistics against numpy, batch by batch, and the recorder that notes what a layer is fed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.compress import statistics
from model.compress.statistics import Recorder
from ops import experts, quantized
from ops.linear import grouped_matmul

NAMES = tuple(statistics.STATISTICS)
# Sums of 30 float32 products, in another order.
TOLERANCE = 1e-5


def _expected(x_TI):
  x_TI = np.asarray(x_TI, np.float64)
  return {
    'rows': len(x_TI),
    'input_norm': np.sqrt((x_TI**2).sum(0)),
    'input_covariance': x_TI.T @ x_TI / len(x_TI),
    'input_absmax': np.abs(x_TI).max(0),
    'input_absmean': np.abs(x_TI).mean(0),
    'input_moments': np.stack([x_TI.mean(0), np.square(x_TI).mean(0)]),
  }


def _assert_close(measured, expected):
  assert set(measured) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(measured[name], value, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize('cuts', [[], [1], [7, 11, 29]])
def test_statistics_are_those_of_all_tokens_however_they_are_cut(rng, cuts):
  x_TI = rng.standard_normal((30, 5)).astype(np.float32) * [1e-3, 1, 1, 100, 0]
  parts = [statistics.measure([(jnp.asarray(part),)], NAMES) for part in np.split(x_TI, cuts)]
  total = parts[0]
  for part in parts[1:]:
    total = statistics.merge(total, part)
  _assert_close(statistics.finish(total), _expected(x_TI))


def test_a_layer_that_is_used_twice_sees_both_inputs(rng):
  a_BTI, b_TI = rng.standard_normal((2, 3, 4)), rng.standard_normal((5, 4))
  measured = statistics.finish(
    statistics.measure([(jnp.asarray(a_BTI),), (jnp.asarray(b_TI),)], NAMES)
  )
  _assert_close(measured, _expected(np.concatenate([a_BTI.reshape(-1, 4), b_TI])))


def test_each_expert_is_measured_on_its_own_rows(rng):
  """In two calls; the last row of the second belongs to none, and expert 1 never has one."""
  first, second = (rng.standard_normal((7, 5)).astype(np.float32) for _ in range(2))
  recorder = Recorder(jnp.asarray(rng.standard_normal((3, 5, 4)), jnp.float32), [])
  for x_TI, sizes in ((first, [3, 0, 4]), (second, [1, 0, 5])):
    x_TI, sizes_E = jnp.asarray(x_TI), jnp.array(sizes)
    expected_TO = grouped_matmul(x_TI, recorder.weight, sizes_E)
    np.testing.assert_array_equal(grouped_matmul(x_TI, recorder, sizes_E), expected_TO)
  measured = statistics.finish(statistics.measure(recorder.seen, NAMES))
  rows = [np.concatenate([first[:3], second[:1]]), np.concatenate([first[3:], second[1:6]])]
  for e, x_TI in zip((0, 2), rows):
    _assert_close(experts.take(measured, e), _expected(x_TI))
  assert not any(np.any(leaf[1]) for leaf in jax.tree.leaves(measured))
  assert statistics.starved(measured) == {'inputs that no calibration token used': 5}
  promised = statistics.abstract(recorder.weight, NAMES)
  shape = lambda leaf: (leaf.shape, leaf.dtype)
  assert jax.tree.map(shape, promised) == jax.tree.map(shape, measured)


def test_sums_are_in_float32_for_inputs_of_half_precision():
  x_TI = jnp.full((4096, 2), 0.5, jnp.bfloat16)
  measured = statistics.finish(statistics.measure([(x_TI,)], NAMES))
  _assert_close(measured, _expected(x_TI))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(measured))


def test_only_what_is_asked_for_is_measured():
  assert set(statistics.measure([(jnp.ones((2, 3)),)], ('input_absmax',))) == {'input_absmax'}


def test_abstract_promises_what_is_measured(rng):
  measured = statistics.finish(statistics.measure([(jnp.asarray(rng.random((3, 4))),)], NAMES))
  promised = statistics.abstract(jnp.zeros((4, 2)), NAMES)
  shape = lambda leaf: (leaf.shape, leaf.dtype)
  assert jax.tree.map(shape, promised) == jax.tree.map(shape, measured)


@pytest.mark.parametrize('format', [None, 'int8', 'nf4'])
def test_a_recorder_multiplies_like_the_weight_it_wraps(rng, format):
  w_IO = jnp.asarray(rng.standard_normal((32, 6)), jnp.float32)
  weight = w_IO if format is None else quantized.quantize(w_IO, format)
  recorder = Recorder(weight, [])
  x_TI = jnp.asarray(rng.standard_normal((3, 32)), jnp.float32)
  product_TO = recorder.matmul(x_TI)
  expected_TO = x_TI @ weight if format is None else weight.matmul(x_TI)
  np.testing.assert_array_equal(product_TO, expected_TO)
  ((seen_TI,),) = recorder.seen
  assert seen_TI is x_TI
  assert (recorder.shape, recorder.dtype) == (weight.shape, weight.dtype)
  with pytest.raises(ValueError, match='never compressed'):
    recorder.map_values(lambda values: values)
