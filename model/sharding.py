"""Places arrays on a device mesh by one table from axis letters to mesh axes.

Models never name mesh axes. A matrix names its axes by letters (`Linear.axes`), and a weight
type names the axes of its arrays in terms of the I and O of the matrix. The table gives the mesh
axes of the parameters, and GSPMD propagates them through the program, so the same jitted functions
run on one device or on many. An axis whose size is not a multiple of its mesh axes is replicated;
the number of experts must be a multiple, because `model.expert_parallel` relies on it.

Mesh axes: `data` splits the batch; `fsdp` the batch and the parameters; `model` heads, feed-forward
and vocabulary; `expert` the experts; `context` the tokens of a row (`model.context_parallel`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from model.layers import basic
from model.layers.basic import Linear, Table
from ops.linear import Matrix, Weight

RULES: dict[str, str | tuple[str, ...] | None] = {
  'B': ('data', 'fsdp'),
  'T': 'context',
  'S': None,
  'D': 'fsdp',
  'F': 'model',
  'U': 'model',
  'N': 'model',
  'K': 'model',
  'V': 'model',
  'E': 'expert',
  'H': None,
  'Z': None,
  'P': None,
  'R': None,
  'W': None,
  '_': None,
}


def make_mesh(
  *,
  data: int = 1,
  fsdp: int = 1,
  model: int = 1,
  expert: int = 1,
  context: int = 1,
  devices=None,
) -> Mesh:
  """Arranges devices as a mesh. Raises ValueError if there are too few."""
  devices = jax.devices() if devices is None else devices
  sizes = {'data': data, 'fsdp': fsdp, 'model': model, 'expert': expert, 'context': context}
  shape, needed = tuple(sizes.values()), math.prod(sizes.values())
  if needed > len(devices):
    form = ' x '.join(map(str, shape))
    raise ValueError(f'a {form} mesh needs {needed} devices, not {len(devices)}')
  return jax.make_mesh(
    shape, tuple(sizes), devices=devices[:needed], axis_types=(AxisType.Auto,) * len(sizes)
  )


def sharding(mesh: Mesh, letters: str | tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
  """Returns the sharding of one array whose axes have these letters.

  Raises ValueError if the mesh does not divide its experts.
  """
  spec = []
  for letter, size in zip(letters, shape, strict=True):
    axis = RULES[letter]
    names = (axis,) if isinstance(axis, str) else axis or ()
    ways = 1
    for name in names:
      ways *= mesh.shape[name]
    if letter == 'E' and size % ways:
      raise ValueError(f'{size} experts do not divide among {ways} devices; choose another mesh')
    spec.append(axis if ways > 1 and size % ways == 0 else None)
  return NamedSharding(mesh, PartitionSpec(*spec))


def weight_shardings(mesh: Mesh, w: Matrix, axes: tuple[str, ...]):
  """Returns the sharding of a plain matrix, or a weight of w's type that holds its shardings.

  `axes` has the letters of leading axes, if any, of the inputs and of the outputs.
  """
  if not isinstance(w, Weight):
    return sharding(mesh, axes, w.shape)
  *lead, inputs, outputs = axes
  letters = {'I': inputs, 'J': inputs, 'O': outputs, 'R': '_', '_': '_'}
  changes = {}
  for field in dataclasses.fields(w):
    value = getattr(w, field.name)
    if 'axes' in field.metadata and value is not None:
      own = (*lead, *(letters[letter] for letter in field.metadata['axes']))
      changes[field.name] = weight_shardings(mesh, value, own)
  return dataclasses.replace(w, **changes)


def shard(model: nnx.Module, mesh: Mesh) -> None:
  """Moves every parameter of a model to its devices of the mesh."""
  for param, places in shardings_of(model, mesh):
    param.set_value(jax.device_put(param.get_value(), places))


def shardings_of(model: nnx.Module, mesh: Mesh) -> Iterator[tuple[nnx.Param, Any]]:
  """Yields each parameter with the shardings of its arrays."""
  for _, module in nnx.iter_modules(model):
    for value in vars(module).values():
      if isinstance(value, nnx.Param):
        yield value, _param_shardings(mesh, module, value)


def make_caches(make: Callable[[], Any], mesh: Mesh):
  """Calls a function that makes empty caches, so that each device makes its own part."""
  shapes = jax.eval_shape(make)
  place = lambda letters, one: sharding(mesh, letters, one.shape)
  places = tuple(jax.tree.map(place, cache.letters(), cache) for cache in shapes)
  return jax.jit(make, out_shardings=places)()


def mesh_of(model: nnx.Module) -> Mesh | None:
  """The mesh over whose devices the parameters of a model are placed, if there is one."""
  for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
    places = getattr(leaf, 'sharding', None)
    if isinstance(places, NamedSharding):
      return places.mesh
  return None


def batch_sharding(mesh: Mesh, axes: tuple[str, ...] = RULES['B']) -> NamedSharding:
  """Returns the sharding of token batches [B, T, ...], whose rows these mesh axes divide."""
  tokens = (RULES['T'],) if mesh.shape.get(RULES['T'], 1) > 1 else ()
  return NamedSharding(mesh, PartitionSpec(axes, *tokens))


def _param_shardings(mesh, module, param):
  w = param.get_value()
  if isinstance(module, Linear) and module.decides:  # small, and all devices need all the scores
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), w)
  if isinstance(module, Linear | Table) and len(w.shape) == len(module.axes):
    return weight_shardings(mesh, w, module.axes)
  if isinstance(module, Linear):
    return sharding(mesh, basic.letters(module, len(w.shape)), w.shape)
  return NamedSharding(mesh, PartitionSpec())
