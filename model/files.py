"""Output folders that appear whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

# What a saved model consists of; anything else in a folder is somebody's work.
_OUTPUTS = {'.json', '.safetensors', '.jinja', '.txt', '.model'}


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, marker: str = 'config.json') -> Iterator[Path]:
  """Yields a temporary sibling folder, which takes the place of `path` when the block succeeds.

  A block that raises, or a run that is killed, leaves `path` as it was. An earlier output is
  replaced: a folder that has the file `marker` and nothing but files of a saved model.

  Raises:
    ValueError: `path` is a file, or a folder that holds anything else.
  """
  path = Path(os.path.realpath(path))
  check_replaceable(path, marker=marker)
  path.parent.mkdir(parents=True, exist_ok=True)
  token = secrets.token_hex(4)
  partial = path.with_name(f'.{path.name}.{token}.partial')
  partial.mkdir()
  try:
    yield partial
    check_replaceable(path, marker=marker)
    _swap(partial, path, path.with_name(f'.{path.name}.{token}.old'))
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(path: str | Path, *, marker: str = 'config.json') -> None:
  """Raises ValueError unless `path` is free, empty, or an earlier output (see `atomic_folder`)."""
  path = Path(path)
  if not path.exists():
    return
  if not path.is_dir():
    raise ValueError(f'the output {path} is a file; name a folder')
  strangers = sorted(p.name for p in path.iterdir() if p.is_dir() or p.suffix not in _OUTPUTS)
  if strangers:
    raise ValueError(
      f'the output folder {path} holds something else ({", ".join(strangers[:5])}); '
      'name a new folder, or empty it'
    )
  if any(path.iterdir()) and not (path / marker).is_file():
    raise ValueError(
      f'the output folder {path} is not empty and has no {marker}, so it is no earlier output; '
      'name a new folder, or empty it'
    )


def _swap(partial, path, old):
  if path.exists():
    path.rename(old)
  try:
    partial.rename(path)
  except OSError:
    if old.exists():
      old.rename(path)
    raise
  shutil.rmtree(old, ignore_errors=True)
