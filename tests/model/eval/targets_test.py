"""Compiling for devices that are not here: what is placed, and what is said where it cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.eval import targets


@pytest.mark.parametrize('find', [targets.gpu, lambda: targets.tpu('v99:2x2')])
def test_a_missing_compiler_or_topology_is_an_error_with_the_fix(find, monkeypatch):
  def absent(*_, **__):
    raise NotImplementedError('topology not implemented')

  monkeypatch.setattr(targets.topologies, 'get_topology_desc', absent)
  with pytest.raises(ValueError, match=r'no compiler for .*pip install .lissom'):
    find()


def test_shapes_are_placed_and_programs_compiled():
  device = jax.devices()[1]
  x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  placed = targets.placed({'a': x}, device)
  assert placed['a'].shape == (2, 3) and placed['a'].sharding.device_set == {device}
  compiled = targets.compile(lambda x: 2 * x, device, x)
  y = compiled(jax.device_put(jnp.ones((2, 3)), device))
  np.testing.assert_array_equal(y, np.full((2, 3), 2.0))
  assert y.sharding.device_set == {device}
