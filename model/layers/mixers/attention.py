"""Multi-head attention with grouped key/value heads: the mixer of kind 'attention'."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from model.layers.basic import Linear, Norm, StreamConfig, apply
from model.layers.checks import check_choice, check_count, check_positive
from model.layers.mixers import slots
from model.layers.mixers.kv import KVCache, Lent, Pass
from model.layers.mixers.paged import PagedCache
from model.layers.mixers.sides import SIDES
from model.layers.mixers.slots import RollingCache, SlotCache
from model.layers.sublayer import MixerConfig, Units
from model.layers.wiring import Attended, Edge, Normed, Shared
from ops import rope
from ops.attention import attention
from ops.masks import AttentionMask
from ops.patterns import Pattern, Window
from ops.rope import RopeConfig

NormSpan = Literal['head', 'all']


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
  """The heads of a layer, and the traits in which model families differ.

  Every width is at least 1; the query heads are a multiple of the key/value heads.
  """

  query_heads: int
  kv_heads: int
  head_width: int
  window: int | None = None  # keys that a query sees, itself included; None: all before it
  sparse: Pattern | None = None  # in place of a window
  rotates: bool = True  # queries and keys, where the model has a rope; some of SmolLM3's do not
  rope: RopeConfig | None = None  # of this layer; None: the model's
  rotary_width: int | None = None  # leading part of a head that rotates; None: the whole head
  query_scale: float | None = None  # None: head_width ** -0.5
  softcap: float | None = None  # of the scores
  qkv_bias: bool = False
  output_bias: bool = False
  qk_norm: bool = False  # RMS norm of queries and keys (Qwen3)
  qk_norm_over: NormSpan = 'head'  # each head by itself, or all heads together (OLMoE)
  first_reach: int | None = None  # the first tokens are met as from this position at most
  sinks: bool = False  # a logit of each query head that has no value (gpt-oss)
  gated: bool = False  # the sigmoid of a gate multiplies what the heads find (Qwen3-Next)
  lends: bool = False  # its keys and values to later layers, of kind 'shared'

  def __post_init__(self):
    for name in ('query_heads', 'kv_heads', 'head_width'):
      check_count(name, getattr(self, name))
    if self.query_heads % self.kv_heads:
      raise ValueError(
        f'{self.query_heads} query heads do not divide into {self.kv_heads} key/value heads; '
        'query_heads must be a multiple of kv_heads'
      )
    if self.window is not None and self.window < 1:
      raise ValueError(f'a window holds at least one key, not {self.window}; None: all keys')
    if self.rotary_width is not None and not 0 < self.rotary_width <= self.head_width:
      raise ValueError(
        f'rotary_width must be within 1 and the head width {self.head_width}, not '
        f'{self.rotary_width}; None rotates the whole head'
      )
    if self.window is not None and self.sparse is not None:
      raise ValueError(f'a layer has either a window or a sparse pattern, not both: {self.sparse}')
    if not self.rotates and (self.rope, self.rotary_width) != (None, None):
      raise ValueError('a layer that does not rotate has no rope or rotary_width of its own')
    self._check_reach()
    for name in ('query_scale', 'softcap'):
      check_positive(name, getattr(self, name))
    check_choice('qk_norm_over', self.qk_norm_over, get_args(NormSpan))

  def _check_reach(self):
    if self.first_reach is None:
      return
    window, first = (self.sparse and self.sparse.recent) or (0, 0)
    if not first or not self.rotates:
      raise ValueError(
        f'first_reach={self.first_reach} needs a rope and a window with first tokens, such as '
        f'window512+first4, not {self.pattern}'
      )
    if self.first_reach < window + first - 1:
      raise ValueError(
        f'first_reach must be at least {window + first - 1}, where the first tokens leave the '
        f'window of {self.sparse}, not {self.first_reach}'
      )

  def build(self, stream, *, rngs, dtype):
    return Attention(self, stream, rngs=rngs, dtype=dtype)

  def edges(self, name):
    query, key, value, output = (f'{name}.{one}' for one in ('query', 'key', 'value', 'output'))
    gate = (f'{name}.gate',) if self.gated else ()
    heads = Attended(
      head_width=self.head_width, copies=self.copies, scores=(query, key), gated=self.gated
    )
    last = Edge(producer=value, through=heads, consumers=(output,))
    if self.lends:
      last = Edge(producer=None, through=Shared(scores=(query, key)), consumers=(output,))
    return (
      Edge(producer=f'{name}_norm', through=Normed(), consumers=(query, key, value, *gate)),
      last,
    )

  def writers(self, name):
    return (f'{name}.output',)

  @property
  def copies(self) -> int:
    """How many query heads read each key/value head."""
    return self.query_heads // self.kv_heads

  @property
  def units(self):
    """Key/value heads, each with the query heads that read it.

    Elements within a head are no units: a rope rotates them in pairs at frequencies that depend on
    their place. Where one norm spans all heads, those that stay are normed without the others.
    Where layers share key/value heads, none can be removed from one layer alone, and query heads
    are not removed by themselves.
    """
    if self.lends or self.back:
      return Units(letter='Q', count=self.query_heads, axes=())
    return Units(letter='K', count=self.kv_heads, axes=('K', 'N', 'Q'))

  def resized(self, count):
    return dataclasses.replace(self, kv_heads=count, query_heads=count * self.copies)

  def biased(self):
    return dataclasses.replace(self, qkv_bias=True)

  @property
  def rotated(self):
    return (self.rotary_width or self.head_width) if self.rotates else None

  @property
  def pattern(self):
    return Window(self.window) if self.window is not None else self.sparse

  def cache(self, batch, capacity, dtype, format):
    """For a window, formats that store token by token hold the window alone."""
    shape = (batch, capacity, self.kv_heads, self.head_width)
    if format not in SIDES and self.first_reach is not None:
      raise ValueError(
        f'a cache in {format} does not rotate queries for the first tokens; use int8'
      )
    if format not in SIDES:
      return PagedCache.empty(shape, dtype)
    window, first = (self.pattern and self.pattern.recent) or (capacity, 0)
    held = first + window + slots.SPARE
    rolling = held < capacity
    if rolling:
      shape = (batch, held, *shape[2:])
    sides = [SIDES[format].empty(shape, dtype) for _ in range(2)]
    return RollingCache.of(*sides, first) if rolling else SlotCache(*sides)

  @property
  def cached(self):
    return 2 * self.kv_heads * self.head_width

  def seen(self, context):
    return context if self.pattern is None else self.pattern.seen(context)

  def decode_flops(self, context):
    return self._flops(self.seen(context))

  def prefill_flops(self, length):
    return self._flops((length + 1) / 2 if self.pattern is None else self.pattern.mean(length))

  def _flops(self, keys: float) -> float:
    return 4 * self.query_heads * self.head_width * keys  # two products


class Sinks(nnx.Module):
  """A logit of each query head that counts in the softmax and has no value."""

  def __init__(self, config: AttentionConfig, *, dtype):
    self.logits = nnx.Param(jnp.zeros(config.query_heads, dtype))
    self.axes = ('Q',)


class Heads(nnx.Module):
  """The part of attention that does not depend on whose keys it reads: queries, gates, output.

  `compute` is called as `ops.attention.attention` is, for whole sequences. Training with the tokens
  of a row on several devices sets another function (`model.context_parallel`).
  """

  def __init__(self, config: AttentionConfig, stream: StreamConfig, *, rngs, dtype):
    self.config = config
    width, queries = stream.width, config.query_heads * config.head_width
    make = lambda shape, axes, bias, **kw: Linear(
      shape, axes=axes, bias=bias, rngs=rngs, dtype=dtype, **kw
    )
    norm = lambda letter, span: (
      Norm(span, stream, dtype=dtype, kind='rms', axes=(letter,)) if config.qk_norm else None
    )
    self.query = make((width, queries), ('D', 'N'), config.qkv_bias)
    self.make_keys(make, norm, width)
    self.gate = make((width, queries), ('D', 'N'), config.qkv_bias) if config.gated else None
    self.output = make((queries, width), ('N', 'D'), config.output_bias, stddev=stream.write_stddev)
    whole = config.qk_norm_over == 'all'
    self.query_norm = norm(*(('N', queries) if whole else ('H', config.head_width)))
    self.sinks = Sinks(config, dtype=dtype) if config.sinks else None
    self.compute: Callable[..., jax.Array] = attention

  @property
  def gates(self) -> tuple[Linear, ...]:
    """The gate, if there is one."""
    return () if self.gate is None else (self.gate,)

  @property
  def scores(self) -> dict[str, Any]:
    """How scores are made, for `ops.attention.attention` and for caches."""
    return {
      'scale': self.config.query_scale or self.config.head_width**-0.5,
      'softcap': self.config.softcap,
      'sinks_N': None if self.sinks is None else self.sinks.logits.get_value(),
    }

  def heads(self, x_BTO) -> jax.Array:
    """Divides the outputs of a matrix into heads."""
    return rearrange(x_BTO, 'B T (heads H) -> B T heads H', H=self.config.head_width)

  def queries(self, q_BTN, angles) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Normed and rotated queries: q_BTNH, and those for the first tokens if they differ, or None.

    `angles` is (cos, sin) or None; with a `first_reach`, (cos, sin) for the first tokens follow.
    """
    if self.query_norm is not None:
      q_BTN = _normed(self.query_norm, q_BTN)
    q_BTNH = self.heads(q_BTN)
    if angles is None:
      return q_BTNH, {}
    cos, sin, *first = angles
    own = {'q_first_BTNH': rope.rotate(q_BTNH, *first)} if first else {}
    return rope.rotate(q_BTNH, cos, sin), own

  def written(self, y_BTN, gates) -> jax.Array:
    """Applies the gate and the output projection to the outputs of the heads."""
    for gate_BTN in gates:
      y_BTN = y_BTN * jax.nn.sigmoid(gate_BTN)
    return self.output(y_BTN)


