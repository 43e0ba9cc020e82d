"""Calibration that streams through the model block by block.

The hidden states of all calibration tokens stand before one block; the block is observed, then
compressed, then run, so that later blocks see what the compressed earlier ones put out. At any time
one block's statistics and one set of hidden states are held, whatever the depth of the model.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from model.compress import statistics
from model.layers import Block
from model.transformer import Context, Transformer, linears

Batches = list[tuple[np.ndarray, np.ndarray]]  # (tokens_BT, x_BTD)


def batches(tokens_NT: np.ndarray, batch_size: int) -> list[np.ndarray]:
  """Cuts calibration rows into batches; the last may be smaller."""
  return [tokens_NT[i : i + batch_size] for i in range(0, len(tokens_NT), batch_size)]


class Stream:
  """The hidden states of the calibration tokens, on the host, on their way through the blocks."""

  def __init__(self, model: Transformer, tokens: Sequence[np.ndarray]):
    self.config = model.config
    graphdef, state = nnx.split(model)
    embed = jax.jit(lambda state, t: nnx.merge(graphdef, state).embed(t))
    self.batches: Batches = [(t, np.asarray(embed(state, t))) for t in tokens]

  def observe(self, block: Block, names: tuple[str, ...], where: str = '') -> dict[str, dict]:
    """Measures the inputs of every linear layer of a block: {layer: {statistic: array}}.

    Raises ValueError if a statistic is not finite, naming the layer; `where` is the block's path.
    """
    graphdef, state = nnx.split(block)
    total = None
    for tokens_BT, x_BTD in self.batches:
      raw = _observe(self.config, graphdef, names, state, tokens_BT, x_BTD)
      total = raw if total is None else {k: statistics.merge(total[k], raw[k]) for k in raw}
    finished = {layer: statistics.finish(raw) for layer, raw in total.items()}
    for layer, measured in finished.items():
      if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(measured)):
        path = f'{where}.{layer}'.strip('.')
        raise ValueError(f'the calibration inputs of {path} are not finite; check the weights')
    return finished

  def advance(self, block: Block) -> None:
    """Runs a block over the hidden states."""
    graphdef, state = nnx.split(block)
    for i, (tokens_BT, x_BTD) in enumerate(self.batches):
      x_BTD = _run(self.config, graphdef, state, tokens_BT, x_BTD)
      self.batches[i] = (tokens_BT, np.asarray(x_BTD))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _observe(config, graphdef, names, state, tokens_BT, x_BTD):
  block = nnx.merge(graphdef, state)
  recorders = {}
  for path, linear in linears(block).items():
    recorders[path] = statistics.Recorder(linear.weight.get_value(), [])
    linear.weight = nnx.Param(recorders[path])
  Context.of(config, tokens_BT).run(block, x_BTD)
  return {path: statistics.measure(recorder.seen, names) for path, recorder in recorders.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(config, graphdef, state, tokens_BT, x_BTD):
  return Context.of(config, tokens_BT).run(nnx.merge(graphdef, state), x_BTD)[0]
