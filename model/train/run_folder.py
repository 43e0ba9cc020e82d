"""What a training run leaves on disk, so that a killed run goes on as if nothing had happened.

run.json      what the run is: a run that differs does not resume here
loss.jsonl    one record an update
checkpoints/  the whole state after some updates, written by Orbax to a temporary folder and renamed
"""

import json
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

KEPT_CHECKPOINTS = 2


class RunFolder:
  """The folder of one run. Close it, or use it in a `with` statement."""

  def __init__(self, folder: str | pathlib.Path, identity: dict[str, Any]):
    """Opens a new or empty folder, or one that a run of the same identity left.

    Raises:
      ValueError: the folder holds something else, or another run (the differences are named).
    """
    self._folder = pathlib.Path(folder).absolute()
    _claim(self._folder, identity)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.LatestN(KEPT_CHECKPOINTS),
      # On a CPU a checkpoint written in the background may share memory with the donated state.
      enable_async_checkpointing=False,
    )
    self._manager = ocp.CheckpointManager(self._folder / 'checkpoints', options=options)

  def __enter__(self) -> 'RunFolder':
    return self

  def __exit__(self, *_) -> None:
    self._manager.close()

  def restore(self, state: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Returns the state of the last checkpoint, placed as `state` is, and the records up to it.

    With no checkpoint, `state` itself and no records. Later records are cut off the file.
    """
    step = self._manager.latest_step()
    if step is not None:
      names, leaves, structure = _flatten(state)
      wanted = {name: _abstract(leaf) for name, leaf in zip(names, leaves)}
      found = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
      state = jax.tree.unflatten(structure, [found[name] for name in names])
    return state, self._cut_records(step or 0)

  def append(self, record: dict[str, Any]) -> None:
    """Adds the record of one update."""
    with open(self._folder / 'loss.jsonl', 'a') as file:
      file.write(json.dumps(record) + '\n')

  def save(self, step: int, state: Any) -> None:
    """Writes a checkpoint of the state after `step` updates."""
    names, leaves, _ = _flatten(state)
    self._manager.save(step, args=ocp.args.StandardSave(dict(zip(names, leaves))), force=True)

  def _cut_records(self, step):
    path = self._folder / 'loss.jsonl'
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # A killed run may leave half a line, but never before a checkpoint.
    kept = [line for line in lines if line.endswith('\n')][:step]
    _replace(path, ''.join(kept))
    return [json.loads(line) for line in kept]


def _claim(folder: pathlib.Path, identity: dict[str, Any]) -> None:
  identity = json.loads(json.dumps(identity))
  path = folder / 'run.json'
  if path.exists():
    changes = _differences(json.loads(path.read_text()), identity)
    if changes:
      raise ValueError(
        f'{folder} holds a run that differs in {"; ".join(changes)}. Resume with the same '
        f'settings, or choose another folder'
      )
    return
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f'{folder} is not a training run; choose a new or empty folder')
  folder.mkdir(parents=True, exist_ok=True)
  _replace(path, json.dumps(identity, indent=2) + '\n')


def _differences(old: Any, new: Any, name: str = '') -> list[str]:
  if isinstance(old, dict) and isinstance(new, dict):
    keys = sorted(old.keys() | new.keys())
    prefix = f'{name}.' if name else ''
    return [d for k in keys for d in _differences(old.get(k), new.get(k), prefix + k)]
  return [] if old == new else [f'{name} ({old!r} there, {new!r} here)']


def _replace(path: pathlib.Path, text: str) -> None:
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text)
  os.replace(temporary, path)


def _flatten(tree):
  paths, structure = jax.tree.flatten_with_path(tree)
  names = [jax.tree_util.keystr(path, simple=True, separator='.') for path, _ in paths]
  return names, [leaf for _, leaf in paths], structure


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
