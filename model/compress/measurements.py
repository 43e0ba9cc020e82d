"""Measures a whole model on calibration text, for techniques that choose among all of its units.

Every measurement is one pass of `calibrate.Stream` over the blocks of the model as it is, except
`slopes`, which differentiates the loss.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.compress import calibrate, expert_use, gates, statistics
from model.compress.expert_use import ExpertUse
from model.compress.programs import compiled
from model.compress.registry import Statistics
from model.layers.block import Block
from model.transformer import Transformer
from ops import losses, structure


class Measurements:
  """What a technique of scope 'shape' can measure; `calibration_BT` is [rows, length] of tokens."""

  def __init__(self, model: Transformer, calibration_BT: np.ndarray):
    self._model, self.tokens_BT = model, calibration_BT

  def inputs(
    self, chosen: Callable[[Block], Sequence[str]], names: tuple[str, ...]
  ) -> Iterator[dict[str, Statistics]]:
    """Yields for each block the statistics of the inputs of its chosen linear layers, by layer.

    One block is measured at a time, so that only its statistics are held.
    """
    stream = self._stream()
    for l, block in enumerate(self._model.layers):
      yield stream.observe(block, names, f'layers.{l}', chosen(block))
      stream.advance(block)

  def normed(self, names: tuple[str, ...]) -> dict[str, Statistics]:
    """Returns the statistics of what each norm of the residual stream puts out, by its path.

    Norms after attention and feed-forward are left out, because they write to the stream.
    """
    stream, found = self._stream(), {}
    for l, block in enumerate(self._model.layers):
      first = {norm: readers[0] for norm, readers in block.layer.wiring.norms.items()}
      observed = stream.observe(block, names, f'layers.{l}', tuple(first.values()))
      found |= {f'layers.{l}.{norm}': observed[layer] for norm, layer in first.items()}
      stream.advance(block)
    outputs = (self._model.final_norm(jnp.asarray(x_BTD)) for _, x_BTD in stream.batches)
    measured = (statistics.measure([(y_BTD,)], names) for y_BTD in outputs)
    total = functools.reduce(statistics.merge, measured)
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

  def losses(self, other: Transformer, rows: int) -> tuple[float, np.ndarray]:
    """Returns the loss of the model, and its loss with each block alone taken from another [L].

    The loss is in nats per token, on the first `rows` of the calibration text. The other model has
    the same sizes.
    """
    batches = calibrate.batches(self.tokens_BT[:rows], calibrate.CALIBRATION_BATCH)
    stream, found = calibrate.Stream(self._model, batches), []
    for l, block in enumerate(self._model.layers):
      states = stream.batches
      for one in (other.layers[l], *list(self._model.layers)[l + 1 :]):
        states = list(calibrate.run(self._model.config, one, states))
      found.append(self._loss(states))
      stream.advance(block)
    return self._loss(stream.batches), np.array(found)

  def _loss(self, states: Sequence[calibrate.Batch]) -> float:
    """The loss in nats per token from the hidden states after the last block."""
    function, state = nnx.split(self._model)
    total = sum(float(_nll(function, state, *batch)) for batch in states)
    return total / sum(tokens_BT[:, 1:].size for tokens_BT, _ in states)

  def experts(self, outputs: bool = False) -> dict[int, ExpertUse]:
    """Returns what the experts of each routed layer do, by the number of the layer.

    `outputs` also compares the outputs of all experts.
    """
    stream, found = self._stream(), {}
    for l, block in enumerate(self._model.layers):
      found[l] = expert_use.measure(stream, block, outputs)
      stream.advance(block)
    return {l: use for l, use in found.items() if use is not None}

  def _stream(self) -> calibrate.Stream:
    batches = calibrate.batches(self.tokens_BT, calibrate.CALIBRATION_BATCH)
    return calibrate.Stream(self._model, batches)


@functools.partial(compiled, static_argnums=0)
def _nll(graphdef, state, tokens_BT, x_BTD):
  """The sum of the loss over all predicted tokens."""
  model = nnx.merge(graphdef, state)
  x_BTD = model.final_norm(x_BTD[:, :-1])
  return losses.cross_entropy(x_BTD, tokens_BT[:, 1:], model.logits).sum()


@compiled
def _moved(x_BTD, y_BTD):
  return structure.distance(x_BTD, y_BTD).sum()
