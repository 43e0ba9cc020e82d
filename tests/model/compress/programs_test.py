"""Programs give the numbers of plain `jax.jit`, are traced once, and do without unknown options."""

import jax
import jax.numpy as jnp
import numpy as np

from model.compress import programs


def _counted():
  traces = []

  def scaled(k, x):
    traces.append(k)
    return k * jnp.sin(x)

  return scaled, traces


def test_the_trace_of_shapes_serves_the_program():
  scaled, traces = _counted()
  run = programs.compiled(scaled, static_argnums=0)
  assert run.eval_shape(3, jax.ShapeDtypeStruct((4,), jnp.float32)).shape == (4,)
  x = np.linspace(0, 1, 4, dtype=np.float32)
  np.testing.assert_allclose(run(3, jnp.asarray(x)), 3 * np.sin(x), rtol=1e-6)
  assert traces == [3]


def test_options_that_this_version_lacks_are_left_out():
  assert programs._known('cpu', xla_no_such_option=True) is None
  assert programs._known('gpu', **programs.QUICK) is None
  scaled, _ = _counted()
  run = programs.compiled(scaled, quick={'xla_no_such_option': True}, static_argnums=0)
  np.testing.assert_allclose(run(2, jnp.ones(3)), 2 * np.sin(np.ones(3)), rtol=1e-6)
