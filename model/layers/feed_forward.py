"""A feed-forward network that all tokens go through: the kind 'dense'."""

import dataclasses
from typing import Literal, get_args

import jax
from flax import nnx

from model.layers.basic import Linear, StreamConfig, apply
from model.layers.checks import check_choice, check_count
from model.layers.sublayer import FfnConfig, Units
from model.layers.wiring import Activated, Edge, Gated, Normed

Activation = Literal['silu', 'gelu', 'gelu_tanh', 'relu']
ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'relu': jax.nn.relu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForwardConfig(FfnConfig):
  """The width of a feed-forward network, at least 1, and what is computed in it."""

  width: int
  activation: Activation = 'silu'
  gated: bool = True  # act(gate(x)) * up(x) instead of act(up(x))
  bias: bool = False

  def __post_init__(self):
    check_count('the width of a feed-forward network', self.width)
    check_choice('activation', self.activation, get_args(Activation))

  def build(self, stream, *, rngs, dtype):
    return FeedForward(self, stream, rngs=rngs, dtype=dtype)

  def edges(self, name):
    gate, up, down = (f'{name}.{one}' for one in ('gate', 'up', 'down'))
    readers = (gate, up) if self.gated else (up,)
    inner = Gated(gate=gate) if self.gated else Activated(function=self.activation)
    return (
      Edge(producer=f'{name}_norm', through=Normed(), consumers=readers),
      Edge(producer=up, through=inner, consumers=(down,)),
    )

  def writers(self, name):
    return (f'{name}.down',)

  @property
  def active_share(self):
    return 1.0

  @property
  def units(self):
    """Channels."""
    return Units(letter='F', count=self.width, runs={'F': 1})

  def resized(self, count):
    return dataclasses.replace(self, width=count)

  def biased(self):
    return dataclasses.replace(self, bias=True)


class FeedForward(nnx.Module):
  """down(act(gate(x)) * up(x)), or down(act(up(x))) in families without a gate.

  `letter` is that of its channels; those of shared experts are not removed with those of experts.
  """

  def __init__(
    self, config: FeedForwardConfig, stream: StreamConfig, *, rngs, dtype, letter: str = 'F'
  ):
    self.activation = config.activation
    make = lambda shape, axes, **kw: Linear(
      shape, axes=axes, bias=config.bias, rngs=rngs, dtype=dtype, **kw
    )
    wide = (stream.width, config.width)
    self.gate = make(wide, ('D', letter)) if config.gated else None
    self.up = make(wide, ('D', letter))
    self.down = make(wide[::-1], (letter, 'D'), stddev=stream.write_stddev)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x[..., D] to y[..., D]."""
    act = ACTIVATIONS[self.activation]
    if self.gate is None:
      return self.down(act(self.up(x)))
    gate, up = apply(x, self.gate, self.up)
    return self.down(act(gate) * up)
