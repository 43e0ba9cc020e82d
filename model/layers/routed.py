"""A feed-forward network of experts, of which each token goes through a few: the kind 'routed'.

  y = sum over the chosen experts e of weight_e * expert_e(x), plus the shared experts of x

`ops.moe` has the routing and its literature. All tokens go through the shared experts (Dai et al.,
2024, DeepSeekMoE, https://arxiv.org/abs/2401.06066). They are stored as one dense network, because
n networks of width w equal one of width n w. Qwen2-MoE multiplies them by the sigmoid of a gate.

`Routed.dispatcher` says how rows get to their experts and back. By default no choice is dropped;
training on several devices sets another (`model.expert_parallel`).
"""

import abc
import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx

from model.layers import feed_forward
from model.layers.basic import Buffer, Linear, StreamConfig
from model.layers.checks import check_choice, check_count
from model.layers.feed_forward import Activation, FeedForward, FeedForwardConfig
from model.layers.sublayer import FfnConfig, Units
from model.layers.wiring import Edge, Normed
from ops import moe
from ops.moe import Router, Routing


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
  limit: float | None = None  # gate is at most this, up within it on both sides (gpt-oss)
  up_offset: float = 0.0  # added to up before the product (gpt-oss: 1)
  choice_bias: bool = False  # a buffer is added to the scores for the choice alone (DeepSeek-V3)

  def __post_init__(self):
    check_count('the number of experts', self.experts)
    check_count('the width of an expert', self.width)
    if self.shared_width:
      check_count('the width of shared experts', self.shared_width)
    elif self.shared_gate:
      raise ValueError('shared_gate is set, but shared_width is 0: there is nothing to gate')
    check_choice('activation', self.activation, get_args(Activation))
    feed_forward.check_gate(self)
    self.router.check(self.experts)
    if self.router.chooser == 'expert':
      raise ValueError(
        "chooser 'expert' takes a token by what comes after it, which a decoder must not see; "
        "leave it at 'token'"
      )

  @property
  def shared(self) -> FeedForwardConfig | None:
    """The config of the shared experts."""
    if not self.shared_width:
      return None
    names = ('activation', 'gated', 'bias', 'limit', 'up_offset')
    return FeedForwardConfig(
      width=self.shared_width, **{name: getattr(self, name) for name in names}
    )

  def build(self, stream, *, rngs, dtype):
    return Routed(self, stream, rngs=rngs, dtype=dtype)

  def edges(self, name):
    networks = (name, f'{name}.shared') if self.shared_width else (name,)
    inner = ('gate', 'up') if self.gated else ('up',)
    scores = (f'{name}.router', *([f'{name}.shared_gate'] if self.shared_gate else []))
    readers = tuple(f'{network}.{layer}' for network in networks for layer in inner)
    through = lambda network: feed_forward.through(self, f'{network}.gate')
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
    return Units(letter='F', count=self.width, axes=('F',))

  def resized(self, count):
    return dataclasses.replace(self, width=count)

  def biased(self):
    return dataclasses.replace(self, bias=True, router_bias=True)


class Dispatcher(abc.ABC):
  """Brings the rows of tokens to their experts and back. Subclasses are frozen dataclasses."""

  @abc.abstractmethod
  def __call__(self, ffn: 'Routed', x_TD: jax.Array, routing: Routing) -> jax.Array:
    """Adds up the outputs of each token's experts by their weights: [T, D]."""

  def route(self, logits_TE: jax.Array, router: Router, bias_E: jax.Array | None) -> Routing:
    """Chooses the experts of each token as `moe.route` does."""
    return moe.route(logits_TE, router, bias_E)

  def kept(self, experts_TX: jax.Array, count: int) -> jax.Array:
    """Which choices are not dropped, with `count` experts: bool [T, X]."""
    del count
    return jnp.ones(experts_TX.shape, bool)


@dataclasses.dataclass(frozen=True)
class Dropless(Dispatcher):
  """All rows, sorted by expert, on the devices where they are."""

  def __call__(self, ffn, x_TD, routing):
    return moe.mix(x_TD, routing, ffn.config.experts, ffn.experts)


class Routed(nnx.Module):
  """Experts, their router, and shared experts if there are any."""

  axes = ('E',)  # of its own parameter, the bias of the choice

  def __init__(self, config: RoutedConfig, stream: StreamConfig, *, rngs, dtype):
    self.config, self.dispatcher = config, Dropless()
    make = {'rngs': rngs, 'dtype': dtype}
    # The scores are float32, and so are the few weights that they come from.
    scores = {'bias': config.router_bias, 'rngs': rngs, 'dtype': jnp.float32}
    self.router = Linear((stream.width, config.experts), axes=('D', 'E'), **scores)
    self.choice_bias = (
      Buffer(jnp.zeros(config.experts, jnp.float32)) if config.choice_bias else None
    )
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
    y_TD = self.dispatcher(self, x_TD, self.route(x_TD))
    if self.shared is not None:
      y_TD = y_TD + self._shared(x_TD)
    return y_TD.reshape(x_BTD.shape)

  def scores(self, x_TD: jax.Array) -> jax.Array:
    """The router's logits of all experts, float32 [T, E]."""
    return self.router(x_TD.astype(jnp.float32))

  def route(self, x_TD: jax.Array) -> Routing:
    """The experts of each token and the weights of their outputs."""
    bias_E = None if self.choice_bias is None else self.choice_bias.get_value()
    return self.dispatcher.route(self.scores(x_TD), self.config.router, bias_E)

  def experts(self, x_MD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Runs consecutive groups of rows, each through its own expert: [M, D]."""
    gate_MF = None if self.gate is None else self.gate.grouped(x_MD, sizes_E)
    up_MF = self.up.grouped(x_MD, sizes_E)
    inner_MF = feed_forward.inner(self.config, up_MF, gate_MF)
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
