"""Applies a recipe to a model, block by block, with a ledger of everything that fell short.

Calibration is sequential. The embedding is compressed first, then one block after the other, then
the head, whose inputs are the outputs of the final norm. A tied table that is calibrated is
compressed last, as a head; calibration has seen it as it was, which the ledger says. Within a
block, layers are compressed in stages, in the order in which they run, and the inputs of a
stage are measured after all earlier stages have been compressed by all steps. A recipe can ask for
less (see `recipe`).

A recipe whose steps train after others runs in phases (model/compress/phases.py), each over the
whole model. Pruned weights stay zero while the model trains.

Memory holds one block twice, before and after compression, with its statistics and one set of
hidden states. With a folder for its progress, a run that was killed continues after the last
finished block, or the last checkpoint of a step that trains, and gives the same result, bit for
bit.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import units
from model.compress import calibrate, starvation, statistics, threads, zeros
from model.compress.calibrate import CALIBRATION_BATCH
from model.compress.ledger import Ledger
from model.compress.measurements import Measurements
from model.compress.parts import (
  Part,
  calibrated,
  calibrated_head,
  check,
  compile_ahead,
  in_order,
  left_out,
  parts,
  pruned,
  tables,
  targets,
  turn,
  weights,
)
from model.compress.phases import Phase, phases
from model.compress.programs import Prepared, compiled, execute
from model.compress.progress import Progress
from model.compress.recipe import Recipe, Step
from model.compress.registry import PLAN, Site
from model.compress.results import Results, describe, relative_error
from model.transformer import Transformer, matrices, parameters
from ops.linear import core
from ops.transposed import as_table, as_transposed

__all__ = ['calibrated', 'check', 'compress', 'describe']


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Given:
  """What all phases of a compression are given."""

  calibration_BT: np.ndarray | None
  school: Any
  kept: Progress
  progress: Callable[[list], Iterator]


@dataclasses.dataclass
class _Run:
  """What the steps of one phase share; `recipe` has these steps alone."""

  recipe: Recipe
  ledger: Ledger
  plans: dict[int, dict[str, jax.Array]]  # step -> layer -> its share
  stream: calibrate.Stream | None = None


def compress(
  model: Transformer,
  recipe: Recipe,
  calibration_BT: np.ndarray | None = None,
  *,
  progress: Callable[[list], Iterator] = iter,
  in_place: bool = False,
  resume: str | os.PathLike | None = None,
  school: Any = None,
) -> tuple[Transformer, Ledger]:
  """Returns a compressed copy of a model, and the ledger.

  `calibration_BT` is [rows, length] of token ids; only recipes with calibrated steps need it.
  `progress` wraps the list of parts of each phase, as tqdm does. `in_place` compresses the model
  itself, so that each original block is freed once it is compressed; a step that changes shapes or
  trains builds a new model all the same, and if there are several phases, the model stays as it is,
  because it may be the teacher. `resume` is a folder that keeps each finished block, and the state
  of a step that trains, until the end; what an interrupted run of the same recipe, model and text
  left there is taken over. `school` is what steps that train learn from, with a `fingerprint`.

  Raises:
    ValueError: before any work, if a step does not fit a layer, a pattern matches no layer, or
      calibration tokens are missing or outside the vocabulary; later, if calibration meets NaN or
      infinity.
  """
  check(model, recipe, calibration_BT, learns=school is not None)
  learns = any(step.row.scope == 'learn' for step in recipe.steps)
  kept = Progress.open(
    resume, model, recipe, calibration_BT, school.fingerprint if learns else None
  )
  first, *later = phases(recipe)
  if not first.rebuilding and (later or not in_place):
    model = nnx.clone(model)
  given = _Given(calibration_BT=calibration_BT, school=school, kept=kept, progress=progress)
  with threads.few(max((w.shape[-2] for w in matrices(model).values()), default=0)):
    return _run_all(model, recipe, given)


def _run_all(model: Transformer, recipe: Recipe, given: _Given) -> tuple[Transformer, Ledger]:
  """Runs the phases that an interrupted run has not finished."""
  kept, ledger, masked = given.kept, Ledger(), set()
  if kept.finished >= 0:
    model, ledger = kept.restore_model(model.dtype)
  for phase in phases(recipe):
    if phase.is_last or phase.last > kept.finished:
      kept.begin(phase)
      model = _run_phase(model, phase, _Run(phase.recipe, ledger, {}), masked, given)
      if not phase.is_last:
        kept.save_model(phase.last, model, ledger)
    masked |= pruned(model, phase.recipe)
  kept.close()
  return model, ledger


def _run_phase(model, phase: Phase, run: _Run, masked: set[str], given: _Given) -> Transformer:
  """`masked` has the layers that earlier phases pruned."""
  recipe, calibration_BT, kept = phase.recipe, given.calibration_BT, given.kept
  model = _rebuild(model, phase, run, masked, given)
  run.ledger.layers.clear()  # of the phase before; the last one has the final matrices
  _transform(model, run)
  if any(calibrated(step) for step in recipe.steps):
    _note_repeats(calibration_BT, run)
    run.plans = _plans(model, recipe, calibration_BT)
  for i, part in enumerate(given.progress(in_order(model, recipe))):
    if part.is_block and run.stream is None and calibration_BT is not None:
      # The embedding is compressed by now, unless it is calibrated itself.
      run.stream = _stream(model, recipe, calibration_BT)
    if part.is_block and kept.has(i):
      run.ledger.extend(kept.restore(i, part.module, run.stream))
      continue
    if part.is_block:
      _compile_ahead(part, run)
    ledger = Ledger()
    _compress(part, dataclasses.replace(run, ledger=ledger))
    run.ledger.extend(ledger)
    if part.is_block:
      kept.save(i, part.module, run.stream, ledger)
  _note_outside(model, run)
  return model


def _rebuild(model, phase: Phase, run, masked: set[str], given: _Given) -> Transformer:
  """Runs the steps that build a new model, each on the model that the last one built.

  Steps that an interrupted run finished are not run again.
  """
  for i, step in phase.rebuilding:
    if i > given.kept.finished:
      if step.row.scope == 'shape':
        model = _reshape(model, step, run, given.calibration_BT)
      else:
        model = _learn(model, i, step, run, masked, given)
      given.kept.save_model(i, model, run.ledger)
  return model


def _learn(model, i: int, step: Step, run, masked: set[str], given: _Given) -> Transformer:
  model, held = zeros.hold(model, masked)
  result = step.row.function(model, given.school, step.spec, given.kept.lesson(i))
  run.ledger.add('model', step.technique, result.events)
  zeros.release(result.model, held)
  return result.model


def _reshape(model, step, run, calibration_BT) -> Transformer:
  measurements = Measurements(model, calibration_BT) if calibrated(step) else None
  result = step.row.function(model, measurements, step.spec)
  for layer, events in result.events.items():
    run.ledger.add(layer, step.technique, events)
  return units.build(result.config, result.parameters, model.dtype)


def _transform(model, run):
  """Runs the steps that change the model as a whole."""
  for step in run.recipe.steps:
    if step.row.scope == 'model':
      run.ledger.add('model', step.technique, step.row.function(model, step.spec))


def _plans(model, recipe, calibration_BT) -> dict[int, dict[str, jax.Array]]:
  """Runs the plans of steps that share something out among all layers, such as sparsity."""
  plans = {}
  for i, step in enumerate(recipe.steps):
    if step.row.plan is not None:
      shares = step.row.plan(_survey(model, step, recipe, calibration_BT), step.spec)
      plans[i] = {layer: jnp.float32(share) for layer, share in shares.items()}
  return plans


def _survey(model, step, recipe, calibration_BT):
  stream = _stream(model, recipe, calibration_BT)
  for part in parts(model):
    if not part.is_block:
      continue
    values = weights(part)
    found, _ = _observed(stream, part, part.module, step)
    for path in targets(part, step, recipe):
      yield part.layer(path), values[path], found[path.removesuffix('.weight')]
    stream.advance(part.module)


def _stream(model, recipe, calibration_BT):
  if not any(calibrated(step) for step in recipe.steps):
    return None
  return calibrate.Stream(model, calibrate.batches(calibration_BT, CALIBRATION_BATCH))


def _compress(part: Part, run: _Run) -> None:
  groups, results = _together(run.recipe.steps), Results(part, tables(part, run.recipe))
  turn(part, run.recipe, as_transposed)
  original = nnx.clone(part.module) if run.recipe.sequential == 'none' else None
  for g, steps in enumerate(groups):
    later = _paths(part, itertools.chain(*groups[g + 1 :]), run.recipe)
    if steps[0][1].row.scope == 'block':
      _apply_to_block(part, steps[0][1], run)
      continue
    for stage in _stages(part, [step for _, step in steps], run.recipe):
      for i, step in steps:
        _apply(part, step, stage, run, original or part.module, run.plans.get(i, {}))
      results.settle(path for path in stage if path not in later)
  if run.stream is not None and part.feeds:
    run.stream.advance(original or part.module)
  run.ledger.layers.extend(results.all())
  turn(part, run.recipe, as_table)


def _compile_ahead(part, run):
  """Begins to compile what a block needs, most of which the first block compiles for all."""
  before, after = weights(part), compile_ahead(part, run.recipe)
  for path in after:
    if path.endswith('.weight'):
      relative_error.ahead(before[path], after[path])
  if run.stream is not None and after and run.recipe.sequential != 'none':
    run.stream.compile_ahead(part.module, after)


def _paths(part, steps, recipe) -> set[str]:
  return {path for _, step in steps for path in targets(part, step, recipe)}


def _together(steps: tuple[Step, ...]) -> list[list[tuple[int, Step]]]:
  """Consecutive steps on single matrices, which go through a block together; others alone."""
  groups = itertools.groupby(enumerate(steps), lambda item: item[1].row.scope)
  found = []
  for scope, group in groups:
    members = list(group)
    found += [members] if scope == 'linears' else [[member] for member in members]
  return found


def _stages(part: Part, steps: list[Step], recipe: Recipe) -> list[list[str]]:
  """The parameters of each stage, which are measured at once, in the order of compression."""
  wanted = _paths(part, enumerate(steps), recipe)
  paths = [path for path in weights(part) if path in wanted]
  if recipe.sequential != 'layers' or not any(step.row.statistics for step in steps):
    return [paths] if paths else []
  wired = part.module.layer.wiring.stages if part.is_block else ()
  stages = [[f'{layer}.weight' for layer in stage] for stage in wired]
  staged = [[path for path in stage if path in paths] for stage in stages]
  rest = [path for path in paths if not any(path in stage for stage in stages)]
  return [stage for stage in [*staged, rest] if stage]


def _apply(part, step, stage, run, observed: nnx.Module, plan):
  paths = [path for path in targets(part, step, run.recipe) if path in stage]
  found = {}
  if paths and step.row.statistics:
    layers = [path.removesuffix('.weight') for path in paths]
    found, starved = _observed(run.stream, part, observed, step, layers)
    run.ledger.events += starved
  params, prepared = parameters(part.module), Prepared(step)
  for path in _by_input(paths, found):
    layer = part.layer(path)
    w = params[path].get_value()
    measured = prepared.join(found.pop(path.removesuffix('.weight'), {}), w)
    if step.row.plan:
      measured[PLAN] = plan[layer]
    outcome = execute(step.row, step.spec, w, measured)
    params[path].set_value(outcome.weight)
    run.ledger.add(layer, step.technique, outcome.events)


def _observed(stream, part, module, step, layers=None):
  """The statistics of the inputs of layers, and ledger rows of experts that saw too little."""
  names = (*step.row.statistics, starvation.ROWS)
  found = stream.observe(module, names, part.prefix, layers)
  own = {path.removesuffix('.weight'): w for path, w in weights(part).items()}
  own = {layer: core(own[layer]).shape[-2] for layer in found}
  fed, events = starvation.feed(found, own, step.technique)
  return fed, [dataclasses.replace(e, layer=part.layer(e.layer)) for e in events]


def _of_target(layer: str, part, paths) -> bool:
  """Whether an expert, by its name in the ledger, is one of a matrix that a step compresses."""
  return layer.rpartition('.')[0] in {part.layer(path) for path in paths}


def _by_input(paths, found) -> list[str]:
  """The parameters of layers that share their statistics one after the other."""
  first = {}
  key = lambda path: first.setdefault(id(found.get(path.removesuffix('.weight'))), len(first))
  return sorted(paths, key=key)


def _apply_to_block(part, step, run):
  paths, found = targets(part, step, run.recipe), {}
  if not paths:
    return
  if step.row.statistics:
    found, starved = _observed(run.stream, part, part.module, step)
    run.ledger.events += [event for event in starved if _of_target(event.layer, part, paths)]
  site = Site(
    config=run.stream.config,
    layer=part.module.layer,
    parameters=weights(part),
    targets=tuple(path.removesuffix('.weight') for path in paths),
    statistics=found,
    errors=functools.partial(run.stream.errors, part.module),
    descend=functools.partial(run.stream.descend, part.module),
  )
  changes, params = step.row.function(site, step.spec), parameters(part.module)
  for path, value in changes.parameters.items():
    params[path].set_value(value)
  for path, events in changes.events.items():
    run.ledger.add(part.layer(path), step.technique, events)
  for path, measured in found.items():
    run.ledger.add(part.layer(path), step.technique, _starved(measured))


_starved = compiled(statistics.starved)


def _note_repeats(calibration_BT, run):
  """Records how many calibration rows repeat others, once for all phases."""
  if any(row.technique == 'calibration' for row in run.ledger.events):
    return
  rows, distinct = len(calibration_BT), len(np.unique(calibration_BT, axis=0))
  what = f'calibration rows that repeat others; {distinct} of {rows} are distinct'
  run.ledger.add('model', 'calibration', {what: rows - distinct})


def _note_outside(model, run):
  """Records what steps left as it was outside the blocks, and what calibration saw too early."""
  for step in run.recipe.steps:
    for name, why in left_out(model, run.recipe, step).items():
      run.ledger.add(name, step.technique, {f'left as it was, because {why}': 1})
  table = parts(model)[0]
  step = calibrated_head(table, run.recipe)
  if step is not None and run.recipe.sequential != 'none':
    what = 'compressed after the blocks, whose calibration saw it as it was'
    run.ledger.add(table.prefix, step.technique, {what: 1})
