"""The parts of a model, which matrices of a part a step compresses, and the check of a recipe."""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import numpy as np
from flax import nnx

from model import units
from model.compress import phases, statistics
from model.compress.phases import WHOLE
from model.compress.programs import execute, has_experts, prepare
from model.compress.recipe import Recipe, Step
from model.compress.registry import PLAN, PREPARED
from model.layers.basic import decides
from model.transformer import Transformer, abstract, linears, parameters
from ops import experts
from ops.linear import Matrix, core, on_one_device
from ops.quantized import QuantizedTensor
from ops.sparse import SparseTensor, looks_pruned

# Cloning a module sorts its attributes, so their own order says nothing.
ORDER = ('embedding', 'positions', 'layers', 'final_norm', 'head')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A piece of the model that is compressed at once: a block, or what lies outside the blocks."""

  prefix: str
  module: nnx.Module
  is_block: bool

  def layer(self, path: str) -> str:
    """The layer that a parameter of this part belongs to, by its path in the model."""
    return f'{self.prefix}.{path}'.removesuffix('.weight')


def parts(model: Transformer) -> list[Part]:
  """The embedding, the blocks, the final norm and the head, in the order in which they run."""
  found = []
  for name in ORDER:
    child = getattr(model, name)
    if isinstance(child, nnx.List):
      blocks = enumerate(child)
      found += [Part(prefix=f'{name}.{i}', module=one, is_block=True) for i, one in blocks]
    elif isinstance(child, nnx.Module):
      found.append(Part(prefix=name, module=child, is_block=False))
  return found


def weights(part: Part) -> dict[str, Matrix]:
  """The parameters of a part by their paths in it."""
  return {path: param.get_value() for path, param in parameters(part.module).items()}


def targets(part: Part, step: Step, recipe: Recipe) -> list[str]:
  """The parameters of a part that a step compresses, by their paths in it."""
  scope, names = step.row.scope, units.letters(part.module)
  found = [path for path in parameters(part.module) if not decides(names[path])]
  if scope in WHOLE:
    return []
  if scope != 'parameters':
    layers = linears(part.module).items()
    found = [f'{path}.weight'.strip('.') for path, linear in layers if not linear.decides]
    calibrated = step.row.statistics or scope == 'block'
    if not part.is_block and not (recipe.head and not calibrated):
      found = []
  return [path for path in found if step.matches(part.layer(path))]


def check(
  model: Transformer,
  recipe: Recipe,
  calibration_BT: np.ndarray | None = None,
  *,
  learns: bool = False,
) -> None:
  """Runs a recipe on shapes alone, so that a recipe that does not fit is refused before any work.

  `learns`: whether there is something to learn from, for steps that train.
  Raises ValueError with the recipe, the technique and the layer.
  """
  after, zeros = _shapes(model), _Zeros(model, recipe)
  for phase in phases.phases(recipe):
    for i, step in enumerate(phase.recipe.steps, phase.first):
      phases.check_order(recipe, i)
      if calibrated(step) and calibration_BT is None:
        raise ValueError(f'recipe {recipe.name}: {step.technique} needs calibration text')
      if calibrated(step):
        _check_calibration(model, calibration_BT)
      if step.row.scope == 'learn' and not learns:
        raise ValueError(f'recipe {recipe.name}: {step.technique} trains, and has no text for it')
      after = _check_whole(after, recipe, step)
      _check_patterns(after, recipe, step)
    for part in parts(after):
      _check_part(part, phase.recipe, zeros)


def pruned(model: Transformer, recipe: Recipe) -> set[str]:
  """The layers that steps of a recipe prune."""
  steps = [step for step in recipe.steps if step.row.prunes]
  return {
    part.layer(path)
    for part in parts(model)
    for step in steps
    for path in targets(part, step, recipe)
  }


def calibrated(step: Step) -> bool:
  """Whether a step runs calibration tokens through the model."""
  if step.row.scope == 'shape':
    return step.row.calibrates(step.spec)
  return bool(step.row.statistics) or step.row.scope == 'block'


def _check_whole(model, recipe, step) -> Transformer:
  """Checks a step against the config, and returns the model after a change of shapes, abstract."""
  try:
    if step.row.check is not None:
      step.row.check(model.config, step.spec)
    if step.row.scope == 'learn':
      return step.row.becomes(model, step.spec)
    if step.row.scope != 'shape':
      return model
    for path, param in parameters(model).items():
      units.check_plain(path, param.get_value())
    dtype = model.embedding.table.get_value().dtype
    return abstract(step.row.reshapes(model, step.spec), dtype)
  except ValueError as error:
    raise ValueError(f'recipe {recipe.name}: {step.technique}: {error}') from None


def _shapes(model: Transformer) -> Transformer:
  """A copy of a model with shapes in the place of arrays."""
  graphdef, state = nnx.split(model)
  return nnx.merge(graphdef, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state))


def _check_patterns(model, recipe, step):
  if step.row.scope in WHOLE and step.only != ('*',):
    raise ValueError(
      f'recipe {recipe.name}: {step.technique} changes the whole model and takes no "only"'
    )
  for pattern in step.only if step.row.scope not in WHOLE else ():
    one = dataclasses.replace(step, only=(pattern,))
    if not any(targets(part, one, recipe) for part in parts(model)):
      raise ValueError(
        f'recipe {recipe.name}: no layer matches {pattern!r} of {step.technique}; '
        f'there are {", ".join(_layers(model, step, recipe)[:8])}, ...'
      )


def _layers(model, step, recipe) -> Iterable[str]:
  """Every layer that the step could compress."""
  step = dataclasses.replace(step, only=('*',))
  return [part.layer(path) for part in parts(model) for path in targets(part, step, recipe)]


def _check_calibration(model, calibration_BT):
  shape, vocabulary = np.shape(calibration_BT), model.config.vocab_size
  if len(shape) != 2 or 0 in shape:
    raise ValueError(f'calibration text is rows of token ids [rows, length], not {shape}')
  low, high = int(np.min(calibration_BT)), int(np.max(calibration_BT))
  if low < 0 or high >= vocabulary:
    raise ValueError(
      f'the calibration text has the token {low if low < 0 else high}, outside the vocabulary of '
      f'{vocabulary}; was it made by the tokenizer of another model?'
    )
  if model.positions is not None and shape[1] > model.config.max_positions:
    raise ValueError(
      f'calibration rows of {shape[1]} tokens are longer than the {model.config.max_positions} '
      'learned positions; use shorter ones'
    )


class _Zeros:
  """Knows which matrices hold zeros that have to stay, by their paths in the model."""

  def __init__(self, model: Transformer, recipe: Recipe):
    given = {path: core(param.get_value()) for path, param in parameters(model).items()}
    reshaped = any(step.row.scope == 'shape' for step in recipe.steps)  # before all that round
    self._given = {} if reshaped else given
    self._pruned = {}  # path -> the technique

  def note(self, path: str, technique: str) -> None:
    """Records that a technique prunes a matrix, without storing which weights it kept."""
    self._pruned[path] = technique

  def pruned_by(self, path: str) -> str | None:
    """What set weights of a matrix to zero; None if nothing did."""
    given = self._given.get(path)
    if path not in self._pruned and isinstance(given, jax.Array) and looks_pruned(given):
      return 'an earlier pruning'
    return self._pruned.get(path)


def _check_part(part: Part, recipe: Recipe, zeros: _Zeros):
  """Runs steps on the shapes of a part, which change as the steps would change them."""
  params = parameters(part.module)
  for step in recipe.steps:
    for path in targets(part, step, recipe):
      where = f'{part.prefix}.{path}'.strip('.')
      try:
        after = _becomes(step, params[path].get_value())
        _check_zeros(after, where, zeros)
      except ValueError as error:
        raise ValueError(f'recipe {recipe.name}: {step.technique} on {where}: {error}') from None
      params[path].set_value(after)
      if step.row.prunes and not isinstance(core(after), SparseTensor):
        zeros.note(where, step.technique)


def _check_zeros(after, where: str, zeros: _Zeros):
  """Raises ValueError where a step would make pruned weights something else than zero."""
  is_codes = lambda w: isinstance(w, QuantizedTensor)
  stored = [w for w in jax.tree.leaves(after, is_leaf=is_codes) if is_codes(w)]
  if all(w.holds_zero for w in stored):
    return
  pruned_by = zeros.pruned_by(where)
  if pruned_by is not None:
    raise ValueError(
      f'what {pruned_by} set to zero would not stay zero, for zero points are no integers; '
      'prune n of m instead, whose zeros are not stored, or quantize with integer zero points, '
      'such as by round_to_nearest or gptq'
    )


def _becomes(step, w):
  """The weight after a step, as shapes."""
  leaves, structure = jax.tree.flatten(w)
  return _shapes_after(step.row, step.spec, structure, tuple(leaves))


@functools.lru_cache(maxsize=1024)  # blocks are alike
def _shapes_after(row, spec, structure, leaves):
  w = jax.tree.unflatten(structure, leaves)
  if row.scope == 'block':
    becomes = functools.partial(row.becomes, spec=spec)
    return jax.eval_shape(functools.partial(experts.mapped, becomes), w)
  return execute.eval_shape(row, spec, w, _shapes_of_statistics(row, spec, w)).weight


def _shapes_of_statistics(row, spec, w):
  measured = statistics.abstract(w, row.statistics) if row.statistics else {}
  if row.prepare is not None:
    measured[PREPARED] = prepare.eval_shape(row, spec, has_experts(w), dict(measured))
  if row.plan:
    measured[PLAN] = jax.ShapeDtypeStruct((), np.float32)
  return measured


def compile_ahead(part: Part, recipe: Recipe) -> dict[str, Matrix]:
  """Begins to compile the programs that compress the matrices of a part, as far as that is known.

  Returns the shapes of all parameters after the recipe. Of a part whose arrays lie on several
  devices it returns none and compiles nothing, because shapes do not say how they lie.
  """
  values = weights(part)
  if not all(on_one_device(w) for w in values.values()):
    return {}
  shapes = {path: jax.eval_shape(lambda w: w, w) for path, w in values.items()}
  for step in recipe.steps:
    for path in targets(part, step, recipe):
      row, spec, w = step.row, step.spec, shapes[path]
      if row.scope in ('linears', 'parameters'):
        measured = _shapes_of_statistics(row, spec, w)
        if row.prepare is not None:
          own = {name: measured[name] for name in row.statistics}
          prepare.ahead(row, spec, has_experts(w), own)
        execute.ahead(row, spec, w, measured)
      shapes[path] = _becomes(step, w)
  return shapes
