"""Keeps the zeros of pruned matrices while a model trains.

A matrix that is pruned without a pattern is stored as a plain array, or in codes, and its zeros
look like other numbers to an optimizer. `hold` puts a mask over such matrices, under which only the
kept entries learn; `release` takes it off again, with exact zeros in its place. N:M storage keeps
its places by itself.
"""

from collections.abc import Collection

import jax
from flax import nnx

from model.transformer import Transformer, linears
from ops import experts, masked, sparse
from ops.linear import Matrix, Weight, innermost, map_inner
from ops.masked import MaskedTensor
from ops.quantized import QuantizedTensor


def hold(model: Transformer, pruned: Collection[str]) -> tuple[Transformer, list[str]]:
  """Returns a model with masks over its pruned matrices, and the layers that got one.

  `pruned` has the layers that are known to be pruned; plain matrices also count if more than a
  fifth of them is zero, which a model has that was pruned before. Without any, it is the model
  itself, else a copy.
  """
  found = [layer for layer, linear in linears(model).items() if _lacks_mask(linear, layer, pruned)]
  if found:
    model = nnx.clone(model)
  for layer in found:
    weight = linears(model)[layer].weight
    weight.set_value(_masked(weight.get_value()))
  return model, found


def release(model: Transformer, layers: Collection[str]) -> None:
  """Takes the masks of `hold` off a model, where what is under them is zero without them too."""
  for layer in layers:
    weight = linears(model)[layer].weight
    weight.set_value(_unmasked(weight.get_value()))


def _lacks_mask(linear, layer: str, pruned: Collection[str]) -> bool:
  w = innermost(linear.weight.get_value())
  if isinstance(w, Weight):
    return layer in pruned and not isinstance(w, MaskedTensor | sparse.SparseTensor)
  return layer in pruned or bool(sparse.looks_pruned(w))


@jax.jit
def _masked(w: Matrix) -> Matrix:
  return map_inner(lambda inner: experts.mapped(masked.masked, inner), w)


@jax.jit
def _unmasked(w: Matrix) -> Matrix:
  return map_inner(_bare, w)


def _bare(w: Matrix) -> Matrix:
  if not isinstance(w, MaskedTensor):
    return w
  if isinstance(w.values, jax.Array):
    return experts.mapped(masked.bare, w)
  # Codes under a mask were made from zeros.
  return w.values if isinstance(w.values, QuantizedTensor) and w.values.holds_zero else w
