"""Checks the contract of every technique on a small random matrix.

One line tests a new technique: `contracts.check('name')`, or `check(name, spec)` for options other
than the defaults. Quality is not checked; that belongs in the technique's own test.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import native
from model.compress import registry, statistics
from model.compress.registry import Outcome, Technique
from model.layers.basic import Linear
from ops.linear import Matrix, Weight, dense, matmul

INPUTS, OUTPUTS, TOKENS = 64, 24, 40
# A kernel may sum in another order than the product with `dense()`; values are of order 1.
PRODUCT_TOLERANCE = 1e-4


SCOPES = ('linears', 'parameters')


def check(name: str, spec: Any = None) -> None:
  """Checks every contract of a registered technique. `spec`: its options, None for the defaults.

  Raises AssertionError if a contract is broken, and ValueError if there is no such technique or if
  it does not work on single matrices.
  """
  row = registry.lookup(name)
  if row.scope not in SCOPES:
    raise ValueError(f'{name} works on a whole {row.scope}; the contracts are for single matrices')
  spec = row.spec() if spec is None else spec
  run, traces = _counted(row, spec)
  w_IO, measured = _example(row)
  outcome = run(w_IO, measured)
  _check_outcome(name, w_IO, outcome)
  _check_traced_once(name, run, traces, w_IO, measured, outcome)
  _check_deterministic(name, outcome, _counted(row, spec)[0](w_IO, measured))
  _check_stored(name, outcome.weight)
  _check_product(name, outcome.weight)
  for what, plain in (('zeros', jnp.zeros_like(w_IO)), ('a constant', jnp.ones_like(w_IO))):
    _check_outcome(f'{name} of {what}', plain, run(plain, measured))


def _example(row: Technique) -> tuple[jax.Array, dict[str, Any]]:
  rng = np.random.default_rng(0)
  w_IO = jnp.asarray(rng.standard_normal((INPUTS, OUTPUTS)), jnp.float32)
  x_TI = jnp.asarray(rng.standard_normal((TOKENS, INPUTS)), jnp.float32)
  measured = statistics.finish(statistics.measure([(x_TI,)], row.statistics))
  return w_IO, measured | ({registry.PLAN: jnp.float32(0.5)} if row.plan else {})


def _counted(row: Technique, spec):
  """Returns the compiled technique, and a list that grows by one whenever it is traced."""
  traces = []

  @jax.jit
  def run(w_IO, measured):
    traces.append(row.name)
    return row(w_IO, measured, spec)

  return run, traces


def _check_outcome(name, w_IO, outcome: Outcome):
  weight = outcome.weight
  _expect(
    isinstance(weight, jax.Array | Weight),
    f'{name} returns a matrix, not a {type(weight).__name__}',
  )
  _expect(weight.shape == w_IO.shape, f'{name} turns the shape {w_IO.shape} into {weight.shape}')
  dense_IO = jax.jit(dense)(weight)
  _expect(
    dense_IO.shape == w_IO.shape and dense_IO.dtype == weight.dtype,
    f'{name}: dense() is {dense_IO.dtype} {dense_IO.shape}, which contradicts its shape or dtype',
  )
  _expect(jnp.isfinite(dense_IO).all(), f'{name}: dense() is not finite')
  for event, count in outcome.events.items():
    _expect(int(count) >= 0, f'{name}: the event {event!r} happened {int(count)} times')


def _check_traced_once(name, run, traces, w_IO, measured, outcome):
  run(2 * w_IO, measured)
  _expect(len(traces) == 1, f'{name} is compiled again for other values of the same shape')
  shapes = jax.eval_shape(run, w_IO, measured).weight
  stored = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(outcome.weight)]
  promised = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes)]
  _expect(promised == stored, f'{name}: eval_shape gives {promised}, but the result is {stored}')


def _check_deterministic(name, outcome, again):
  _expect(_equal(outcome, again), f'{name} gives another result when it is compiled again')


def _check_stored(name, weight: Matrix):
  arrays, layout = native.flatten(_layer(weight))
  for path, stored in arrays.items():
    _expect(isinstance(stored, jax.Array), f'{name}: {path} is stored, but is not an array')
  entry = json.loads(json.dumps(layout['weight']))
  again = native.build(entry, 'weight', arrays.__getitem__)
  _expect(_equal(weight, again), f'{name}: the weight differs after saving and loading')


def _check_product(name, weight: Matrix):
  @jax.jit
  def products(x_TI, weight):
    slope_TI = jax.grad(lambda x: jnp.square(matmul(x, weight)).sum())(x_TI)
    seen_TI = weight.round_inputs(x_TI) if isinstance(weight, Weight) else x_TI
    return matmul(x_TI, weight), seen_TI @ dense(weight).astype(x_TI.dtype), slope_TI

  x_TI = np.random.default_rng(1).standard_normal((TOKENS, INPUTS), np.float32)
  product_TO, expected_TO, slope_TI = products(x_TI, weight)
  error = float(jnp.abs(product_TO - expected_TO).max())
  _expect(error <= PRODUCT_TOLERANCE * INPUTS**0.5, f'{name}: matmul and dense() differ by {error}')
  _expect(jnp.isfinite(slope_TI).all(), f'{name}: the gradient of matmul is not finite')


def _layer(weight: Matrix) -> Linear:
  layer = Linear(
    weight.shape, axes=('I', 'O'), bias=False, rngs=nnx.Rngs(0), dtype=jnp.float32, stddev=0.0
  )
  layer.weight.set_value(weight)
  return layer


def _equal(a, b) -> bool:
  same_type = jax.tree.structure(a) == jax.tree.structure(b)
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b))
  return same_type and all(np.array_equal(np.asarray(p), np.asarray(q)) for p, q in leaves)


def _expect(condition, message: str) -> None:
  if not condition:
    raise AssertionError(message)
