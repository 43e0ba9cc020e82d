"""Measures a whole model on calibration text, for techniques that choose among all of its units.

Every measurement is one pass of `calibrate.Stream` over the blocks of the model as it is, except
`slopes`, which differentiates the loss.
"""

from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from model.compress import calibrate, folding, gates, statistics
from model.compress.programs import compiled
from model.compress.registry import Statistics
from model.layers import Block
from model.transformer import Transformer, linears
from ops import structure


class Measurements:
  """What a technique of scope 'shape' can measure; `calibration_BT` is [rows, length] of tokens."""

  def __init__(self, model: Transformer, calibration_BT: np.ndarray):
    self._model, self.tokens_BT = model, calibration_BT

  def inputs(self, letter: str, names: tuple[str, ...]) -> Iterator[dict[str, Statistics]]:
    """Yields for each layer the statistics of the inputs that have this letter, by linear layer.

    One layer is measured at a time, so that only its statistics are held.
    """
    stream = self._stream()
    for l, block in enumerate(self._model.layers):
      yield stream.observe(block, names, f'layers.{l}', reading(block, letter))
      stream.advance(block)

  def normed(self, names: tuple[str, ...]) -> dict[str, Statistics]:
    """Returns the statistics of what each norm of the residual stream puts out, by its path.

    Norms after attention and feed-forward are left out, because they write to the stream.
    """
    stream, found = self._stream(), {}
    for l, block in enumerate(self._model.layers):
      producers = stream_norms(self._model, block)
      first = {producer: consumers[0] for producer, consumers in producers.items()}
      observed = stream.observe(block, names, f'layers.{l}', tuple(first.values()))
      found |= {f'layers.{l}.{norm}': observed[layer] for norm, layer in first.items()}
      stream.advance(block)
    total = statistics.nothing(self._model.config.width, names)
    for _, x_BTD in stream.batches:
      y_BTD = self._model.final_norm(jnp.asarray(x_BTD))
      total = statistics.merge(total, statistics.measure([y_BTD], names))
    return found | {'final_norm': statistics.finish(total)}

  def influence(self) -> np.ndarray:
    """Computes the mean of 1 - cos(input, output) of each block over all tokens: float64 [L].

    This is the block influence of Men et al. (2024), ShortGPT, https://arxiv.org/abs/2403.03853.
    """
    stream, found = self._stream(), []
    for block in self._model.layers:
      before = [x_BTD for _, x_BTD in stream.batches]
      stream.advance(block)
      after = [x_BTD for _, x_BTD in stream.batches]
      total = sum(float(_moved(x, y)) for x, y in zip(before, after, strict=True))
      found.append(total / self.tokens_BT.size)
    return np.array(found)

  def slopes(self) -> gates.Gates:
    """Returns the mean over calibration rows of |d loss / d gate|; see `gates`."""
    return gates.slopes(self._model, self.tokens_BT)

  def _stream(self) -> calibrate.Stream:
    batches = calibrate.batches(self.tokens_BT, calibrate.CALIBRATION_BATCH)
    return calibrate.Stream(self._model, batches)


def reading(block: Block, letter: str) -> tuple[str, ...]:
  """Returns the linear layers of a block whose inputs have a letter, by their paths in it."""
  return tuple(path for path, linear in linears(block).items() if linear.axes[0] == letter)


def stream_norms(model: Transformer, block: Block) -> Mapping[str, tuple[str, ...]]:
  """Returns the norms of the residual stream of a block with the linear layers that read them."""
  return {
    group.producer: group.consumers
    for group in folding.groups(model.config, block.layer)
    if group.norm_offset is not None
  }


@compiled
def _moved(x_BTD, y_BTD):
  return structure.distance(x_BTD, y_BTD).sum()
