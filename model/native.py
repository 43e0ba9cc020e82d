"""Folders that hold any model: `lissom.json` describes the arrays in the safetensors files.

A weight that is no plain array is stored as its fields, under the path of its parameter:
`layers.0.ffn.up.weight.values`, `.scales` and so on; nested types likewise. `lissom.json` has the
config with every layer's own widths, the type and static fields of each parameter, and the shape
and dtype of each array, because those of codes and indices do not follow from the config.
`config.json` is the one of Hugging Face as far as it can describe the model, with "lissom" as
`model_type` and as the method of `quantization_config`, so that other tools refuse the folder
instead of reading it wrongly.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model import config as configs
from model import safetensors_io
from model.safetensors_io import Tensor
from model.transformer import Transformer, abstract, parameters
from ops import (
  activations,
  int8_training,
  lora,
  masked,
  qat,
  quantized,
  rotated,
  sparse,
  transposed,
)
from ops.linear import WEIGHT_TYPES, Matrix, Weight

# Importing a module registers its weight types.
BUILT_IN = (activations, int8_training, lora, masked, qat, quantized, rotated, sparse, transposed)
MANIFEST = 'lissom.json'
VERSION = 1
# In config.json. Tools refuse an unknown model type. At an unknown quantization method transformers
# 5 only warns, and fills the model with random numbers.
HF_MARK = {'model_type': 'lissom', 'quantization_config': {'quant_method': 'lissom'}}
Arrays = dict[str, jax.Array]


def is_compressed(model: Transformer) -> bool:
  """Whether any parameter is no plain array."""
  return any(isinstance(p.get_value(), Weight) for p in parameters(model).values())


def flatten(model: Transformer) -> tuple[Arrays, dict[str, Any]]:
  """The arrays of a model by name, and the JSON description from which `build` makes weights."""
  arrays, layout = {}, {}
  for path, param in parameters(model).items():
    layout[path] = _describe(param.get_value(), path, arrays)
  return arrays, layout


def _describe(w: Matrix, name: str, arrays: Arrays):
  if not isinstance(w, Weight):
    arrays[name] = w
    return 'array'
  fields = {}
  for field in dataclasses.fields(w):
    value = getattr(w, field.name)
    if 'axes' not in field.metadata:
      fields[field.name] = str(value) if field.name == 'dtype' else value
    elif value is not None:
      fields[field.name] = _describe(value, f'{name}.{field.name}', arrays)
    else:
      fields[field.name] = None
  return {'type': type(w).__name__, **fields}


def build(entry, name: str, array: Callable[[str], Any]) -> Any:
  """Builds a weight from one entry of a layout; `array` returns the array of a name.

  Raises ValueError for a weight type or field that this version does not know, and for fields that
  do not fit one another.
  """
  if entry == 'array':
    return array(name)
  if not isinstance(entry, dict):
    raise ValueError(f'{name} is described as {entry!r}, not as an array or the fields of a weight')
  fields = dict(entry)
  kind = fields.pop('type', None)
  if kind not in WEIGHT_TYPES:
    raise ValueError(
      f'{name} has the weight type {kind!r}; this version knows {list(WEIGHT_TYPES)}'
    )
  known = {field.name: field for field in dataclasses.fields(WEIGHT_TYPES[kind])}
  if set(fields) != set(known):
    raise ValueError(f'{name}, {kind}: fields {sorted(fields)} were stored, not {sorted(known)}')
  for field, value in fields.items():
    if field == 'dtype':
      fields[field] = _dtype(value, name)
    elif 'axes' in known[field].metadata and value is not None:
      fields[field] = build(value, f'{name}.{field}', array)
  try:
    return WEIGHT_TYPES[kind](**fields)
  except ValueError as error:
    raise ValueError(f'{name}, {kind}: {error}') from None


def _dtype(value, name: str) -> jnp.dtype:
  try:
    return jnp.dtype(value)
  except TypeError:
    raise ValueError(f'{name} has the dtype {value!r}, which does not exist') from None


def names(entry, name: str) -> list[str]:
  """The names of the arrays of one entry of a layout."""
  found = []
  build(entry, name, found.append)
  return found


def tensors(model: Transformer) -> dict[str, Tensor]:
  """The arrays of a model as the safetensors files of its folder hold them."""
  arrays, _ = flatten(model)
  return {
    name: Tensor(a.shape, np.dtype(a.dtype), lambda a=a: np.asarray(a))
    for name, a in arrays.items()
  }


def manifest(model: Transformer, recipe: dict | None = None) -> dict[str, Any]:
  """The contents of `lissom.json`."""
  arrays, layout = flatten(model)
  return {
    'version': VERSION,
    'config': configs.to_json(model.config),
    'recipe': recipe,
    'weights': layout,
    'arrays': forms(arrays),
  }


def forms(arrays: Arrays) -> dict[str, list]:
  """The shape and dtype of each array, as plain JSON values."""
  return {name: [list(a.shape), str(a.dtype)] for name, a in arrays.items()}


def is_native(folder: pathlib.Path) -> bool:
  """Whether a folder holds a model in this form."""
  return (folder / MANIFEST).is_file()


def read_config(folder: pathlib.Path) -> configs.ModelConfig:
  """The config of a model in this form. Raises ValueError if there is no valid one."""
  try:
    return configs.from_json(_manifest(folder)['config'])
  except (KeyError, TypeError) as error:
    raise ValueError(f'{folder / MANIFEST} has no config of this version: {error!r}') from None


def read(folder: pathlib.Path, dtype=None) -> Transformer:
  """Loads a model in this form. `dtype` is that of the activations (None: float32).

  Raises ValueError if arrays are missing, unexpected, misshapen or not finite, each listed.
  """
  about, stored = _manifest(folder), safetensors_io.read_folder(folder)
  model = abstract(read_config(folder), dtype or jnp.float32)
  _check(folder, model, about, stored)
  bad = []

  def load(name):
    values = stored[name].read()
    if jnp.issubdtype(values.dtype, jnp.floating) and not np.isfinite(values).all():
      bad.append(name)
    # A copy: an array that shares the mapped file would change or die with it.
    return jnp.array(values, copy=True)

  for path, param in parameters(model).items():
    param.set_value(build(about['weights'][path], path, load))
  _raise_listed(folder, [f'{name} has NaN or infinity' for name in bad])
  return model


def _manifest(folder):
  path = folder / MANIFEST
  try:
    about = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path} is no valid JSON: {error}') from None
  version = about.get('version') if isinstance(about, dict) else None
  if version != VERSION:
    raise ValueError(f'{path} has version {version}; this code reads {VERSION}')
  absent = [key for key in ('config', 'weights', 'arrays') if not isinstance(about.get(key), dict)]
  if absent:
    raise ValueError(f'{path} lacks {", ".join(absent)}')
  return about


def _check(folder, model, about, stored):
  """Compares config, manifest and files by names and shapes, before any array is read."""
  params, layout, arrays = parameters(model), about['weights'], about['arrays']
  problems = [f'{path} is not described' for path in params if path not in layout]
  problems += [f'{path} is no parameter of the config' for path in layout if path not in params]
  expected = {name for path, entry in layout.items() for name in names(entry, path)}
  problems += [f'{name} is missing' for name in sorted(expected - set(stored))]
  problems += [f'{name} is unexpected' for name in sorted(set(stored) - expected)]
  problems += [f'{name} has no shape' for name in sorted(expected - set(arrays))]
  _raise_listed(folder, problems)
  found = forms(stored)
  problems += [
    f'{name} is {found[name]}, not {arrays[name]}'
    for name in sorted(expected)
    if found[name] != arrays[name]
  ]
  for path, param in params.items():
    try:
      shape, wanted = _abstract(layout[path], path, stored).shape, param.get_value().shape
    except ValueError as error:
      problems.append(str(error))
      continue
    if shape != wanted:
      problems.append(f'{path} is {shape}, the config says {wanted}')
  _raise_listed(folder, problems)


def _abstract(entry, path: str, stored) -> Matrix:
  """The weight of one entry, checked, with `jax.ShapeDtypeStruct`s for its arrays."""
  shape_of = lambda name: jax.ShapeDtypeStruct(stored[name].shape, stored[name].dtype)
  w = build(entry, path, shape_of)
  if isinstance(w, Weight):
    try:
      w.check()
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from None
  return w


def _raise_listed(folder, problems):
  if problems:
    more = f'; and {len(problems) - 20} more' if len(problems) > 20 else ''
    raise ValueError(f'{folder} does not fit its {MANIFEST}: ' + '; '.join(problems[:20]) + more)
