"""A feed-forward network of experts, of which each token goes through a few: the kind 'routed'.

  y = sum over the chosen experts e of weight_e * expert_e(x), plus the shared experts of x

`ops.moe` has the routing and its literature. Shared experts, which all tokens go through, are one
dense network, as n networks of width w are one of width n w; after Dai et al. (2024), DeepSeekMoE,
https://arxiv.org/abs/2401.06066. Qwen2-MoE multiplies them by the sigmoid of a gate.
"""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx

from model.layers.basic import Linear, StreamConfig
from model.layers.checks import check_choice, check_count
from model.layers.feed_forward import ACTIVATIONS, Activation, FeedForward, FeedForwardConfig
from model.layers.sublayer import FfnConfig, Units
from model.layers.wiring import Activated, Edge, Gated, Normed
from ops import moe
from ops.moe import Router


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedConfig(FfnConfig):
  """E experts of one width, their router, and the width of all shared experts together."""

  experts: int
  width: int  # of each expert
  router: Router
  activation: Activation = 'silu'
  gated: bool = True  # act(gate(x)) * up(x) instead of act(up(x))
  bias: bool = False  # of experts and shared experts
  router_bias: bool = False  # of the router and the gate of shared experts
  shared_width: int = 0  # 0: no shared experts
  shared_gate: bool = False  # shared experts are multiplied by the sigmoid of a gate

  def __post_init__(self):
    check_count('the number of experts', self.experts)
    check_count('the width of an expert', self.width)
    if self.shared_width:
      check_count('the width of shared experts', self.shared_width)
    elif self.shared_gate:
      raise ValueError('shared_gate is set, but shared_width is 0: there is nothing to gate')
    check_choice('activation', self.activation, get_args(Activation))
    self.router.check(self.experts)

  @property
  def shared(self) -> FeedForwardConfig | None:
    """The config of the shared experts."""
    if not self.shared_width:
      return None
    return FeedForwardConfig(
      width=self.shared_width, activation=self.activation, gated=self.gated, bias=self.bias
    )

  def build(self, stream, *, rngs, dtype):
    return Routed(self, stream, rngs=rngs, dtype=dtype)

  def edges(self, name):
    networks = (name, f'{name}.shared') if self.shared_width else (name,)
    inner = ('gate', 'up') if self.gated else ('up',)
    scores = (f'{name}.router', *([f'{name}.shared_gate'] if self.shared_gate else []))
    readers = tuple(f'{network}.{layer}' for network in networks for layer in inner)
    through = lambda network: (
      Gated(gate=f'{network}.gate') if self.gated else Activated(function=self.activation)
    )
    return (
      Edge(producer=f'{name}_norm', through=Normed(), consumers=scores + readers),
      *(
        Edge(producer=f'{one}.up', through=through(one), consumers=(f'{one}.down',))
        for one in networks
      ),
    )

  def writers(self, name):
    return (f'{name}.down', *([f'{name}.shared.down'] if self.shared_width else []))

  @property
  def active_share(self):
    return self.router.choices / self.experts

  @property
  def units(self):
    """Channels, of which all experts lose the same ones; shared experts keep theirs."""
    return Units(letter='F', count=self.width, runs={'F': 1})

  def resized(self, count):
    return dataclasses.replace(self, width=count)

  def biased(self):
    return dataclasses.replace(self, bias=True, router_bias=True)


class Routed(nnx.Module):
  """Experts, their router, and shared experts if there are any."""

  def __init__(self, config: RoutedConfig, stream: StreamConfig, *, rngs, dtype):
    self.config = config
    make = {'rngs': rngs, 'dtype': dtype}
    # The scores are float32, and so are the few weights that they come from.
    scores = {'bias': config.router_bias, 'rngs': rngs, 'dtype': jnp.float32}
    self.router = Linear((stream.width, config.experts), axes=('D', 'E'), **scores)
    wide = (config.experts, stream.width, config.width)
    narrow, own = (wide[0], wide[2], wide[1]), {'bias': config.bias, **make}
    self.gate = Linear(wide, axes=('E', 'D', 'F'), **own) if config.gated else None
    self.up = Linear(wide, axes=('E', 'D', 'F'), **own)
    self.down = Linear(narrow, axes=('E', 'F', 'D'), stddev=stream.write_stddev, **own)
    self.shared_gate = (
      Linear((stream.width, 1), axes=('D', '_'), **scores) if config.shared_gate else None
    )
    shared = config.shared
    self.shared = shared and FeedForward(shared, stream, letter='U', **make)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
    y_TD = moe.mix(x_TD, self.route(x_TD), self.config.experts, self.experts)
    if self.shared is not None:
      y_TD = y_TD + self._shared(x_TD)
    return y_TD.reshape(x_BTD.shape)

  def scores(self, x_TD: jax.Array) -> jax.Array:
    """The router's logits of all experts, float32 [T, E]."""
    return self.router(x_TD.astype(jnp.float32))

  def route(self, x_TD: jax.Array) -> moe.Routing:
    """The experts of each token and the weights of their outputs."""
    return moe.route(self.scores(x_TD), self.config.router)

  def experts(self, x_MD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Runs consecutive groups of rows, each through its own expert: [M, D]."""
    act, up_MF = ACTIVATIONS[self.config.activation], self.up.grouped(x_MD, sizes_E)
    inner_MF = act(up_MF) if self.gate is None else act(self.gate.grouped(x_MD, sizes_E)) * up_MF
    return self.down.grouped(inner_MF, sizes_E)

  def opened(self, x_TD: jax.Array) -> jax.Array:
    """What the shared experts are multiplied by, float32 [T, 1]; 1 without a gate."""
    if self.shared_gate is None:
      return jnp.ones((len(x_TD), 1), jnp.float32)
    return jax.nn.sigmoid(self.shared_gate(x_TD.astype(jnp.float32)))

  def _shared(self, x_TD):
    y_TD = self.shared(x_TD)
    if self.shared_gate is None:
      return y_TD
    return (self.opened(x_TD) * y_TD.astype(jnp.float32)).astype(y_TD.dtype)
