"""Compares the matrices of a part of a model with the original ones, for the ledger."""

import dataclasses
from collections.abc import Iterable

import jax.numpy as jnp

from model.compress.ledger import LayerResult
from model.compress.parts import Part
from model.compress.programs import compiled
from model.transformer import matrices, parameters
from ops.linear import Matrix, Weight, dense
from ops.transposed import as_table


class Results:
  """Compares the matrices of a part with the originals, each as soon as it has its final form.

  `tables`: the paths of tables that are compressed as matrices.
  """

  def __init__(self, part: Part, tables: Iterable[str] = ()):
    found, params = matrices(part.module), parameters(part.module)
    self._before = {f'{layer}.weight'.strip('.'): w for layer, w in found.items()}
    self._before |= {path: params[path].get_value() for path in tables}
    self._part, self._order, self._found = part, tuple(self._before), {}

  def settle(self, paths: Iterable[str]) -> None:
    """Compares the matrices among some parameters, and releases their originals."""
    params = parameters(self._part.module)
    for path in paths:
      if path in self._before:
        now, was = as_table(params[path].get_value()), self._before.pop(path)
        self._found[path] = LayerResult(
          layer=self._part.layer(path).removesuffix('weight').strip('.'),
          shape=tuple(now.shape),
          stored=describe(now),
          stored_bytes=now.nbytes,
          relative_error=float(relative_error(was, now)),
        )

  def all(self) -> list[LayerResult]:
    """The results of all matrices, in the order of the part."""
    self.settle(list(self._before))
    return [self._found[path] for path in self._order]


@compiled
def relative_error(w, now):
  before, after = dense(w).astype(jnp.float32), dense(now).astype(jnp.float32)
  return jnp.linalg.norm(before - after) / jnp.maximum(jnp.linalg.norm(before), 1e-30)


def describe(w: Matrix) -> str:
  """How a weight is stored, in a few words: 'SparseTensor 2:4 of bfloat16'."""
  if not isinstance(w, Weight):
    return str(w.dtype)
  static = [
    str(value)
    for field in dataclasses.fields(w)
    if 'axes' not in field.metadata and isinstance(value := getattr(w, field.name), str | int)
  ]
  inner = getattr(w, w.passes_to or 'values', None)
  nested = f' of {describe(inner)}' if isinstance(inner, Weight) else ''
  return f'{" ".join([type(w).__name__, *static])}{nested}'
