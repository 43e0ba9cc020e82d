"""Divides the arrays of a model into those that are trained and those that stay as they are.

Each array has a role: a value, an adapter, a scale, a code, a mask or a buffer (`ops.linear.Role`).
A `Selection` says, for each role that can be trained, which parameters it means. `partition` then
gives two flat dictionaries of arrays by name. Training differentiates, optimizes, donates and saves
the first alone; the second keeps its dtypes and shardings.

  Selection()                     every value and every adapter
  Selection(value=())             the adapters alone: LoRA and QLoRA
  Selection(scale=('layers.*',))  the scales of the blocks too
"""

import dataclasses
import fnmatch
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model import stacked
from model.layers.basic import Buffer
from model.transformer import Transformer
from ops import sparse
from ops.linear import Matrix, Role, Weight, innermost, roles

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
  """Patterns of the paths of parameters, such as 'layers.*.ffn.*', for each role that is trained.

  value: weights, biases, norms and tables that are numbers and not codes.
  adapter: low-rank corrections and what belongs to them.
  scale: the scales of quantized weights, where they are floating.
  """

  value: tuple[str, ...] = ('*',)
  adapter: tuple[str, ...] = ('*',)
  scale: tuple[str, ...] = ()

  def takes(self, path: str, role: Role) -> bool:
    """Whether the arrays of this role are trained in the parameter with this path."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in getattr(self, role, ()))


@dataclasses.dataclass(frozen=True)
class Structure:
  """All of a model but its arrays: `model` puts them back. It is static under jit."""

  graphdef: nnx.GraphDef
  tree: Any
  names: tuple[str, ...]
  buffers: tuple[str, ...] = ()  # of the names, those of arrays that have a rule of their own

  def model(self, arrays: Mapping[str, jax.Array]) -> Transformer:
    """Builds the model of these arrays, which may be traced."""
    state = jax.tree.unflatten(self.tree, [arrays[name] for name in self.names])
    return nnx.merge(self.graphdef, state)


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of a model: the path of its parameter, its own name, and its role there."""

  path: str
  name: str
  role: Role
  array: jax.Array


def partition(model: Transformer, selection: Selection) -> tuple[Structure, Arrays, Arrays]:
  """Divides the arrays of a model: its structure, what is trained, and what is frozen.

  Both dictionaries hold the model's own arrays by the names that files use, such as
  'layers.0.ffn.up.weight.values'.

  A linear layer counts as pruned if more than a fifth of its matrix, but not all of it, is exactly
  zero (`sparse.looks_pruned`). Biases, norms, tables and matrices of zeros are initial values.

  Raises:
    ValueError: a pattern matches nothing; it selects values of a weight that is stored as codes, or
      an array that is not floating; a plain matrix is pruned, and training would undo that; or
      nothing is left to train.
  """
  graphdef, state = nnx.split(model)
  found = list(leaves(state))
  _check_patterns(found, selection)
  _check_reachable(state, found, selection)
  trained, frozen = {}, {}
  for leaf in found:
    (trained if selection.takes(leaf.path, leaf.role) else frozen)[leaf.name] = leaf.array
  if not trained:
    raise ValueError(f'{selection} leaves nothing to train; select a role and layers to train')
  return _structure(graphdef, state, found), trained, frozen


def stack(model: Transformer, trained: Collection[str]) -> tuple[Structure, Arrays, Arrays]:
  """What `partition` returns, with the model's layers stacked where they are alike.

  `trained` has the names of the trained arrays in the model as it is. Layers are alike only if the
  same arrays of them are trained.
  """
  taken = [set() for _ in model.layers]
  for name in trained:
    if name.startswith('layers.'):
      _, layer, inner = name.split('.', 2)
      taken[int(layer)].add(inner)
  packed = stacked.stack(model, traits=list(map(frozenset, taken)))
  graphdef, state = nnx.split(packed)
  found = list(leaves(state))
  parts = {}, {}
  for leaf in found:
    is_frozen = stacked.ordinary_path(packed, leaf.name) not in trained
    parts[is_frozen][leaf.name] = leaf.array
  return _structure(graphdef, state, found), *parts


def _structure(graphdef, state, found: list[Leaf]) -> Structure:
  names = lambda leaves: tuple(leaf.name for leaf in leaves)
  buffers = names(leaf for leaf in found if leaf.role == 'buffer')
  return Structure(graphdef, jax.tree.structure(state), names(found), buffers)


def leaves(state: nnx.State) -> Iterator[Leaf]:
  """The arrays of a model's state, in the order of `jax.tree.leaves`."""
  for keys, param in nnx.to_flat_state(state):
    path, w = '.'.join(map(str, keys)), param.get_value()
    own = roles(w, 'buffer' if isinstance(param, Buffer) else 'value')
    for (inner, array), role in zip(jax.tree.leaves_with_path(w), own, strict=True):
      fields = ''.join(f'.{key.name}' for key in inner)
      yield Leaf(path, path + fields, role, array)


def _check_patterns(found: list[Leaf], selection: Selection) -> None:
  for field in dataclasses.fields(selection):
    for pattern in getattr(selection, field.name):
      if pattern != '*' and not any(fnmatch.fnmatchcase(leaf.path, pattern) for leaf in found):
        paths = ', '.join(dict.fromkeys(leaf.path for leaf in found[:8]))
        raise ValueError(f'no parameter matches {pattern!r}; there are {paths}, ...')


def _check_reachable(state: nnx.State, found: list[Leaf], selection: Selection) -> None:
  for leaf in found:
    if leaf.role == 'code' and selection.takes(leaf.path, 'value'):
      raise ValueError(
        f'{leaf.name} holds codes ({leaf.array.dtype}), which gradients do not reach; train an '
        'adapter over them with Selection(value=()), or train first and quantize afterwards'
      )
    if selection.takes(leaf.path, leaf.role) and not _trainable(leaf.array):
      raise ValueError(
        f'{leaf.name} is {leaf.array.dtype}: only floating-point numbers of 16 or 32 bits can be '
        'trained'
      )
  for keys, param in nnx.to_flat_state(state):
    path, inner = '.'.join(map(str, keys)), innermost(param.get_value())
    if keys[-1] == 'weight' and selection.takes(path, 'value') and _is_pruned(inner):
      raise ValueError(
        f'{path} is pruned (more than {sparse.PRUNED:.0%} of it is zero), and training would undo '
        'that; train first and prune afterwards, or keep its zeros by `masked.masked`'
      )


def _trainable(array: jax.Array) -> bool:
  return jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize >= 2


def _is_pruned(w: Matrix) -> bool:
  return not isinstance(w, Weight) and bool(sparse.looks_pruned(w))
