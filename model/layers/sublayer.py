"""What the config of a sub-layer says of it: its module, its wiring, its units and its cost.

The config is a frozen dataclass beside its module. Code that must know the inside of a block calls
these methods only, so it needs no change for a new kind of sub-layer.
"""

import abc
import dataclasses
from typing import Self

from flax import nnx

from model.layers.basic import StreamConfig
from model.layers.cache import Cache, CacheFormat
from model.layers.wiring import Edge
from ops.patterns import Pattern
from ops.rope import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Units:
  """The parts of a sub-layer that can be removed one by one, such as channels or heads.

  letter: names the units in `ops.axes`.  count: how many there are.
  axes: the letters of the axes that are cut. Each unit has an equal share of such an axis, in
    consecutive elements.
  """

  letter: str
  count: int
  axes: tuple[str, ...]


class SubLayerConfig(abc.ABC):
  """The config of a mixer or a feed-forward network."""

  @abc.abstractmethod
  def build(self, stream: StreamConfig, *, rngs: nnx.Rngs, dtype) -> nnx.Module:
    """Makes the module, whose matrices are all `basic.Linear`."""

  @abc.abstractmethod
  def edges(self, name: str) -> tuple[Edge, ...]:
    """The wiring in running order; `name` is that of the module in its block.

    The norm before the sub-layer is `{name}_norm`, the linear layers are `{name}.*`. In a block
    without that norm, its edge becomes one of the residual stream (`block.LayerConfig`).
    """

  @abc.abstractmethod
  def writers(self, name: str) -> tuple[str, ...]:
    """The linear layers whose outputs are added up to the output of the sub-layer."""

  @property
  @abc.abstractmethod
  def units(self) -> Units:
    """What can be removed from it."""

  @abc.abstractmethod
  def resized(self, count: int) -> Self:
    """The config with so many units."""

  @abc.abstractmethod
  def biased(self) -> Self:
    """The config in which every linear layer that reads the residual stream has a bias."""


class MixerConfig(SubLayerConfig):
  """The config of a mixer, which is called with (x_BTD, angles, mask, cache) -> (y_BTD, cache).

  The cache is its own (`cache`), or None; `model.layers.lending` says what layers that share keys
  and values get and return in its place.
  """

  rope: RopeConfig | None  # of this layer; None: the model's
  # The last position from which the first tokens of a text are met; None: the query's own.
  first_reach: int | None = None
  # Whether a document that shares a row with others, told apart by segments, is computed as alone.
  packs = True
  # Whether segments tell documents apart at all; else a row can only be read as one text.
  separates = True
  # How many layers before this one the layer is whose keys and values it reads; 0: its own.
  back = 0
  # Whether later layers may read its keys and values.
  lends = False

  @property
  @abc.abstractmethod
  def pattern(self) -> Pattern | None:
    """Which of the keys before it a query sees; None: all of them."""

  @property
  @abc.abstractmethod
  def rotated(self) -> int | None:
    """How many elements of a head a rope rotates; None if it rotates none."""

  @abc.abstractmethod
  def cache(self, batch: int, capacity: int, dtype, format: CacheFormat) -> Cache:
    """An empty cache for `batch` rows of up to `capacity` tokens.

    `dtype` is that of the floating-point numbers that a format stores; 'bf16' ignores it.
    """

  @property
  @abc.abstractmethod
  def cached(self) -> int:
    """How many numbers a cache holds per token."""

  @abc.abstractmethod
  def seen(self, context: int) -> int:
    """How many tokens the last of `context` tokens reads from a cache, itself included."""

  @abc.abstractmethod
  def decode_flops(self, context: int) -> float:
    """FLOPs for the last of `context` tokens, without those of linear layers."""

  @abc.abstractmethod
  def prefill_flops(self, length: int) -> float:
    """The mean of `decode_flops` over the tokens of a prefill."""


class FfnConfig(SubLayerConfig):
  """The config of a feed-forward network, which is called with (x_BTD) -> y_BTD."""

  @property
  @abc.abstractmethod
  def active_share(self) -> float:
    """The part of the experts that multiplies a token; 1 if there are no experts."""
