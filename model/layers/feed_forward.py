"""A feed-forward network that all tokens go through: the kind 'dense'."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from model.layers.basic import Linear, StreamConfig, apply
from model.layers.checks import check_choice, check_count, check_positive
from model.layers.sublayer import FfnConfig, Units
from model.layers.wiring import Activated, Edge, Gated, Normed

Activation = Literal['silu', 'gelu', 'gelu_tanh', 'relu', 'quick_gelu']
ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'relu': jax.nn.relu,
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForwardConfig(FfnConfig):
  """The width of a feed-forward network, at least 1, and what is computed in it."""

  width: int
  activation: Activation = 'silu'
  gated: bool = True  # act(gate(x)) * up(x) instead of act(up(x))
  bias: bool = False
  limit: float | None = None  # gate is at most this, up within it on both sides (gpt-oss)
  up_offset: float = 0.0  # added to up before the product (gpt-oss: 1)

  def __post_init__(self):
    check_count('the width of a feed-forward network', self.width)
    check_choice('activation', self.activation, get_args(Activation))
    check_gate(self)

  def build(self, stream, *, rngs, dtype):
    return FeedForward(self, stream, rngs=rngs, dtype=dtype)

  def edges(self, name):
    gate, up, down = (f'{name}.{one}' for one in ('gate', 'up', 'down'))
    readers = (gate, up) if self.gated else (up,)
    return (
      Edge(producer=f'{name}_norm', through=Normed(), consumers=readers),
      Edge(producer=up, through=through(self, gate), consumers=(down,)),
    )

  def writers(self, name):
    return (f'{name}.down',)

  @property
  def active_share(self):
    return 1.0

  @property
  def units(self):
    """Channels."""
    return Units(letter='F', count=self.width, axes=('F',))

  def resized(self, count):
    return dataclasses.replace(self, width=count)

  def biased(self):
    return dataclasses.replace(self, bias=True)


def check_gate(config) -> None:
  """Raises ValueError where a network without a gate has a limit or an offset."""
  check_positive('limit', config.limit)
  if not config.gated and not _is_linear(config):
    raise ValueError(f'limit {config.limit} and up_offset {config.up_offset} are those of a gate')


def _is_linear(config) -> bool:
  return config.limit is None and config.up_offset == 0


def through(config, gate: str) -> Gated | Activated:
  """What happens between up and down in a network of this config."""
  if not config.gated:
    return Activated(function=config.activation)
  return Gated(gate=gate, linear=_is_linear(config))


def inner(config, up: jax.Array, gate: jax.Array | None) -> jax.Array:
  """What the down projection reads, from the outputs of up and, if there is one, gate."""
  act = ACTIVATIONS[config.activation]
  if gate is None:
    return act(up)
  if config.limit is not None:
    gate, up = jnp.minimum(gate, config.limit), jnp.clip(up, -config.limit, config.limit)
  return act(gate) * (up + config.up_offset if config.up_offset else up)


class FeedForward(nnx.Module):
  """down(act(gate(x)) * up(x)), or down(act(up(x))) in families without a gate.

  `letter` is the axis letter of its channels. Shared experts have a letter of their own, so that
  their channels are not removed together with those of the experts.
  """

  def __init__(
    self, config: FeedForwardConfig, stream: StreamConfig, *, rngs, dtype, letter: str = 'F'
  ):
    self.config = config
    make = lambda shape, axes, **kw: Linear(
      shape, axes=axes, bias=config.bias, rngs=rngs, dtype=dtype, **kw
    )
    wide = (stream.width, config.width)
    self.gate = make(wide, ('D', letter)) if config.gated else None
    self.up = make(wide, ('D', letter))
    self.down = make(wide[::-1], (letter, 'D'), stddev=stream.write_stddev)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x[..., D] to y[..., D]."""
    if self.gate is None:
      return self.down(inner(self.config, self.up(x), None))
    gate, up = apply(x, self.gate, self.up)
    return self.down(inner(self.config, up, gate))
