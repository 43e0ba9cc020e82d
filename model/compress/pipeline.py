"""Applies a recipe to a model, block by block, with a ledger of everything that fell short.

The order is that of sequential calibration: the embedding, then block after block, and within a
block step after step, each step observing the block as the steps before it left it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.compress import calibrate, statistics
from model.compress.ledger import LayerResult, Ledger
from model.compress.recipe import Recipe, Step
from model.transformer import Transformer, linears, matrices, parameters
from ops.linear import Matrix, Weight, dense

CALIBRATION_BATCH = 8  # rows of calibration text in one forward pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A piece of the model that is compressed at once: a block, or what lies outside the blocks."""

  prefix: str
  module: nnx.Module
  is_block: bool


def compress(
  model: Transformer,
  recipe: Recipe,
  calibration_NT: np.ndarray | None = None,
  *,
  progress: Callable[[list], Iterator] = iter,
) -> tuple[Transformer, Ledger]:
  """Returns a compressed copy of a model, and the ledger.

  `calibration_NT` is [rows, length] of token ids; only recipes with calibrated steps need it.
  `progress` wraps the list of parts, as tqdm does.

  Raises:
    ValueError: before any work, if a step does not fit a layer, a pattern matches no layer, or
      calibration tokens are missing or not the model's; if calibration meets NaN or infinity.
  """
  check(model, recipe, calibration_NT)
  model, ledger = nnx.clone(model), Ledger()
  originals = matrices(model)
  stream = None
  for part in progress(_parts(model)):
    if part.is_block and stream is None:  # here, for the embedding before is compressed by now
      stream = _stream(model, recipe, calibration_NT)
    for step in recipe.steps:
      _apply(part, step, recipe, stream, ledger)
    if stream is not None and part.is_block:
      stream.advance(part.module)
  for step in recipe.steps:
    left_out = recipe.head and model.head is not None and step.matches('head')
    if left_out and step.row.scope == 'linears' and step.row.statistics:
      ledger.add('head', step.technique, {'left as it was, for calibration ends before it': 1})
  ledger.layers.extend(_results(originals, matrices(model)))
  return model, ledger


def check(model: Transformer, recipe: Recipe, calibration_NT: np.ndarray | None = None) -> None:
  """Runs the recipe on shapes alone, so that what cannot work is refused before any work.

  Raises ValueError naming the recipe, the technique and the layer.
  """
  for step in recipe.steps:
    for pattern in step.only:
      one = dataclasses.replace(step, only=(pattern,))
      if not any(_targets(part, one, recipe) for part in _parts(model)):
        raise ValueError(
          f'recipe {recipe.name}: no layer matches {pattern!r} of {step.technique}; '
          f'there are {", ".join(_layers(model, step, recipe)[:8])}, ...'
        )
    if step.row.statistics and calibration_NT is None:
      raise ValueError(f'recipe {recipe.name}: {step.technique} needs calibration text')
    if step.row.statistics:
      _check_calibration(model, calibration_NT)
  for part in _parts(model):
    _check_part(part, recipe)


def _layers(model, step, recipe) -> list[str]:
  """Every layer that the step could compress."""
  step = dataclasses.replace(step, only=('*',))
  paths = [f'{part.prefix}.{p}' for part in _parts(model) for p in _targets(part, step, recipe)]
  return [path.removesuffix('.weight') for path in paths]


def _check_calibration(model, calibration_NT):
  shape, vocabulary = np.shape(calibration_NT), model.config.vocab_size
  if len(shape) != 2 or 0 in shape:
    raise ValueError(f'calibration text is rows of token ids [rows, length], not {shape}')
  low, high = int(np.min(calibration_NT)), int(np.max(calibration_NT))
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


def _check_part(part, recipe):
  shapes = {path: jax.eval_shape(lambda w: w, w) for path, w in _weights(part).items()}
  for step in recipe.steps:
    for path in _targets(part, step, recipe):
      measured = {}
      if step.row.statistics:
        measured = statistics.abstract(shapes[path].shape[-2], step.row.statistics)
      try:
        outcome = jax.eval_shape(
          functools.partial(step.row, spec=step.spec), shapes[path], measured
        )
      except ValueError as error:
        where = f'{part.prefix}.{path}'.strip('.')
        raise ValueError(f'recipe {recipe.name}: {step.technique} on {where}: {error}') from None
      shapes[path] = outcome.weight


def _stream(model, recipe, calibration_NT):
  if not any(step.row.statistics for step in recipe.steps):
    return None
  return calibrate.Stream(model, calibrate.batches(calibration_NT, CALIBRATION_BATCH))


def _parts(model) -> list[Part]:
  parts = []
  for name, child in vars(model).items():
    if isinstance(child, nnx.List):
      blocks = enumerate(child)
      parts += [Part(prefix=f'{name}.{i}', module=one, is_block=True) for i, one in blocks]
    elif isinstance(child, nnx.Module):
      parts.append(Part(prefix=name, module=child, is_block=False))
  return parts


def _weights(part) -> dict[str, Matrix]:
  return {path: param.get_value() for path, param in parameters(part.module).items()}


def _targets(part: Part, step: Step, recipe: Recipe) -> list[str]:
  """The parameters of a part that a step compresses, by their path in the part."""
  params = parameters(part.module)
  if step.row.scope == 'linears':
    params = [f'{path}.weight'.strip('.') for path in linears(part.module)]
    if not part.is_block and not (recipe.head and not step.row.statistics):
      params = []
  layer = lambda path: f'{part.prefix}.{path}'.removesuffix('.weight')
  return [path for path in params if step.matches(layer(path))]


def _apply(part, step, recipe, stream, ledger):
  targets = _targets(part, step, recipe)
  if not targets:
    return
  observed = {}
  if step.row.statistics:
    observed = stream.observe(part.module, step.row.statistics, part.prefix)
  params = parameters(part.module)
  for path in targets:
    measured = observed.get(path.removesuffix('.weight'), {})
    outcome = _run(step.row, step.spec, params[path].get_value(), measured)
    params[path].set_value(outcome.weight)
    layer = f'{part.prefix}.{path}'.removesuffix('.weight')
    ledger.add(layer, step.technique, {**outcome.events, **_starved(measured)})


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(row, spec, w, measured):
  return row(w, measured, spec)


def _starved(measured) -> dict[str, int]:
  if 'input_norm' not in measured:
    return {}
  return {'inputs that no calibration token used': int((measured['input_norm'] == 0).sum())}


def _results(originals, compressed) -> Iterator[LayerResult]:
  for layer, w in originals.items():
    now = compressed[layer]
    yield LayerResult(
      layer=layer,
      shape=tuple(w.shape),
      stored=describe(now),
      stored_bytes=now.nbytes,
      relative_error=float(_relative_error(w, now)),
    )


@jax.jit
def _relative_error(w, now):
  before, after = dense(w).astype(jnp.float32), dense(now).astype(jnp.float32)
  return jnp.linalg.norm(before - after) / jnp.maximum(jnp.linalg.norm(before), 1e-30)


def describe(w: Matrix) -> str:
  """How a weight is stored, in a few words: 'SparseTensor 2:4 of bfloat16'."""
  if not isinstance(w, Weight):
    return str(w.dtype)
  static = [
    str(value)
    for field in dataclasses.fields(w)
    if 'axes' not in field.metadata and isinstance(value := getattr(w, field.name), str | int)
  ]
  inner = getattr(w, 'values', None)
  nested = f' of {describe(inner)}' if isinstance(inner, Weight) else ''
  return f'{type(w).__name__} {" ".join(static)}{nested}'
