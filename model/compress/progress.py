"""Saves the finished blocks of a compression, so that a killed run resumes after the last one.

A folder holds the whole model after the last step that built a new one, or after the last phase
that is finished; of the phase at work, the parameters and the ledger of each finished block, and
the hidden states after the last one; and the run of a step that trains. Each file is written under
another name and renamed, the hidden states of a block after its parameters, and what a whole model
supersedes is removed after it is written. Whenever a run is killed, the files up to some block or
step are complete.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import config as configs
from model import native, safetensors_io
from model.compress.calibrate import Stream
from model.compress.ledger import Event, LayerResult, Ledger
from model.compress.phases import Phase
from model.compress.recipe import Recipe
from model.safetensors_io import Tensor
from model.transformer import Transformer, abstract, parameters

PLAN = 'plan.json'
# Of a phase and a block
STATES = 'states_{}_{}.safetensors'
BLOCK = 'block_{}_{}.safetensors'
ABOUT = 'block_{}_{}.json'
# Of a step
LESSON = 'lesson_{}'
MODEL, MODEL_ABOUT = 'model_{}.safetensors', 'model_{}.json'

OF_BLOCKS = [pattern.format('*', '*') for pattern in (STATES, BLOCK, ABOUT)]


class Progress:
  """The finished steps and blocks of one compression; without a folder, nothing is saved.

  finished: the number of the step after which the whole model is saved, -1 before the first.
  """

  def __init__(self, folder: pathlib.Path | None):
    self.folder = folder
    self.finished = _last(folder, MODEL_ABOUT.format('*')) if folder else -1
    self._phase, self._last = 0, -1

  @classmethod
  def open(
    cls,
    folder: str | os.PathLike | None,
    model: Transformer,
    recipe: Recipe,
    calibration_BT: np.ndarray | None,
    lessons: str | None = None,
  ) -> 'Progress':
    """Opens or creates a folder. Raises ValueError if it belongs to another compression."""
    if folder is None:
      return cls(None)
    folder = pathlib.Path(folder)
    plan = {
      'recipe': recipe.to_dict(),
      'config': configs.to_json(model.config),
      'weights': _fingerprint(native.flatten(model)[0].values()),
      'calibration': _fingerprint([] if calibration_BT is None else [calibration_BT]),
      'lessons': lessons,
    }
    text = json.dumps(plan, sort_keys=True)
    digest = json.dumps({'digest': hashlib.sha256(text.encode()).hexdigest()})
    used = folder.is_dir() and any(folder.iterdir())
    if used and (not (folder / PLAN).is_file() or (folder / PLAN).read_text() != digest):
      raise ValueError(
        f'{folder} does not hold the progress of this recipe with this model and this calibration '
        'text; choose another folder, or remove it'
      )
    folder.mkdir(parents=True, exist_ok=True)
    with _whole(folder / PLAN) as path:
      path.write_text(digest)
    return cls(folder)

  def begin(self, phase: Phase) -> None:
    """Turns to the blocks of a phase."""
    self._phase = phase.number
    self._last = _last(self.folder, STATES.format(phase.number, '*')) if self.folder else -1

  def has(self, i: int) -> bool:
    """Whether part i of the phase is finished."""
    return i <= self._last

  def save(self, i: int, block: nnx.Module, stream: Stream | None, ledger: Ledger) -> None:
    """Saves a finished block, and the hidden states after it."""
    if self.folder is None:
      return
    _, layout = native.flatten(block)
    about = {'layout': layout, 'ledger': dataclasses.asdict(ledger)}
    with _whole(self.folder / BLOCK.format(self._phase, i)) as path:
      safetensors_io.write_file(path, native.tensors(block))
    with _whole(self.folder / ABOUT.format(self._phase, i)) as path:
      path.write_text(json.dumps(about))
    states = {} if stream is None else {f'{j}': x for j, (_, x) in enumerate(stream.batches)}
    with _whole(self.folder / STATES.format(self._phase, i)) as path:
      safetensors_io.write_file(path, {name: _tensor(x) for name, x in states.items()})
    _remove(self.folder, [STATES.format('*', '*')], but=STATES.format(self._phase, i))

  def restore(self, i: int, block: nnx.Module, stream: Stream | None) -> Ledger:
    """Loads block i, and its hidden states if it is the last one saved; returns its ledger."""
    stored = safetensors_io.read_file(self.folder / BLOCK.format(self._phase, i))
    about = json.loads((self.folder / ABOUT.format(self._phase, i)).read_text())
    _fill(block, about['layout'], stored)
    if i == self._last and stream is not None:
      states = safetensors_io.read_file(self.folder / STATES.format(self._phase, i))
      stream.batches = [
        (tokens_BT, np.array(states[f'{j}'].read()))
        for j, (tokens_BT, _) in enumerate(stream.batches)
      ]
    return _ledger(about['ledger'])

  def lesson(self, i: int) -> pathlib.Path | None:
    """The folder for the run of step i, which trains; None if nothing is to be kept."""
    return self.folder / LESSON.format(i) if self.folder else None

  def save_model(self, i: int, model: Transformer, ledger: Ledger) -> None:
    """Saves the whole model after step i, with the ledger up to there."""
    if self.folder is None:
      return
    _, layout = native.flatten(model)
    config = configs.to_json(model.config)
    about = {'layout': layout, 'ledger': dataclasses.asdict(ledger), 'config': config}
    with _whole(self.folder / MODEL.format(i)) as path:
      safetensors_io.write_file(path, native.tensors(model))
    with _whole(self.folder / MODEL_ABOUT.format(i)) as path:
      path.write_text(json.dumps(about))
    self.finished = i
    for pattern in (MODEL, MODEL_ABOUT):
      _remove(self.folder, [pattern.format('*')], but=pattern.format(i))
    _remove(self.folder, [*OF_BLOCKS, LESSON.format('*')])

  def restore_model(self, dtype) -> tuple[Transformer, Ledger]:
    """Loads the model that was saved last, with activations of `dtype`, and its ledger."""
    stored = safetensors_io.read_file(self.folder / MODEL.format(self.finished))
    about = json.loads((self.folder / MODEL_ABOUT.format(self.finished)).read_text())
    model = abstract(configs.from_json(about['config']), dtype)
    _fill(model, about['layout'], stored)
    return model, _ledger(about['ledger'])

  def close(self) -> None:
    """Removes the folder when the compression is complete."""
    if self.folder is None:
      return
    of_steps = [pattern.format('*') for pattern in (MODEL, MODEL_ABOUT, LESSON)]
    _remove(self.folder, [*OF_BLOCKS, *of_steps])
    (self.folder / PLAN).unlink()
    self.folder.rmdir()


def _last(folder: pathlib.Path, pattern: str) -> int:
  return max((int(path.stem.rpartition('_')[2]) for path in folder.glob(pattern)), default=-1)


def _remove(folder: pathlib.Path, patterns: Iterable[str], but: str = '') -> None:
  """Removes the files and folders that match some patterns, all but one."""
  for path in [path for pattern in patterns for path in folder.glob(pattern)]:
    if path.name != but:
      shutil.rmtree(path) if path.is_dir() else path.unlink()


def _fill(module: nnx.Module, layout: dict, stored) -> None:
  """Sets the parameters of a module to what was stored."""
  load = lambda name: jnp.array(stored[name].read(), copy=True)
  for path, param in parameters(module).items():
    param.set_value(native.build(layout[path], path, load))


def _ledger(rows: dict) -> Ledger:
  layers = [LayerResult(**{**row, 'shape': tuple(row['shape'])}) for row in rows['layers']]
  return Ledger([Event(**row) for row in rows['events']], layers)


@contextlib.contextmanager
def _whole(path: pathlib.Path):
  """Yields a temporary path to write to, and renames the file when it is complete."""
  partial = path.with_name(f'.{path.name}.partial')
  yield partial
  with partial.open('rb+') as file:
    os.fsync(file.fileno())
  partial.replace(path)


def _fingerprint(arrays) -> list[int]:
  return [zlib.crc32(np.ascontiguousarray(a).view(np.uint8)) for a in map(np.asarray, arrays)]


def _tensor(x: np.ndarray | jax.Array) -> Tensor:
  return Tensor(x.shape, np.dtype(x.dtype), lambda: np.asarray(x))
