"""Folds channel scales into a block: divides outputs and multiplies the weights that read them.

A group is an edge of the block's wiring (model/layers/wiring.py) along which scales pass:

  norm -> its readers
  down -> up         of a latent, without a norm between them
  value -> output    attention mixes tokens, not channels; the query heads of one key/value head
                     share its scales
  head norm -> output   of a recurrent mixer; all heads share the scales, as they share the norm's
  up -> down         if a gate multiplies it, or if the activation is relu, because
                     relu(x / s) = relu(x) / s

Experts that read a norm share its scales, which the router's columns are multiplied by as well.
Between two matrices with experts, each expert has scales of its own.

Dividing the producer's output by s > 0 and multiplying the rows of its consumers by s is exact up
to rounding. AWQ (Lin et al. 2023, https://arxiv.org/abs/2306.00978) and SmoothQuant (Xiao et al.
2022, https://arxiv.org/abs/2211.10438) do this to make the matrices or their inputs easier to
quantize. Norms after a sub-layer and norms of heads come after the consumers, so they have no
effect; a parallel block has a norm before each sub-layer, as other blocks do. Layers that read the
stream without a norm (OLMo 2), and those after an up projection into gelu or silu without a gate,
cannot be scaled (see `unscaled`).

The divided scale of a norm is rounded to its stored type. The rounding is much coarser where an
offset is added to the scale (Gemma). Consumers are therefore multiplied by the factor by which the
stored scale was really divided (`realised`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.wiring import Attended, Edge, HeadNormed, Normed, Passed
from ops import experts
from ops.linear import Matrix, Weight

Parameters = Mapping[str, Matrix]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """A producer of O output channels, and the linear layers that read them.

  norm_offset: the offset that is added to a norm's scale; None if the producer is a linear layer.
  copies: how often each channel is read. The inputs of the consumers are the channels in runs of
    `run`, each run repeated `copies` times (query heads of a key/value head).
  """

  producer: str
  consumers: tuple[str, ...]
  norm_offset: float | None = None
  copies: int = 1
  run: int = 1

  def spread(self, scales_O: jax.Array) -> jax.Array:
    """Returns the scale of each input of the consumers, [I], or [E, I] of [E, O]."""
    if self.copies == 1:
      return scales_O
    return jnp.repeat(scales_O.reshape(-1, self.run), self.copies, axis=0).reshape(-1)

  def tie(self, values_I: jax.Array, fn: Callable) -> jax.Array:
    """Reduces the values of the inputs that read the same channel by fn(array, axis): [O]."""
    if self.copies == 1:
      return values_I
    return fn(values_I.reshape(-1, self.copies, self.run), axis=1).reshape(-1)

  def read(self, measured: Mapping[str, Mapping[str, jax.Array]], name: str, fn: Callable):
    """A statistic of the channels as the consumers read them: [I], or [E, I] of experts.

    `measured` has statistics by layer. All readers of a norm see all tokens; only experts do not,
    and without a router beside them what they see is put together by fn(array, axis).
    """
    values = measured[self.consumers[0]][name]
    if self.norm_offset is not None and values.ndim > 1:
      return fn(values, axis=0)
    return values

  @property
  def parameters(self) -> tuple[str, ...]:
    """The paths of the parameters that folding may change."""
    own = 'weight' if self.norm_offset is None else 'scale'
    weights = (f'{layer}.weight' for layer in self.consumers)
    return (f'{self.producer}.{own}', f'{self.producer}.bias', *weights)


def groups(config: ModelConfig, layer: LayerConfig) -> tuple[Group, ...]:
  """Returns the groups of a block in the order in which they run."""
  edges = [edge for edge in layer.wiring.edges if edge.obstacle is None]
  return tuple(_group(edge, config.norm_offset) for edge in edges)


def _group(edge: Edge, norm_offset: float) -> Group:
  make = functools.partial(Group, producer=edge.producer, consumers=edge.consumers)
  match edge.through:
    case Normed() | Passed(normed=True):
      return make(norm_offset=norm_offset)
    case Attended(head_width=width, copies=copies):
      return make(copies=copies, run=width)
    case HeadNormed(head_width=width, copies=copies):
      return make(norm_offset=0.0, copies=copies, run=width)
    case _:
      return make()


def unscaled(layer: LayerConfig) -> dict[str, str]:
  """Returns the linear layers of a block whose inputs no group scales, with the reasons."""
  edges = [edge for edge in layer.wiring.edges if edge.obstacle is not None]
  return {name: f'not scaled, because {e.obstacle}' for e in edges for name in e.consumers}


def obstacle(parameters: Parameters, group: Group) -> str | None:
  """Returns the reason why this group cannot be folded as it is stored, or None if it can."""
  for path in group.parameters:
    if isinstance(parameters.get(path), Weight):
      return f'not scaled, because {path} is a {type(parameters[path]).__name__}'
  return None


def realised(parameters: Parameters, group: Group, scales_O: jax.Array) -> jax.Array:
  """Returns the nearest scales by which the stored producer can be divided, float32 (..., O)."""
  scales_O = scales_O.astype(jnp.float32)
  if group.norm_offset is None:
    return scales_O
  stored_O = parameters[f'{group.producer}.scale']
  before_O = stored_O.astype(jnp.float32) + group.norm_offset
  divided_O = (before_O / scales_O - group.norm_offset).astype(stored_O.dtype)
  after_O = divided_O.astype(jnp.float32) + group.norm_offset
  # A channel that is zero, or would be rounded to zero, is not scaled.
  lost_O = (before_O == 0) | (after_O == 0)
  return jnp.where(lost_O, 1, before_O / jnp.where(lost_O, 1, after_O))


def fold(parameters: Parameters, group: Group, scales_O: jax.Array) -> dict[str, jax.Array]:
  """Divides a producer by positive scales and multiplies its consumers; returns changes by path.

  The block's output is unchanged up to rounding to the stored types.
  """
  scales_O = realised(parameters, group, scales_O)
  changed = _divided(parameters, group, scales_O)
  rows_I1 = group.spread(scales_O)[..., None]
  for layer in group.consumers:
    w_IO = parameters[f'{layer}.weight']
    rows = jnp.broadcast_to(rows_I1, w_IO.shape)
    changed[f'{layer}.weight'] = (w_IO.astype(jnp.float32) * rows).astype(w_IO.dtype)
  return changed


def _divided(parameters, group, scales_O):
  changed = {}
  for path in group.parameters[:2]:
    before = parameters.get(path)
    if before is not None:
      offset = group.norm_offset or 0.0 if path.endswith('.scale') else 0.0
      scales = scales_O[..., None, :] if path.endswith('.weight') else scales_O
      after = (before.astype(jnp.float32) + offset) / scales - offset
      changed[path] = after.astype(before.dtype)
  return changed


@dataclasses.dataclass(frozen=True)
class Trial:
  """A candidate for `Site.errors`: folds scales into a group, then quantizes its targets.

  store: a hashable function (w_IO, measured_I) -> Matrix that quantizes a target, given the
    statistic of its inputs after scaling; of experts, each by itself.
  """

  group: Group
  targets: tuple[str, ...]
  store: Callable[[jax.Array, jax.Array], Matrix]

  def __call__(self, parameters: Parameters, arrays: Any, k: jax.Array) -> dict[str, Matrix]:
    scales_AO, measured_I = arrays
    scales_O = realised(parameters, self.group, scales_AO[k])
    changed = fold(parameters, self.group, scales_O)
    scaled_I = measured_I / self.group.spread(scales_O)
    for layer in self.targets:
      path = f'{layer}.weight'
      changed[path] = stored(self.store, changed[path], scaled_I)
    return changed


def stored(store: Callable, w: jax.Array, measured_I: jax.Array) -> Matrix:
  """store(w_IO, measured_I) of a matrix or of each expert, which may share what was measured."""
  if experts.count(w) is None:
    return store(w, measured_I)
  measured_EI = jnp.broadcast_to(measured_I, (w.shape[0], w.shape[1]))
  return experts.each(lambda own: store(*own), (w, measured_EI))


@dataclasses.dataclass(frozen=True)
class Trials:
  """The candidates of several groups, `count` per group in order, compiled as one program.

  The arrays are a sequence with the arrays of each trial. `store` must return plain arrays of the
  weights' own dtypes.
  """

  trials: tuple[Trial, ...]
  count: int

  def __call__(self, parameters: Parameters, arrays: Any, k: jax.Array) -> dict[str, Matrix]:
    paths = [path for trial in self.trials for path in trial.group.parameters]
    own = {path: parameters[path] for path in paths if parameters.get(path) is not None}
    branches = [
      lambda i, trial=trial, given=given: {**own, **trial(own, given, i)}
      for trial, given in zip(self.trials, arrays, strict=True)
    ]
    return jax.lax.switch(k // self.count, branches, k % self.count)


@functools.partial(jax.jit, static_argnums=1)
def apply(
  parameters: Parameters, group: Group, scales_O: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Returns the changes by path, and the realised scale of each input of the consumers, [I]."""
  scales_O = realised(parameters, group, scales_O)
  return fold(parameters, group, scales_O), group.spread(scales_O)
