"""The parts of a model, which matrices of a part a step compresses, and the check of a recipe."""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax import nnx

from model import units
from model.compress import phases, statistics
from model.compress.phases import WHOLE
from model.compress.programs import execute, has_experts, prepare
from model.compress.recipe import Recipe, Step
from model.compress.registry import PLAN, PREPARED
from model.layers import lending
from model.layers.basic import Table, decides
from model.transformer import Transformer, abstract, linears, parameters
from ops import experts
from ops.linear import Matrix, core, on_one_device
from ops.quantized import QuantizedTensor
from ops.sparse import SparseTensor, looks_pruned
from ops.transposed import as_table, as_transposed

# Cloning a module sorts its attributes, so their own order says nothing.
ORDER = ('embedding', 'positions', 'layers', 'final_norm', 'head')
MATRICES = ('embedding', 'head')  # outside the blocks; learned positions stay as they are
INSTEAD = ', so another compresses it, such as round_to_nearest; '


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A piece of the model that is compressed at once: a block, or what lies outside the blocks.

  names: of what lies outside the blocks; the embedding of a tied model is its 'head' too.
  feeds: whether calibration runs through it, to the parts that follow.
  """

  prefix: str
  module: nnx.Module
  is_block: bool
  names: tuple[str, ...] = ()
  feeds: bool = False

  def layer(self, path: str) -> str:
    """The layer that a parameter of this part belongs to, by its path in the model."""
    return f'{self.prefix}.{path}'.removesuffix('.weight').removesuffix('.table')

  def matches(self, step: Step, path: str) -> bool:
    """Whether a pattern of a step means a parameter of this part, by its layer or by its path."""
    own = (self.layer(path), f'{self.prefix}.{path}', *(self.names if path == 'table' else ()))
    return any(map(step.matches, own))

  def asked_for(self, recipe: Recipe) -> bool:
    """Whether a recipe compresses the matrices of this part."""
    return self.is_block or any(getattr(recipe, name, False) for name in self.names)


def parts(model: Transformer) -> list[Part]:
  """The embedding, the blocks, the final norm and the head, in the order in which they run."""
  found = []
  for name in ORDER:
    child = getattr(model, name)
    if isinstance(child, nnx.List):
      blocks = enumerate(child)
      found += [
        Part(prefix=f'{name}.{i}', module=one, is_block=True, feeds=True) for i, one in blocks
      ]
    elif isinstance(child, nnx.Module):
      tied = name == 'embedding' and model.head is None
      names = (name, 'head') if tied else (name,)
      found.append(Part(prefix=name, module=child, is_block=False, names=names))
  return found


def in_order(model: Transformer, recipe: Recipe) -> list[Part]:
  """The parts in the order in which a recipe compresses them, which is that in which they run.

  A tied table that is calibrated comes last, as the head that it is: its inputs are known when all
  blocks are compressed. Where a head is calibrated, the final norm feeds it.
  """
  found = parts(model)
  if not any(calibrated_head(part, recipe) for part in found):
    return found
  found = [dataclasses.replace(p, feeds=p.feeds or p.prefix == 'final_norm') for p in found]
  return sorted(found, key=lambda part: calibrated_head(part, recipe) is not None)


def calibrated_head(part: Part, recipe: Recipe) -> Step | None:
  """The first calibrated step of a recipe on the head, if this part has it; else None."""
  if part.is_block:
    return None
  steps = (step for step in recipe.steps if step.row.statistics)
  return next((step for step in steps if targets(part, step, recipe)), None)


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
    found += ['table'] if isinstance(part.module, Table) else []
    if not part.asked_for(recipe) or obstacle(part, step) is not None:
      found = []
  return [path for path in found if part.matches(step, path)]


def obstacle(part: Part, step: Step) -> str | None:
  """Why a step on matrices cannot compress those of a part; None if it can."""
  if part.is_block:
    return None
  if step.row.scope == 'block' or step.row.plan is not None:
    return 'the step works on blocks alone'
  if step.row.statistics and 'head' not in part.names:
    return 'an embedding that is only looked up has no inputs to calibrate on'
  return None


def tables(part: Part, recipe: Recipe) -> list[str]:
  """The tables of a part that steps compress as matrices, by their paths in it."""
  steps = [step for step in recipe.steps if step.row.scope != 'parameters']
  return sorted({p for step in steps for p in targets(part, step, recipe) if p == 'table'})


def turn(part: Part, recipe: Recipe, fn: Callable[[Matrix], Matrix]) -> None:
  """Replaces the tables that a recipe compresses: by `as_transposed` before, `as_table` after it.

  Techniques take a table (V, D) as the matrix (D, V) of a head, whose outputs are the tokens.
  """
  params = parameters(part.module)
  for path in tables(part, recipe):
    params[path].set_value(fn(params[path].get_value()))


def left_out(model: Transformer, recipe: Recipe, step: Step) -> dict[str, str]:
  """What lies outside the blocks, is asked for and matched, but not compressed: name -> why."""
  if step.row.scope in (*WHOLE, 'parameters'):
    return {}
  named = [(name, part) for part in parts(model) for name in part.names]
  wanted = [(n, part) for n, part in named if getattr(recipe, n, False) and step.matches(n)]
  found = {name: obstacle(part, step) for name, part in wanted}
  return {name: why for name, why in found.items() if why is not None}


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
        _check_alone(recipe, step, after)
      if step.row.scope == 'learn' and not learns:
        raise ValueError(f'recipe {recipe.name}: {step.technique} trains, and has no text for it')
      after = _check_whole(after, recipe, step)
      _check_patterns(after, recipe, step)
    for part in parts(after):
      _check_part(part, phase.recipe, zeros)
  _check_asked(after, recipe)


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
        f'{_outside(model, step, pattern)}'
        f'there are {", ".join(_layers(model, step, recipe)[:8])}, ...'
      )


def _outside(model, step, pattern: str) -> str:
  """Why a pattern that means the embedding or the head matches nothing; '' if it means neither."""
  meant = {name: part for part in parts(model) for name in part.names if name in MATRICES}
  names = sorted(fnmatch.filter(meant, pattern))
  if not names:
    return ''
  why = obstacle(meant[names[0]], step)
  return f'{why}{INSTEAD}' if why else f'the recipe needs "{names[0]}: true" for that; '


def _check_asked(model, recipe):
  """Raises ValueError where a recipe names the embedding and no step compresses it."""
  part = parts(model)[0]
  if recipe.embedding and not tables(part, recipe):
    raise ValueError(
      f'recipe {recipe.name}: no step compresses the embedding; it takes one on single matrices, '
      'without calibration unless the head is tied to it, such as round_to_nearest with '
      'only: [embedding]'
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


def _check_alone(recipe, step, model):
  if lending.shares(model.config.layers):
    raise ValueError(
      f'recipe {recipe.name}: {step.technique} measures on calibration text block by block, and '
      'layers of this model read keys and values of other blocks; use steps without calibration, '
      'such as round_to_nearest'
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
  turn(part, recipe, functools.partial(jax.eval_shape, as_transposed))
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
  turn(part, recipe, functools.partial(jax.eval_shape, as_table))


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
  w = core(w)  # what meets the inputs; a table is not the matrix that it is as a head
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
