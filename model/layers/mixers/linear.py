"""Attention without a softmax, as a recurrence: the mixer of kind 'linear'.

  linear attention  features elu(x) + 1, divided by the sum of the weights (Katharopoulos et al.,
                    2020, https://arxiv.org/abs/2006.16236)
  RetNet            a constant decay of each head, rotated queries and keys, a norm of each head and
                    a swish gate (Sun et al., 2023, https://arxiv.org/abs/2307.08621)
  GLA               a decay of each key channel that depends on the token, norm and gate as in
                    RetNet (Yang et al., 2023, https://arxiv.org/abs/2312.06635)

`linear_attention`, `retnet` and `gla` are the configs of these papers; other combinations of the
traits are models too. `ops.recurrent` computes them. Differences from the papers: the norm of a
head is an RMS norm with a scale that all heads share, and RetNet rotates by the model's rope.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from model.layers.basic import Linear, StreamConfig, apply
from model.layers.checks import check_choice, check_count, check_positive
from model.layers.mixers.state import Decays, HeadNorm, StateCache, Tokens
from model.layers.sublayer import MixerConfig, Units
from model.layers.wiring import Attended, Edge, HeadNormed, Normed, Passed
from ops import recurrent, rope
from ops.masks import AttentionMask

Decay = Literal['none', 'constant', 'channel']
TINY = 1e-6  # is added to the sum of the weights, all of which are positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig(MixerConfig):
  """The heads of a layer, and the traits in which kinds of linear attention differ.

  decay: of what the state holds. 'none'; 'constant', 1 - 2^(-5 - n) of head n, which is a buffer;
    'channel', sigmoid(x W W')^(1 / decay_temperature) of each key channel, with W' of `decay_rank`
    rows.
  """

  heads: int
  key_width: int
  value_width: int
  normalized: bool = False  # features elu(x) + 1, and y is divided by the sum of the weights
  decay: Decay = 'none'
  decay_rank: int = 16
  decay_temperature: float = 16.0
  gated: bool = False  # a norm of each head, and a swish gate after it
  rotates: bool = False  # queries and keys, where the model has a rope
  bias: bool = False  # of all that read the stream

  pattern = None  # all tokens are in the state
  rope = None  # the model's

  def __post_init__(self):
    for name in ('heads', 'key_width', 'value_width', 'decay_rank'):
      check_count(name, getattr(self, name))
    check_choice('decay', self.decay, get_args(Decay))
    check_positive('decay_temperature', self.decay_temperature)
    if self.normalized and self.rotates:
      raise ValueError(
        'normalized features are positive, and rotation makes them negative; set one of normalized '
        'and rotates'
      )

  def build(self, stream, *, rngs, dtype):
    return LinearAttention(self, stream, rngs=rngs, dtype=dtype)

  def edges(self, name):
    at = lambda *names: tuple(f'{name}.{one}' for one in names)
    readers = ('query', 'key', 'value', *(['gate'] if self.gated else []))
    slow = self.decay == 'channel'
    scores, (value, output) = at('query', 'key'), at('value', 'output')
    down, up = at('decay_in', 'decay_out')
    if self.gated:
      heads = HeadNormed(head_width=self.value_width, copies=self.heads, scores=scores)
      last = Edge(producer=f'{name}.head_norm', through=heads, consumers=(output,))
    else:
      heads = Attended(head_width=self.value_width, copies=1, scores=scores)
      last = Edge(producer=value, through=heads, consumers=(output,))
    return (
      Edge(
        producer=f'{name}_norm',
        through=Normed(),
        consumers=(*at(*readers), *((down,) if slow else ())),
      ),
      *((Edge(producer=down, through=Passed(normed=False), consumers=(up,)),) if slow else ()),
      last,
    )

  def writers(self, name):
    return (f'{name}.output',)

  @property
  def units(self):
    """Heads."""
    return Units(letter='K', count=self.heads, axes=('K', 'N', 'Y'))

  def resized(self, count):
    return dataclasses.replace(self, heads=count)

  def biased(self):
    return dataclasses.replace(self, bias=True)

  @property
  def rotated(self):
    return self.key_width if self.rotates else None

  def cache(self, batch, capacity, dtype, format):
    """A state of constant size, whatever the capacity and the format."""
    del capacity, dtype, format
    # The sum of the weights is one more value.
    values = self.value_width + self.normalized
    return StateCache(jnp.zeros((batch, self.heads, self.key_width, values), jnp.float32))

  @property
  def cached(self):
    return 0

  def seen(self, context):
    return 1

  def decode_flops(self, context):
    return 4 * self.heads * self.key_width * (self.value_width + self.normalized)

  def prefill_flops(self, length):
    return self.decode_flops(length)


def linear_attention(heads: int, key_width: int, value_width: int) -> LinearConfig:
  """The config of Katharopoulos et al."""
  return LinearConfig(heads=heads, key_width=key_width, value_width=value_width, normalized=True)


def retnet(heads: int, key_width: int, value_width: int) -> LinearConfig:
  """The config of RetNet's retention."""
  return LinearConfig(
    heads=heads,
    key_width=key_width,
    value_width=value_width,
    decay='constant',
    gated=True,
    rotates=True,
  )


def gla(heads: int, key_width: int, value_width: int) -> LinearConfig:
  """The config of gated linear attention."""
  return LinearConfig(
    heads=heads, key_width=key_width, value_width=value_width, decay='channel', gated=True
  )


class LinearAttention(nnx.Module):
  """A state of each head that decays, takes up keys times values, and is read by queries."""

  def __init__(self, config: LinearConfig, stream: StreamConfig, *, rngs, dtype):
    self.config = config
    keys, values = (config.heads * one for one in (config.key_width, config.value_width))
    make = lambda shape, axes, bias=False, **kw: Linear(
      shape, axes=axes, bias=bias, rngs=rngs, dtype=dtype, **kw
    )
    read = lambda outputs, letter: make((stream.width, outputs), ('D', letter), config.bias)
    self.query, self.key = read(keys, 'K'), read(keys, 'K')
    self.value = read(values, 'N')
    self.gate = read(values, 'N') if config.gated else None
    slow = config.decay == 'channel'
    self.decay_in = read(config.decay_rank, 'R') if slow else None
    self.decay_out = make((config.decay_rank, keys), ('R', 'K'), True) if slow else None
    of_heads = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(config.heads))))
    self.decays = Decays(of_heads) if config.decay == 'constant' else None
    self.head_norm = HeadNorm(config.value_width, stream, dtype=dtype) if config.gated else None
    self.output = make((values, stream.width), ('N', 'D'), stddev=stream.write_stddev)

  def __call__(self, x_BTD, angles, mask: AttentionMask, cache: StateCache | None = None):
    """Returns (y_BTD, cache). `angles` is (cos, sin) or None."""
    heads = lambda x: rearrange(x, 'B T (N I) -> B T N I', N=self.config.heads)
    readers = [self.query, self.key, self.value, self.gate, self.decay_in]
    q, k, v, *rest = apply(x_BTD, *(one for one in readers if one is not None))
    q_BTNH, k_BTNH, v_BTNZ = map(heads, (q, k, v))
    if angles is not None:
      q_BTNH, k_BTNH = rope.rotate(q_BTNH, *angles), rope.rotate(k_BTNH, *angles)
    q_BTNH, k_BTNH, v_BTNZ = self._features(q_BTNH, k_BTNH, v_BTNZ)
    tokens = Tokens.of(mask, cache is not None)
    y_BTNZ, state_BNHZ = recurrent.linear(
      q_BTNH,
      tokens.only(k_BTNH),
      v_BTNZ,
      tokens.only(self._log_decay(k_BTNH, rest)),
      None if cache is None else cache.state_BNHZ,
      tokens.starts_BT,
    )
    if self.config.normalized:
      y_BTNZ = y_BTNZ[..., :-1] / (y_BTNZ[..., -1:] + TINY)
    if self.config.gated:
      y_BTNZ = self.head_norm(y_BTNZ, heads(rest[0]))
    y_BTD = self.output(rearrange(y_BTNZ, 'B T N Z -> B T (N Z)').astype(x_BTD.dtype))
    return y_BTD, None if cache is None else StateCache(state_BNHZ)

  def _features(self, q_BTNH, k_BTNH, v_BTNZ):
    """The inputs of the recurrence in float32; an added value of 1 sums up the weights."""
    q_BTNH, k_BTNH, v_BTNZ = (x.astype(jnp.float32) for x in (q_BTNH, k_BTNH, v_BTNZ))
    if not self.config.normalized:
      return q_BTNH * self.config.key_width**-0.5, k_BTNH, v_BTNZ
    ones = jnp.pad(v_BTNZ, ((0, 0),) * 3 + ((0, 1),), constant_values=1)
    return jax.nn.elu(q_BTNH) + 1, jax.nn.elu(k_BTNH) + 1, ones

  def _log_decay(self, k_BTNH, rest) -> jax.Array:
    """The logarithms of the decays [B, T, N, 1] or [B, T, N, H]."""
    if self.decay_out is not None:
      logits_BTK = self.decay_out(rest[-1]).astype(jnp.float32)
      logits_BTNH = rearrange(logits_BTK, 'B T (N H) -> B T N H', N=self.config.heads)
      return jax.nn.log_sigmoid(logits_BTNH) / self.config.decay_temperature
    shape = (*k_BTNH.shape[:3], 1)
    if self.decays is None:
      return jnp.zeros(shape, jnp.float32)
    return jnp.broadcast_to(self.decays.log_decay.get_value()[None, None, :, None], shape)
