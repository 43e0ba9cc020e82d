"""Calibration that streams through the model block by block.

The hidden states of all calibration tokens go through the model one block at a time. Each block is
observed, then compressed, then run, so later blocks receive the outputs of compressed blocks. The
final norm and the head follow the blocks in the same way; of the head only the inputs are computed,
never the logits. Memory holds the statistics of one block and one set of hidden states, whatever
the depth.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.compress import statistics
from model.compress.programs import compiled
from model.config import ModelConfig
from model.layers.basic import Table
from model.layers.block import Block
from model.transformer import Context, Transformer, linears, parameters
from ops.kernels.cpu import layout
from ops.linear import Matrix, core, on_one_device, with_core

Batch = tuple[np.ndarray, np.ndarray]  # (tokens_BT, x_BTD)

CALIBRATION_BATCH = 8  # rows of calibration text in one forward pass


def batches(tokens_BT: np.ndarray, batch_size: int) -> list[np.ndarray]:
  """Cuts calibration rows into batches; the last may be smaller."""
  return [tokens_BT[i : i + batch_size] for i in range(0, len(tokens_BT), batch_size)]


@dataclasses.dataclass(frozen=True)
class BlockFunction:
  """A block without its parameters, hashable: (parameters, tokens_BT, x_BTD) -> y_BTD."""

  config: ModelConfig
  graphdef: nnx.GraphDef

  def __call__(self, values: Mapping[str, Matrix], tokens_BT, x_BTD) -> jax.Array:
    return Context.of(self.config, tokens_BT).run(self.merge(values), x_BTD)[0]

  def merge(self, values: Mapping[str, Matrix]) -> Block:
    """The block with these parameters, by their dotted paths."""
    return nnx.merge(self.graphdef, _flat_state(values))


@dataclasses.dataclass(frozen=True)
class EndFunction:
  """The final norm, or the head, as a `BlockFunction`; a table is the head that is tied to it."""

  graphdef: nnx.GraphDef

  def __call__(self, values: Mapping[str, Matrix], tokens_BT, x_BTD) -> jax.Array:
    module = nnx.merge(self.graphdef, _flat_state(values))
    return module.project(x_BTD) if isinstance(module, Table) else module(x_BTD)


def _flat_state(values: Mapping[str, Matrix]):
  flat = [(tuple(path.split('.')), nnx.Param(value)) for path, value in values.items()]
  return nnx.from_flat_state(flat)


def split(
  config: ModelConfig, module: nnx.Module
) -> tuple[BlockFunction | EndFunction, dict[str, Matrix]]:
  """A block, the final norm or the head as a pure function, and its parameters."""
  values = {path: param.get_value() for path, param in parameters(module).items()}
  graphdef = nnx.split(module)[0]
  is_block = isinstance(module, Block)
  return BlockFunction(config, graphdef) if is_block else EndFunction(graphdef), values


# (parameters, arrays, k) -> the parameters that candidate k changes, by path. It is hashable.
Candidate = Callable[[Mapping[str, Matrix], Any, jax.Array], Mapping[str, Matrix]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Descent:
  """How `Stream.descend` lowers the error of a block's output.

  candidate: gives the parameters that the learned arrays stand for; it is called with k = 0.
  update: (learned, slopes, rate) -> learned, hashable; the rate falls linearly from 1 / steps.
  batch: rows of calibration text in a step.  seed: of the order in which rows are drawn.
  """

  candidate: Candidate
  update: Callable[[Any, Any, jax.Array], Any]
  steps: int
  batch: int
  seed: int


class Stream:
  """The hidden states of the calibration tokens at one place of the model, held on the host."""

  def __init__(self, model: Transformer, tokens: Sequence[np.ndarray]):
    self.config = model.config
    graphdef, state = nnx.split(model)
    embed = jax.jit(lambda state, t: nnx.merge(graphdef, state).embed(t))
    self.batches: list[Batch] = [(t, np.asarray(embed(state, t))) for t in tokens]

  def observe(
    self,
    block: nnx.Module,
    names: tuple[str, ...],
    where: str = '',
    layers: Sequence[str] | None = None,
  ) -> dict[str, dict]:
    """Measures the inputs of linear layers of a block: {layer: {statistic: array}}.

    `layers` are paths within the block, None for all. Layers that share their inputs have the same
    dictionary. The head takes the place of a block once the final norm has advanced the stream; its
    layer is its parameter: 'weight', or 'table' if it is tied and stored as a `TransposedTensor`.
    Raises ValueError if a statistic is not finite, with the path of the layer, which begins with
    `where`, the path of the block.
    """
    function, values = split(self.config, block)
    layers = tuple(linears(block) if layers is None else layers)
    ready = _laid_out(block, values)
    source, total = _nothing(function, layers, names, ready, self.batches[0])
    for raw in total.values():
      _finish.ahead(raw)
    for batch in self.batches:
      total = _observe(function, layers, names, ready, total, batch)
    finished, finite = {}, {}
    for layer in total.copy():
      finished[layer], finite[layer] = _finish(total.pop(layer))
    for layer in layers:
      if not finite[source[layer]]:
        path = f'{where}.{layer}'.strip('.')
        raise ValueError(f'the calibration inputs of {path} are not finite; check the weights')
    return {layer: finished[source[layer]] for layer in layers}

  def errors(
    self, block: Block, candidate: Candidate, arrays: Any, count: int, rows: int | None = None
  ) -> np.ndarray:
    """Measures the mean squared change of a block's output for `count` candidates: float32 [count].

    `candidate(parameters, arrays, k)` is traced, with k an int32, and returns the parameters that
    candidate k changes. The mean is over `rows` evenly spread calibration rows, None for all.
    """
    function, values = split(self.config, block)
    total, size = np.zeros(count), 0
    for batch in self._spread(rows):
      expected_BTD = _run(function, values, *batch)
      given = values, arrays, expected_BTD, batch
      total += np.asarray(_errors(function, candidate, count, given))
      size += expected_BTD.size
    return (total / size).astype(np.float32)

  def descend(self, block: Block, descent: Descent, learned: Any, fixed: Any) -> Any:
    """Minimizes the error of a block's output over the arrays `learned`; returns the last iterate.

    The error is the mean squared change of the output by `candidate(parameters, (learned, fixed),
    0)`. The arrays passed as `learned` are donated.
    """
    function, values = split(self.config, block)
    # The block as it was is run once on each row, not in each step that draws the row.
    outputs = [(np.asarray(_run(function, values, *batch)),) for batch in self.batches]
    for i, chosen in enumerate(self._draws(descent)):
      rate = np.float32((1 - i / descent.steps) / descent.steps)
      (expected_BTD,) = _picked(outputs, chosen)
      given = values, fixed, expected_BTD, _picked(self.batches, chosen)
      learned = _descend(function, (descent.candidate, descent.update), learned, rate, given)
    return learned

  def _draws(self, descent: Descent) -> np.ndarray:
    """The rows of each step. Every row is drawn once before any is drawn again."""
    count, rng = self._count, np.random.default_rng(descent.seed)
    batch = min(descent.batch, count)
    rounds = -(-descent.steps * batch // count)
    order = np.concatenate([rng.permutation(count) for _ in range(rounds)])
    return order[: descent.steps * batch].reshape(descent.steps, batch)

  @property
  def _count(self) -> int:
    return sum(len(tokens_BT) for tokens_BT, _ in self.batches)

  def _spread(self, rows: int | None) -> list[Batch]:
    if rows is None or rows >= self._count:
      return self.batches
    chosen = np.arange(rows) * self._count // rows
    return [_picked(self.batches, part) for part in batches(chosen, len(self.batches[0][0]))]

  def compile_ahead(self, block: Block, shapes: Mapping[str, Matrix]) -> None:
    """Begins to compile what `advance` runs, for a block with parameters of these shapes."""
    function, _ = split(self.config, block)
    packed = {path: jax.eval_shape(layout.pack_widened, shapes[path]) for path in _matrices(block)}
    _run.ahead(function, {**shapes, **packed}, *self.batches[0])

  def advance(self, block: nnx.Module) -> None:
    """Runs a block, or the final norm, over the hidden states."""
    for i, batch in enumerate(run(self.config, block, self.batches)):
      self.batches[i] = batch


def _picked(arrays: Sequence[tuple[np.ndarray, ...]], rows: np.ndarray) -> tuple[np.ndarray, ...]:
  """Some rows of arrays that are cut into batches, of which only the last may be smaller."""
  size = len(arrays[0][0])
  fields = range(len(arrays[0]))
  return tuple(np.stack([arrays[i // size][field][i % size] for i in rows]) for field in fields)


def _laid_out(block: nnx.Module, values: Mapping[str, Matrix]) -> dict[str, Matrix]:
  """The parameters of a block, matrices in the form that multiplies many rows fastest."""
  return dict(values) | {
    path: layout.pack_widened(values[path])
    for path in _matrices(block)
    if on_one_device(values[path])
  }


def _matrices(block: nnx.Module) -> list[str]:
  """The parameters that are laid out anew: none where there is no layout of this backend.

  Of the head there are none either, because its product is never computed.
  """
  if jax.default_backend() != 'cpu' or not isinstance(block, Block):
    return []
  return [f'{layer}.weight' for layer in linears(block)]


def run(config: ModelConfig, block: nnx.Module, rows: Iterable[Batch]) -> Iterator[Batch]:
  """Runs a block over batches of hidden states: (tokens_BT, x_BTD) -> (tokens_BT, y_BTD)."""
  apply = program(config, block)
  for tokens_BT, x_BTD in rows:
    yield tokens_BT, np.asarray(apply(tokens_BT, x_BTD))


def program(config: ModelConfig, block: nnx.Module) -> Callable[[Any, Any], jax.Array]:
  """The compiled block (tokens_BT, x_BTD) -> y_BTD, its matrices laid out for many rows."""
  function, values = split(config, block)
  return functools.partial(_run, function, _laid_out(block, values))


def _measure(function, layers, names, values, batch):
  """The raw statistics of a batch, by the first layer of those that share their inputs.

  Beside them, for each of these layers a dictionary with the layers that share its inputs as keys.
  Nothing reads the output of the function, so the compiler drops what only leads there: the logits.
  """
  recorders, watched = {}, dict(values)
  for layer in layers:
    path = layer if layer in values else f'{layer}.weight'
    w = values[path]
    recorders[layer] = statistics.Recorder(core(w), [])
    watched[path] = with_core(w, recorders[layer])
  function(watched, *batch)
  sharing = {}
  for layer, recorder in recorders.items():
    inputs = tuple(id(array) for entry in recorder.seen for array in entry)
    sharing.setdefault(inputs, []).append(layer)
  measured = {
    first: statistics.measure(recorders[first].seen, names) for first, *_ in sharing.values()
  }
  return measured, {members[0]: dict.fromkeys(members) for members in sharing.values()}


_shapes = compiled(_measure, static_argnums=(0, 1, 2))


def _nothing(function, layers, names, values, batch):
  """For each layer the first one with its inputs; and for these, the statistics of no tokens."""
  measured, sharing = _shapes.eval_shape(function, layers, names, values, batch)
  source = {member: first for first, members in sharing.items() for member in members}
  return source, jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), measured)


@functools.partial(compiled, static_argnums=(0, 1, 2), donate_argnums=4)
def _observe(function, layers, names, values, total, batch):
  measured, _ = _measure(function, layers, names, values, batch)
  return {layer: statistics.merge(total[layer], measured[layer]) for layer in measured}


@compiled
def _finish(raw):
  """What techniques read of a layer's inputs, and whether all of it is finite."""
  finished = statistics.finish(raw)
  return finished, jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves(finished)]).all()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _errors(function, candidate, count, given):
  values, arrays, expected_BTD, batch = given

  def error(k):
    actual_BTD = function({**values, **candidate(values, arrays, k)}, *batch)
    return _squares(actual_BTD, expected_BTD).sum()

  return jax.lax.map(error, jnp.arange(count))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _descend(function, rules, learned, rate, given):
  (candidate, update), (values, fixed, expected_BTD, batch) = rules, given

  def error(learned):
    changed = candidate(values, (learned, fixed), jnp.int32(0))
    actual_BTD = function({**values, **changed}, *batch)
    return _squares(actual_BTD, expected_BTD).mean()

  return update(learned, jax.grad(error)(learned), rate)


def _squares(actual_BTD, expected_BTD):
  return jnp.square(actual_BTD.astype(jnp.float32) - expected_BTD.astype(jnp.float32))


@functools.partial(compiled, static_argnums=0)
def _run(function, values, tokens_BT, x_BTD):
  return function(values, tokens_BT, x_BTD)
