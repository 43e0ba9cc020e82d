"""Fingerprints by which a run recognizes what it started from."""

import hashlib
import pathlib
from collections.abc import Iterable

import jax
import numpy as np

from model.transformer import Transformer, parameters


def of_arrays(arrays: Iterable[tuple[str, np.ndarray | jax.Array]]) -> str:
  """SHA-256 of the names, types, shapes and values of arrays, in this order."""
  digest = hashlib.sha256()
  for name, array in arrays:
    values = np.asarray(array)
    digest.update(f'{name} {values.dtype} {values.shape}\n'.encode())
    digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
  return digest.hexdigest()


def of_model(model: Transformer) -> str:
  """SHA-256 of all parameters of a model, those of compressed weights included."""
  return of_arrays(
    (f'{name}{jax.tree_util.keystr(path)}', leaf)
    for name, param in parameters(model).items()
    for path, leaf in jax.tree.leaves_with_path(param.get_value())
  )


def of_files(paths: Iterable[pathlib.Path]) -> str:
  """SHA-256 of the names and contents of files, in the order of their paths."""
  digest = hashlib.sha256()
  for path in sorted(paths):
    data = path.read_bytes()
    digest.update(f'{path.name} {len(data)}\n'.encode() + data)
  return digest.hexdigest()
