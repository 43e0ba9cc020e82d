"""Saves models with any weight types as Orbax checkpoints and loads them onto any mesh.

Orbax stores the arrays as one flat tree. The config and the layout of the weights are stored beside
them as JSON, so that the weight types and their shardings are known before any array is read.
"""

import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from model import config as configs
from model import native
from model.sharding import make_mesh, shardings_of
from model.transformer import Transformer, abstract, parameters


def save(path: str | pathlib.Path, model: Transformer) -> None:
  """Writes a checkpoint, atomically. Raises ValueError if `path` exists."""
  path = pathlib.Path(path).absolute()
  if path.exists():
    raise ValueError(f'the checkpoint {path} exists already; choose another path')
  arrays, layout = native.flatten(model)
  about = {
    'config': configs.to_json(model.config),
    'dtype': str(model.dtype),
    'weights': layout,
    'arrays': native.forms(arrays),
  }
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    checkpointer.save(
      path,
      ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)),
    )


def load(path: str | pathlib.Path, mesh: Mesh | None = None) -> Transformer:
  """Reads a checkpoint, each array directly to its devices of the mesh (None: one device).

  Raises ValueError if `path` is not a checkpoint.
  """
  path = pathlib.Path(path).absolute()
  if not (path / 'about').is_dir():
    raise ValueError(f'{path} is not a checkpoint that `checkpoint.save` wrote')
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    about = checkpointer.restore(path, ocp.args.Composite(about=ocp.args.JsonRestore())).about
    model = _abstract(about, mesh)
    wanted, layout = native.flatten(model)
    restored = checkpointer.restore(
      path, ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted))
    ).arrays
  for name, param in parameters(model).items():
    param.set_value(native.build(layout[name], name, restored.__getitem__))
  return model


def _abstract(about, mesh) -> Transformer:
  model = abstract(configs.from_json(about['config']), jnp.dtype(about['dtype']))
  shapes = {
    name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    for name, (shape, dtype) in about['arrays'].items()
  }
  for name, param in parameters(model).items():
    param.set_value(native.build(about['weights'][name], name, shapes.__getitem__))
  for param, places in shardings_of(model, mesh or _one_device()):
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    param.set_value(jax.tree.map(place, param.get_value(), places))
  return model


def _one_device() -> Mesh:
  return make_mesh(devices=jax.devices()[:1])
