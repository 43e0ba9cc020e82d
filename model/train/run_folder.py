"""The files of a training run, from which a killed run resumes as if nothing had happened.

run.json      the run's identity: a run with another identity does not resume here
loss.jsonl    one record per update
checkpoints/  the whole state after some updates, written by Orbax to a temporary folder and renamed
lock          held while a process trains here
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from model import files, lock

LOCK = 'lock'
KEPT_CHECKPOINTS = 2


class RunFolder:
  """The folder of one run. Close it, or use it in a `with` statement."""

  def __init__(self, folder: str | pathlib.Path, identity: dict[str, Any]):
    """Opens a new or empty folder, or one that a run of the same identity left.

    Raises:
      ValueError: the folder holds something else, or another run (the differences are named), or
        cannot be written, or another process trains there.
    """
    self._folder = pathlib.Path(folder).resolve()
    check_free(self._folder)
    with contextlib.ExitStack() as stack:
      stack.enter_context(_locked(self._folder))
      _claim(self._folder, identity)
      options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(KEPT_CHECKPOINTS),
        # On a CPU a checkpoint written in the background may share memory with the donated state.
        enable_async_checkpointing=False,
      )
      self._manager = ocp.CheckpointManager(self._folder / 'checkpoints', options=options)
      stack.callback(self._manager.close)
      self._stack = stack.pop_all()

  def __enter__(self) -> 'RunFolder':
    return self

  def __exit__(self, *_) -> None:
    self._stack.close()

  def restore(self, state: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Returns the state of the last checkpoint, placed as `state` is, and the records up to it.

    With no checkpoint, `state` itself and no records. Later records are cut off the file.
    Raises ValueError if the disk has no room for the checkpoints to come.
    """
    step = self._manager.latest_step()
    self._check_room(state, KEPT_CHECKPOINTS + 1 - len(self._manager.all_steps()))
    if step is not None:
      names, leaves, structure = _flatten(state)
      wanted = {name: _abstract(leaf) for name, leaf in zip(names, leaves)}
      found = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
      state = jax.tree.unflatten(structure, [found[name] for name in names])
    return state, self._cut_records(step or 0)

  def append(self, record: dict[str, Any]) -> None:
    """Adds the record of one update."""
    path = self._folder / 'loss.jsonl'
    with files.naming(path), open(path, 'a') as file:
      file.write(json.dumps(record) + '\n')

  def save(self, step: int, state: Any) -> None:
    """Writes a checkpoint of the state after `step` updates.

    Raises OSError if the disk is full: before writing, if that can be known.
    """
    if shutil.disk_usage(self._folder).free < _nbytes(state):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
    names, leaves, _ = _flatten(state)
    args = ocp.args.StandardSave(dict(zip(names, leaves)))
    try:
      self._manager.save(step, args=args, force=True)
    except ValueError as error:
      _raise_disk_error(error, self._folder)
      raise

  def _check_room(self, state, checkpoints):
    needed = checkpoints * _nbytes(state)
    free = shutil.disk_usage(self._folder).free
    if free < needed:
      raise ValueError(
        f'{self._folder} needs {needed / 1e6:,.1f} MB for checkpoints, but its disk has '
        f'{free / 1e6:,.1f} MB free; name another folder'
      )

  def _cut_records(self, step):
    path = self._folder / 'loss.jsonl'
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # A killed run may leave half a line, but never before a checkpoint.
    kept = [line for line in lines if line.endswith('\n')][:step]
    _write(path, ''.join(kept))
    return [json.loads(line) for line in kept]


class AnotherRun(ValueError):
  """A folder holds a run that cannot be resumed with these settings."""


def check_free(folder: str | pathlib.Path) -> None:
  """Raises ValueError unless the folder is new, empty, or that of a training run."""
  folder = pathlib.Path(folder)
  if (folder / 'run.json').exists() or not folder.exists():
    return
  if not folder.is_dir() or {path.name for path in folder.iterdir()} - {LOCK}:
    raise ValueError(f'{folder} is not a training run; choose a new or empty folder')


@contextlib.contextmanager
def _locked(folder: pathlib.Path):
  files.make_folder(folder)
  with lock.hold(folder / LOCK, f'the training run {folder}'):
    yield


def _claim(folder: pathlib.Path, identity: dict[str, Any]) -> None:
  identity = json.loads(json.dumps(identity))
  path = folder / 'run.json'
  if not path.exists():
    _write(path, json.dumps(identity, indent=2) + '\n')
    return
  changes = _differences(json.loads(path.read_text()), identity)
  if changes:
    raise AnotherRun(
      f'{folder} holds a run that differs in {"; ".join(changes)}. Resume with the same settings, '
      'or choose another folder'
    )


def _differences(old: Any, new: Any, name: str = '') -> list[str]:
  if isinstance(old, dict) and isinstance(new, dict):
    keys = sorted(old.keys() | new.keys())
    prefix = f'{name}.' if name else ''
    return [d for k in keys for d in _differences(old.get(k), new.get(k), prefix + k)]
  return [] if old == new else [f'{name} ({old!r} there, {new!r} here)']


def _write(path: pathlib.Path, text: str) -> None:
  with files.atomic_file(path) as partial:
    partial.write_text(text)


def _raise_disk_error(error: ValueError, folder: pathlib.Path) -> None:
  """Raises the OSError that the storage library reports as a ValueError, if it is one."""
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code:
    raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error


def _flatten(tree):
  paths, structure = jax.tree.flatten_with_path(tree)
  names = [jax.tree_util.keystr(path, simple=True, separator='.') for path, _ in paths]
  return names, [leaf for _, leaf in paths], structure


def _nbytes(state) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
