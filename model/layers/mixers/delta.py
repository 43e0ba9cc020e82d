"""Gated DeltaNet, a state that is corrected token by token: the mixer of kind 'gated_delta'.

After Yang, Kautz and Hatamizadeh (2024), https://arxiv.org/abs/2412.06464, as Qwen3-Next has it. A
short causal convolution and a silu follow the projections to queries, keys and values; queries and
keys have length 1 in each head. The state S of a value head decays, and the value that it holds for
the key moves towards the new value by the strength b:

  S_t = a_t (I - b_t k_t k_t^T) S_t-1 + b_t k_t v_t^T       y_t = S_t^T q_t / sqrt(H)
  a_t = exp(-exp(log_rate) softplus(x_t W))                 b_t = sigmoid(x_t W')

An RMS norm of each head and a swish gate come before the output projection. Several value heads may
share the queries and keys of one key head. `ops.recurrent` computes it in chunks.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from model.layers import cache as caches
from model.layers.basic import Linear, StreamConfig, apply
from model.layers.checks import check_count
from model.layers.mixers.state import HeadNorm, StateCache, Tokens
from model.layers.sublayer import MixerConfig, Units
from model.layers.wiring import Edge, HeadNormed, Normed
from ops import convolution, recurrent, rows
from ops.masks import AttentionMask

EPSILON = 1e-6  # added to the square of a length, as in transformers
RATES = (1.0, 16.0)  # from which -log a / softplus(x W) is drawn at first
STEPS = (1e-3, 1e-1)  # and softplus(x W) of x = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig(MixerConfig):
  """The heads of a layer; the value heads are a multiple of the key heads."""

  key_heads: int
  value_heads: int
  key_width: int
  value_width: int
  conv_width: int = 4  # tokens that a convolution sees
  bias: bool = False  # of all that read the stream; the decay has one in any case

  pattern = None  # all tokens are in the state
  rope = None
  rotated = None

  def __post_init__(self):
    for name in ('key_heads', 'value_heads', 'key_width', 'value_width', 'conv_width'):
      check_count(name, getattr(self, name))
    if self.value_heads % self.key_heads:
      raise ValueError(
        f'{self.value_heads} value heads do not divide into {self.key_heads} key heads; '
        'value_heads must be a multiple of key_heads'
      )

  @property
  def copies(self) -> int:
    """How many value heads share each key head."""
    return self.value_heads // self.key_heads

  @property
  def keys(self) -> int:
    """The key channels of all heads."""
    return self.key_heads * self.key_width

  @property
  def values(self) -> int:
    """The value channels of all heads."""
    return self.value_heads * self.value_width

  def build(self, stream, *, rngs, dtype):
    return GatedDelta(self, stream, rngs=rngs, dtype=dtype)

  def edges(self, name):
    readers = ('query', 'key', 'value', 'gate', 'decay', 'strength')
    heads = HeadNormed(
      head_width=self.value_width, copies=self.value_heads, scores=(f'{name}.query', f'{name}.key')
    )
    return (
      Edge(
        producer=f'{name}_norm',
        through=Normed(),
        consumers=tuple(f'{name}.{one}' for one in readers),
      ),
      Edge(producer=f'{name}.head_norm', through=heads, consumers=(f'{name}.output',)),
    )

  def writers(self, name):
    return (f'{name}.output',)

  @property
  def units(self):
    """Key heads, each with the value heads that share it."""
    return Units(letter='K', count=self.key_heads, axes=('K', 'N', 'Y'))

  def resized(self, count):
    return dataclasses.replace(self, key_heads=count, value_heads=count * self.copies)

  def biased(self):
    return dataclasses.replace(self, bias=True)

  def cache(self, batch, capacity, dtype, format):
    """States and last inputs of constant size, whatever the capacity and the format."""
    del capacity, format
    before = lambda outputs: jnp.zeros((batch, self.conv_width - 1, outputs), dtype)
    return DeltaCache(
      state_BNHZ=jnp.zeros(
        (batch, self.value_heads, self.key_width, self.value_width), jnp.float32
      ),
      queries_B_K=before(self.keys),
      keys_B_K=before(self.keys),
      values_B_N=before(self.values),
    )

  @property
  def cached(self):
    return 0

  def seen(self, context):
    return 1

  def decode_flops(self, context):
    convolved = 2 * self.conv_width * (2 * self.keys + self.values)
    return convolved + 6 * self.value_heads * self.key_width * self.value_width  # three products

  def prefill_flops(self, length):
    return self.decode_flops(length)


@caches.register
@dataclasses.dataclass(frozen=True)
class DeltaCache(StateCache):
  """The state of each head, and the last inputs of the convolutions.

  They are in the dtype of the model. The contract is that of `StateCache`.
  """

  queries_B_K: jax.Array = caches.array('B_K')
  keys_B_K: jax.Array = caches.array('B_K')
  values_B_N: jax.Array = caches.array('B_N')


class Convolution(nnx.Module):
  """A causal convolution of each channel by itself, and a silu."""

  def __init__(self, width: int, outputs: int, letter: str, *, rngs, dtype):
    self.axes = ('_', letter)
    spread = width**-0.5
    shape = (width, outputs)
    self.kernel = nnx.Param(
      jax.random.uniform(rngs.params(), shape, dtype, minval=-spread, maxval=spread)
    )

  def __call__(self, x_BTO, tokens: Tokens, before_B_O=None):
    """Returns y_BTO, and the last inputs that the next call takes as `before_B_O`."""
    kernel__O = self.kernel.get_value()
    y_BTO = jax.nn.silu(convolution.causal(x_BTO, kernel__O, before_B_O, tokens.starts_BT))
    if before_B_O is None:
      return y_BTO, None
    # A document that begins in this call does not see what was before, here as there.
    new_B = jnp.any(tokens.starts_BT, axis=1)
    before_B_O = jnp.where(new_B[:, None, None], 0, before_B_O)
    all_B_O = jnp.concatenate([before_B_O, x_BTO.astype(before_B_O.dtype)], 1)
    count_B = jnp.sum(tokens.real_BT, axis=1, dtype=jnp.int32)
    return y_BTO, rows.read(all_B_O, count_B, before_B_O.shape[1])


class Rates(nnx.Module):
  """The rate at which the state of each head decays, as its logarithm."""

  axes = ('Y',)

  def __init__(self, heads: int, *, rngs):
    low, high = RATES
    rate_N = jax.random.uniform(rngs.params(), (heads,), jnp.float32, minval=low, maxval=high)
    self.log_rate = nnx.Param(jnp.log(rate_N))


class GatedDelta(nnx.Module):
  """Projections, convolutions, the gated delta rule, a norm of each head and a gate."""

  def __init__(self, config: GatedDeltaConfig, stream: StreamConfig, *, rngs, dtype):
    self.config = config
    make = {'rngs': rngs, 'dtype': dtype}
    read = lambda outputs, letter: Linear(
      (stream.width, outputs), axes=('D', letter), bias=config.bias, **make
    )
    self.query, self.key = read(config.keys, 'K'), read(config.keys, 'K')
    self.value, self.gate = read(config.values, 'N'), read(config.values, 'N')
    # Decays and strengths are float32, and so are the few weights that they come from.
    scalar = {'axes': ('D', 'Y'), 'rngs': rngs, 'dtype': jnp.float32}
    shape = (stream.width, config.value_heads)
    self.decay = Linear(shape, bias=True, **scalar)
    self.decay.bias.set_value(_first_steps(config.value_heads, rngs))
    self.strength = Linear(shape, bias=config.bias, **scalar)
    self.rates = Rates(config.value_heads, rngs=rngs)
    convolve = lambda outputs, letter: Convolution(config.conv_width, outputs, letter, **make)
    self.query_conv, self.key_conv = convolve(config.keys, 'K'), convolve(config.keys, 'K')
    self.value_conv = convolve(config.values, 'N')
    self.head_norm = HeadNorm(config.value_width, stream, dtype=dtype)
    self.output = Linear(
      (config.values, stream.width),
      axes=('N', 'D'),
      bias=False,
      stddev=stream.write_stddev,
      **make,
    )

  def __call__(self, x_BTD, angles, mask: AttentionMask, cache: DeltaCache | None = None):
    """Returns (y_BTD, cache)."""
    del angles  # positions are in the convolutions and decays
    tokens = Tokens.of(mask, cache is not None)
    q_BTK, k_BTK, v_BTN, gate_BTN = apply(x_BTD, self.query, self.key, self.value, self.gate)
    log_decay_BTN, strength_BTN = self._gates(x_BTD)
    before = (None,) * 3 if cache is None else (cache.queries_B_K, cache.keys_B_K, cache.values_B_N)
    q_BTK, queries = self.query_conv(q_BTK, tokens, before[0])
    k_BTK, keys = self.key_conv(k_BTK, tokens, before[1])
    v_BTN, values = self.value_conv(v_BTN, tokens, before[2])
    split = lambda x, width: rearrange(x, 'B T (N I) -> B T N I', I=width)
    q_BTNH, k_BTNH = (self._keyed(split(x, self.config.key_width)) for x in (q_BTK, k_BTK))
    y_BTNZ, state_BNHZ = recurrent.delta(
      q_BTNH * self.config.key_width**-0.5,
      k_BTNH,
      split(v_BTN, self.config.value_width),
      tokens.only(log_decay_BTN),
      tokens.only(strength_BTN),
      None if cache is None else cache.state_BNHZ,
      tokens.starts_BT,
    )
    y_BTNZ = self.head_norm(y_BTNZ, split(gate_BTN, self.config.value_width))
    y_BTD = self.output(rearrange(y_BTNZ, 'B T N Z -> B T (N Z)'))
    return y_BTD, None if cache is None else DeltaCache(state_BNHZ, queries, keys, values)

  def _gates(self, x_BTD):
    """The logarithms of the decays, and the strengths, in float32."""
    x_BTD = x_BTD.astype(jnp.float32)
    rate_N = jnp.exp(self.rates.log_rate.get_value().astype(jnp.float32))
    log_decay_BTN = -rate_N[None, None] * jax.nn.softplus(self.decay(x_BTD))
    return log_decay_BTN, jax.nn.sigmoid(self.strength(x_BTD))

  def _keyed(self, x_BTKH):
    """Queries or keys of length 1, for each value head: float32 [B, T, N, H]."""
    x_BTKH = x_BTKH.astype(jnp.float32)
    length = jnp.sum(jnp.square(x_BTKH), axis=-1, keepdims=True) + EPSILON
    return jnp.repeat(x_BTKH * jax.lax.rsqrt(length), self.config.copies, axis=2)


def _first_steps(heads: int, rngs) -> jax.Array:
  """Biases whose softplus is spread evenly, as logarithms, over `STEPS` (as in Mamba 2)."""
  low, high = (jnp.log(one) for one in STEPS)
  steps_N = jnp.exp(jax.random.uniform(rngs.params(), (heads,), jnp.float32, low, high))
  return steps_N + jnp.log(-jnp.expm1(-steps_N))