class Attention(Heads):
  """Multi-head attention with an optional key/value cache."""

  def make_keys(self, make, norm, width):
    """Makes the matrices of keys and values, a method because random numbers have this order."""
    config = self.config
    keys = config.kv_heads * config.head_width
    self.key = make((width, keys), ('D', 'K'), config.qkv_bias)
    self.value = make((width, keys), ('D', 'K'), config.qkv_bias)
    whole = config.qk_norm_over == 'all'
    self.key_norm = norm(*(('K', keys) if whole else ('H', config.head_width)))

  def __call__(self, x_BTD, angles, mask: AttentionMask, cache: KVCache | None = None):
    """Returns (y_BTD, cache), with a `Lent` in place of the cache if the layer lends."""
    q_BTN, k_BTK, v_BTK, *gates = self._project(x_BTD)
    q_BTNH, own = self.queries(q_BTN, angles)
    if self.key_norm is not None:
      k_BTK = _normed(self.key_norm, k_BTK)
    k_BTKH, v_BTKH = map(self.heads, (k_BTK, v_BTK))
    if angles is not None:
      k_BTKH = rope.rotate(k_BTKH, *angles[:2])
    cache, y_BTNH = self.attend(x_BTD, q_BTNH, k_BTKH, v_BTKH, mask, cache, **own, **self.scores)
    return self.written(rearrange(y_BTNH, 'B T N H -> B T (N H)'), gates), cache

  def attend(self, x_BTD, q_BTNH, k_BTKH, v_BTKH, mask, cache, **scores):
    """Returns (cache, y_BTNH); what layers that attend in another way replace."""
    del x_BTD
    if cache is None:
      y_BTNH = self.compute(q_BTNH, k_BTKH, v_BTKH, mask, **scores)
      return (Lent(None, Pass(k_BTKH, v_BTKH)) if self.config.lends else None), y_BTNH
    if self.config.lends:
      new, held = cache.taken(k_BTKH, v_BTKH, mask.q_positions_BT)
      return Lent(new, held), held.read(q_BTNH, mask, **scores)
    return cache.attend(q_BTNH, k_BTKH, v_BTKH, mask, **scores)

  def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The queries, keys and values of all heads as the matrices give them: each [B, T, O]."""
    return self._project(x_BTD)[:3]

  def _project(self, x_BTD) -> tuple[jax.Array, ...]:
    return apply(x_BTD, self.query, self.key, self.value, *self.gates)


def _normed(norm: Norm, x_BTO: jax.Array) -> jax.Array:
  """Norms each run of elements that the norm spans: one head or all heads."""
  span = norm.scale.get_value().shape[-1]
  return norm(x_BTO.reshape(*x_BTO.shape[:-1], -1, span)).reshape(x_BTO.shape)
