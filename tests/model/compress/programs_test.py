"""Programs give the numbers of plain `jax.jit`, are traced once, and do without unknown options."""

import concurrent.futures
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.compress import programs, recipe
from ops.solvers import obs


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


def test_a_program_that_was_begun_ahead_is_not_compiled_again():
  scaled, traces = _counted()
  run = programs.compiled(scaled, static_argnums=0)
  x = np.linspace(0, 1, 4, dtype=np.float32)
  events = []
  jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
  run.ahead(3, jax.ShapeDtypeStruct((4,), jnp.float32))
  run.ahead(3, jax.ShapeDtypeStruct((4,), jnp.float32))
  np.testing.assert_allclose(run(3, x), 3 * np.sin(x), rtol=1e-6)
  assert traces == [3]
  assert sum(name.endswith('backend_compile_duration') for name in events) == 1
  np.testing.assert_allclose(run(2, x[:2]), 2 * np.sin(x[:2]), rtol=1e-6)  # of other arguments
  assert traces == [3, 2]


def test_a_call_does_not_wait_for_programs_before_it(monkeypatch):
  ready = threading.Event()
  with concurrent.futures.ThreadPoolExecutor(1) as one:
    one.submit(ready.wait)
    monkeypatch.setattr(programs, 'COMPILERS', one)
    scaled, traces = _counted()
    run = programs.compiled(scaled, static_argnums=0)
    run.ahead(3, jnp.ones(4))
    for _ in range(2):
      np.testing.assert_allclose(run(3, jnp.ones(4)), 3 * np.sin(np.ones(4)), rtol=1e-6)
    ready.set()
  assert traces == [3]


def test_a_call_fails_as_its_compilation_ahead_did():
  def refuses(x):
    raise ValueError(f'no {x.shape[0]} inputs')

  run = programs.compiled(refuses)
  run.ahead(jnp.ones(3))
  with pytest.raises(ValueError, match='no 3 inputs'):
    run(jnp.ones(3))


def test_what_a_step_derives_is_shared_by_layers_with_the_same_statistics():
  step, plain = (
    recipe.parse({'name': 'x', 'steps': [one]}).steps[0]
    for one in ({'gptq': {'damping': 0.5}}, {'wanda': {}})
  )
  same, other = ({'input_covariance': jnp.diag(jnp.arange(a, a + 4.0))} for a in (1, 2))
  prepared, w_IO = programs.Prepared(step), jnp.ones((4, 2))
  first, second, third = (prepared.join(measured, w_IO) for measured in (same, same, other))
  assert first['prepared'] is second['prepared'] and set(first) == {'input_covariance', 'prepared'}
  for found, measured in ((first, same), (third, other)):
    expected = obs.prepare(measured['input_covariance'], act_order=True, damping=0.5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, found['prepared'], expected)
  unchanged = programs.Prepared(plain).join(same, w_IO)
  assert unchanged == same and unchanged is not same
