"""Weights of E experts: one weight whose arrays all have a leading axis E.

An expert is a weight [I, O] like any other, and what is done to matrices is done to experts one by
one. `ops.linear.grouped_matmul` multiplies rows by their experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ops.linear import Matrix, require


def count(w: Matrix) -> int | None:
  """How many experts a weight has; None if it is one matrix, without that axis."""
  return w.shape[0] if len(w.shape) > 2 else None


def take(w: Matrix, e: int | jax.Array) -> Matrix:
  """The weight [I, O] of one expert."""
  return jax.tree.map(lambda array: array[e], w)


def stack(weights: Sequence[Matrix]) -> Matrix:
  """One weight [E, I, O] of several [I, O].

  Raises ValueError unless all have the same type, static fields and shapes.
  """
  form = lambda w: (jax.tree.structure(w), [(a.shape, a.dtype) for a in jax.tree.leaves(w)])
  first = form(weights[0])
  for e, w in enumerate(weights):
    same = form(w) == first
    require(same, f'expert {e} is not stored as expert 0 is: {form(w)}, not {first}')
  return jax.tree.map(lambda *arrays: jnp.stack(arrays), *weights)


def mapped(fn: Callable[..., Any], w: Matrix, *shared: Any) -> Any:
  """fn(w, *shared) of a matrix; of experts, of each by itself with the same `shared`."""
  return fn(w, *shared) if count(w) is None else each(lambda one: fn(one, *shared), w)


def each(fn: Callable[[Any], Any], arrays: Any) -> Any:
  """Maps `fn` over the leading axis of a pytree, one expert after the other.

  It is traced once, and what it holds on the way is held for one expert at a time.
  """
  return jax.lax.map(fn, arrays)
