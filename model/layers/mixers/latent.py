"""Multi-head latent attention (MLA): keys and values of all heads from one vector per token.

  c = kv_norm(kv_down(x))                                       the latent, [B, T, R]
  key of a head = key_up(c) of the head, then rotary_key(x)     the latter rotated
  value of a head = value_up(c) of the head
  query of a head: as many elements that do not rotate, then those that do; from x, or from a
    latent of its own (query_down, query_norm, query_up)

After DeepSeek-AI (2024), DeepSeek-V2, https://arxiv.org/abs/2405.04434. A cache holds c and the
rotated keys alone (`latent_cache`). Two forms compute the same:

  expanded  makes the keys and values of all heads, and attends as other attention does. Training,
            and prompts that are long enough (`LatentConfig.absorbs`).
  absorbed  q . (key_up c) = (key_up^T q) . c, and the sum of p (value_up c) is value_up of the sum
            of p c. So queries are mapped into the space of the latents, attend to the cache as to
            one head whose keys are its values too, and the results are mapped back. Decoding.

The absorbed form takes 2 R / (head width + value width) times the products per token of the cache,
and reads it once for all heads. It needs `key_up` and `value_up` as arrays: weights of other types
are decoded in every step, R (keys + values) numbers per layer, and types that round their inputs do
not round them here.

Attention has one width for keys and values. In the expanded form the shorter of the two is filled
with zeros (DeepSeek: values, 128 to 192, a fifth more multiplications); in the absorbed form the
rotated keys are averaged like values and dropped (64 of 576, a twentieth more).

Differs from the paper where a model with other heads is converted (`compress.latent_heads`): heads
may share keys and values in groups, each group may have rotated keys of its own, and the rotated
pairs may be a choice of those that the rope had (MHA2MLA, https://arxiv.org/abs/2502.14837).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from model.layers.basic import Linear, Norm, StreamConfig, apply
from model.layers.checks import check_count, check_positive
from model.layers.mixers.latent_cache import LatentCache
from model.layers.sublayer import MixerConfig, Units
from model.layers.wiring import Attended, Edge, Normed, Passed
from ops import linear, rope
from ops.attention import attention
from ops.masks import AttentionMask
from ops.rope import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig(MixerConfig):
  """The heads and latents of a layer.

  Widths and counts are at least 1, except that either `rotary_width`, the elements of a head that
  rotate, or `still_width`, those that do not, may be 0. The query heads are a multiple of the
  key/value heads.
  """

  query_heads: int
  kv_heads: int
  still_width: int
  rotary_width: int
  value_width: int
  rank: int  # width of the latent of keys and values
  query_rank: int | None = None  # width of the latent of queries; None: there is none
  shared_rotary: bool = True  # all heads have the same rotated key; False: each kv head its own
  pairs: tuple[int, ...] | None = None  # the pairs of `full_rotary_width` that rotate; None: all
  full_rotary_width: int | None = None  # that the rope has; None: the rotary width
  rope: RopeConfig | None = None  # of this layer; None: the model's
  query_scale: float | None = None  # None: head_width ** -0.5
  latent_norms: bool = True  # RMS norms of the latents
  norm_eps: float = 1e-6  # of these norms
  qkv_bias: bool = False  # of what reads the stream; what reads a latent has none
  output_bias: bool = False

  pattern = None  # every query sees all keys before it

  def __post_init__(self):
    for name in ('query_heads', 'kv_heads', 'value_width', 'rank'):
      check_count(name, getattr(self, name))
    for name in ('still_width', 'rotary_width'):
      if getattr(self, name):
        check_count(name, getattr(self, name))
    if self.query_rank is not None:
      check_count('query_rank', self.query_rank)
    check_positive('query_scale', self.query_scale)
    if self.query_heads % self.kv_heads:
      raise ValueError(
        f'{self.query_heads} query heads do not divide into {self.kv_heads} key/value heads; '
        'query_heads must be a multiple of kv_heads'
      )
    if not self.head_width:
      raise ValueError('a head needs elements: still_width and rotary_width are both 0')
    self._check_pairs()

  def _check_pairs(self):
    if (self.pairs is None) != (self.full_rotary_width is None):
      raise ValueError(
        f'pairs {self.pairs} and full_rotary_width {self.full_rotary_width} belong together'
      )
    if self.pairs is None:
      return
    known = range(self.full_rotary_width // 2)
    if len(self.pairs) * 2 != self.rotary_width or sorted(set(self.pairs)) != list(self.pairs):
      raise ValueError(f'pairs must be {self.rotary_width // 2} increasing numbers: {self.pairs}')
    if not set(self.pairs) <= set(known):
      raise ValueError(
        f'a rope of {self.full_rotary_width} elements has no such pairs: {self.pairs}'
      )

  def build(self, stream, *, rngs, dtype):
    return Latent(self, stream, rngs=rngs, dtype=dtype)

  @property
  def head_width(self) -> int:
    """The width of a query's and a key's head."""
    return self.still_width + self.rotary_width

  @property
  def copies(self) -> int:
    """How many query heads read each key/value head."""
    return self.query_heads // self.kv_heads

  @property
  def rotary_heads(self) -> int:
    """How many rotated keys a token has."""
    return 1 if self.shared_rotary else self.kv_heads

  def edges(self, name):
    own = lambda *names: tuple(f'{name}.{one}' for one in names)
    (query,) = own('query' if self.query_rank is None else 'query_up')
    ups = own(*(['key_up'] if self.still_width else []), 'value_up')
    keys = own(*(['rotary_key'] if self.rotary_width else []))
    first = own('query' if self.query_rank is None else 'query_down', 'kv_down') + keys
    heads = Attended(
      head_width=self.value_width, copies=self.copies, scores=(query, *ups[:-1], *keys)
    )
    return (
      Edge(producer=f'{name}_norm', through=Normed(), consumers=first),
      *([] if self.query_rank is None else [self._inner(name, 'query', (query,))]),
      self._inner(name, 'kv', ups),
      Edge(producer=f'{name}.value_up', through=heads, consumers=own('output')),
    )

  def _inner(self, name, what, readers) -> Edge:
    producer = f'{name}.{what}_{"norm" if self.latent_norms else "down"}'
    return Edge(producer=producer, through=Passed(normed=self.latent_norms), consumers=readers)

  def writers(self, name):
    return (f'{name}.output',)

  @property
  def units(self):
    """Key/value heads, each with the query heads that read it."""
    return Units(letter='K', count=self.kv_heads, axes=('K', 'N'))

  def resized(self, count):
    return dataclasses.replace(self, kv_heads=count, query_heads=count * self.copies)

  def biased(self):
    return dataclasses.replace(self, qkv_bias=True)

  @property
  def rotated(self):
    return self.full_rotary_width or self.rotary_width or None

  def cache(self, batch, capacity, dtype, format):
    return LatentCache.empty((batch, capacity, self.cached), dtype, format)

  @property
  def cached(self):
    return self.rank + self.rotary_heads * self.rotary_width

  def seen(self, context):
    return context

  def absorbs(self, queries: int) -> bool:
    """Whether this number of new tokens per row is cheaper in the absorbed form.

    That form has wider products with each cached token, while the expanded form first has to make
    the keys and values of each. DeepSeek-V2-Lite absorbs up to 170 tokens.
    """
    wider = 2 * self.query_heads * (self.cached - self._width)
    return queries * wider <= self.rank * self.kv_heads * (self.still_width + self.value_width)

  @property
  def _width(self) -> int:
    """The width of keys and values in the expanded form."""
    return max(self.head_width, self.value_width)

  def decode_flops(self, context):
    """FLOPs of the absorbed form, beyond those that key_up and value_up count as linear layers."""
    again = (self.query_heads - self.kv_heads) * self.rank * (self.still_width + self.value_width)
    return 4 * self.query_heads * self.cached * context + 2 * again

  def prefill_flops(self, length):
    """FLOPs of the expanded form, zeros included."""
    return 4 * self.query_heads * self._width * (length + 1) / 2


class Latent(nnx.Module):
  """Multi-head latent attention with an optional cache of latents."""

  def __init__(self, config: LatentConfig, stream: StreamConfig, *, rngs, dtype):
    self.config = c = config
    make = lambda shape, axes, bias=False, **kw: Linear(
      shape, axes=axes, bias=bias, rngs=rngs, dtype=dtype, **kw
    )
    width, queries = stream.width, c.query_heads * c.head_width
    direct, query_rank = c.query_rank is None, c.query_rank
    self.query = make((width, queries), ('D', 'N'), c.qkv_bias) if direct else None
    self.query_down = None if direct else make((width, query_rank), ('D', 'R'), c.qkv_bias)
    self.query_up = None if direct else make((query_rank, queries), ('R', 'N'))
    self.kv_down = make((width, c.rank), ('D', 'R'), c.qkv_bias)
    rotary, letter = c.rotary_heads * c.rotary_width, 'W' if c.shared_rotary else 'K'
    self.rotary_key = make((width, rotary), ('D', letter), c.qkv_bias) if rotary else None
    keys, values = c.kv_heads * c.still_width, c.kv_heads * c.value_width
    self.key_up = make((c.rank, keys), ('R', 'K')) if keys else None
    self.value_up = make((c.rank, values), ('R', 'K'))
    self.output = make(
      (c.copies * values, width), ('N', 'D'), c.output_bias, stddev=stream.write_stddev
    )
    of_latents = dataclasses.replace(stream, norm_eps=c.norm_eps)
    self.query_norm, self.kv_norm = (
      Norm(rank, of_latents, dtype=dtype, kind='rms', axes=('R',))
      if c.latent_norms and rank is not None
      else None
      for rank in (c.query_rank, c.rank)
    )

  def __call__(self, x_BTD, angles, mask: AttentionMask, cache: LatentCache | None = None):
    """Returns (y_BTD, cache). `angles` is (cos, sin) or None."""
    q_BTNH, c_BTR, k_BTKW = self._read(x_BTD, angles)
    if cache is None:
      y_BTNH = self._expanded(q_BTNH, c_BTR, k_BTKW, mask)
    else:
      positions_BT = mask.q_positions_BT
      token_BTH = jnp.concatenate([c_BTR, rearrange(k_BTKW, 'B T K W -> B T (K W)')], axis=-1)
      cache = cache.written(token_BTH[:, :, None], positions_BT)
      attend = self._absorbed if self.config.absorbs(x_BTD.shape[1]) else self._over_all
      y_BTNH = attend(q_BTNH, cache, positions_BT)
    return self.output(rearrange(y_BTNH, 'B T N H -> B T (N H)')), cache

  def _read(self, x_BTD, angles) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, N, H], latents [B, T, R] and rotated keys [B, T, K, W]; W may be 0."""
    c = self.config
    first = self.query if self.query_down is None else self.query_down
    keys = [self.rotary_key] if c.rotary_width else []
    q_BTO, c_BTR, *k_BTO = apply(x_BTD, first, self.kv_down, *keys)
    if self.query_up is not None:
      q_BTO = self.query_up(_normed(self.query_norm, q_BTO))
    q_BTNH = rearrange(q_BTO, 'B T (N H) -> B T N H', N=c.query_heads)
    k_BTO = k_BTO[0] if k_BTO else jnp.zeros((*x_BTD.shape[:2], 0), x_BTD.dtype)
    k_BTKW = k_BTO.reshape(*k_BTO.shape[:2], c.rotary_heads, c.rotary_width)
    if angles is not None and c.rotary_width:
      angles = self._kept(angles)
      still, turned = jnp.split(q_BTNH, [c.still_width], axis=-1)
      q_BTNH = jnp.concatenate([still, rope.rotate(turned, *angles)], axis=-1)
      k_BTKW = rope.rotate(k_BTKW, *angles)
    return q_BTNH, _normed(self.kv_norm, c_BTR), k_BTKW

  def _kept(self, angles):
    """The cosines and sines of the pairs that rotate."""
    if self.config.pairs is None:
      return angles
    pairs = np.array(self.config.pairs)
    places = np.concatenate([pairs, pairs + self.config.full_rotary_width // 2])
    return tuple(part[..., places] for part in angles)

  def _expanded(self, q_BTNH, c_BSR, k_BSKW, mask: AttentionMask) -> jax.Array:
    """Attention to the keys and values of all heads, made from latents and rotated keys."""
    c = self.config
    ups = [self.key_up, self.value_up] if c.still_width else [self.value_up]
    *keys, v = (rearrange(x, 'B S (K H) -> B S K H', K=c.kv_heads) for x in apply(c_BSR, *ups))
    turned = jnp.broadcast_to(k_BSKW, (*k_BSKW.shape[:2], c.kv_heads, c.rotary_width))
    k = jnp.concatenate([*keys, turned], axis=-1)
    width = max(c.head_width, c.value_width)
    fill = lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])])
    y_BTNH = attention(fill(q_BTNH), fill(k), fill(v), mask, scale=self._scale)
    return y_BTNH[..., : c.value_width]

  def _over_all(self, q_BTNH, cache: LatentCache, positions_BT) -> jax.Array:
    """The expanded form over all tokens of a cache."""
    c = self.config
    token_BSH = cache.tokens.floats(q_BTNH.dtype)[:, :, 0]
    c_BSR, k_BSO = jnp.split(token_BSH, [c.rank], axis=-1)
    k_BSKW = k_BSO.reshape(*k_BSO.shape[:2], c.rotary_heads, c.rotary_width)
    return self._expanded(q_BTNH, c_BSR, k_BSKW, cache.mask(positions_BT))

  def _absorbed(self, q_BTNH, cache: LatentCache, positions_BT) -> jax.Array:
    """Attention in the space of the latents, over all tokens of a cache."""
    q_BTNH = self._into_latents(q_BTNH)
    found_BTNR = cache.attended(q_BTNH, positions_BT, scale=self._scale)[..., : self.config.rank]
    found_BTKGR = rearrange(found_BTNR, 'B T (K G) R -> B T K G R', K=self.config.kv_heads)
    values_RKH = self._of_heads(self.value_up, found_BTKGR)
    y_BTKGH = jnp.einsum('BTKGR,RKH->BTKGH', found_BTKGR, values_RKH)
    return rearrange(y_BTKGH, 'B T K G H -> B T (K G) H')

  def _into_latents(self, q_BTNH: jax.Array) -> jax.Array:
    """Maps queries so that products with cached vectors equal those with their heads' keys."""
    c = self.config
    q_BTKGH = rearrange(q_BTNH, 'B T (K G) H -> B T K G H', K=c.kv_heads)
    still, turned = jnp.split(q_BTKGH, [c.still_width], axis=-1)
    if c.still_width:
      q_BTKGR = jnp.einsum('BTKGH,RKH->BTKGR', still, self._of_heads(self.key_up, still))
    else:
      q_BTKGR = jnp.zeros((*still.shape[:-1], c.rank), still.dtype)
    if not c.shared_rotary:
      # Each group of heads reads the rotated key of its own, and zeros meet the others.
      own = jnp.eye(c.kv_heads, dtype=turned.dtype)[None, None, :, None, :, None]
      turned = rearrange(turned[:, :, :, :, None] * own, 'B T K G all W -> B T K G (all W)')
    return rearrange(jnp.concatenate([q_BTKGR, turned], -1), 'B T K G H -> B T (K G) H')

  def _of_heads(self, up: Linear, like: jax.Array) -> jax.Array:
    """The matrix of each head, [R, K, H]."""
    w_RO = linear.dense(up.weight.get_value()).astype(like.dtype)
    return rearrange(w_RO, 'R (K H) -> R K H', K=self.config.kv_heads)

  @property
  def _scale(self) -> float:
    return self.config.query_scale or self.config.head_width**-0.5


def _normed(norm: Norm | None, x: jax.Array) -> jax.Array:
  return x if norm is None else norm(x)
