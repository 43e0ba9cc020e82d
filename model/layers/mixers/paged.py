"""A cache of 4-bit keys and values in pages of tokens: the format 'int4'.

x = code * scale + minimum, after Liu et al. (2024), "KIVI", https://arxiv.org/abs/2402.02750. Keys
are grouped by `PAGE` tokens of one channel, because a few channels are large in all tokens; values
by up to `CHANNELS` channels of one token. A page can be encoded only when all of its tokens are
known, so the tokens of the last, incomplete page of a row are kept exact.

A call sees its own tokens and the page in which it begins exactly, and all earlier pages as they
are stored. Tokens that are fed one by one or page by page therefore see the same keys and values. A
longer prompt sees itself exactly, as in the paper, and no query depends on a scale to which a later
token contributed. The codes stored for given keys and values do not depend on how many tokens a
call has.

Differs from the paper: a page of values is encoded together with the page of keys, where the paper
keeps the values of the last tokens exact in a rolling window; and there are no fewer than 4 bits.

Scales and minima are float16: a minimum that is large relative to the range of its group needs the
longer mantissa. Keys and values must be smaller than 65504 in magnitude. Bytes per token and head
of width 64: 80, and `PAGE` exact tokens per row. The program holds the decoded keys and values of
one layer at a time.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from einops import rearrange

from model.layers import cache
from model.layers.mixers.kv import LendingCache
from model.layers.mixers.sides import Floats, stored, stored_scale
from model.layers.mixers.slots import SlotCache
from ops import axes, rows

PAGE = 32  # tokens
CHANNELS = 32


@cache.register
@dataclasses.dataclass(frozen=True)
class Pages4:
  """Keys or values of one layer in P pages of `PAGE` tokens: 4-bit codes, two channels per byte.

  Byte h < H/2 holds channel h in its low half and channel h + H/2 in its high half. Scales and
  minima are [B, P, 1, K, H] for groups of tokens, and [B, P, PAGE, K, J] for J groups of channels.
  """

  codes: jax.Array = cache.array('BP_K_')  # uint8 [B, P, PAGE, K, H/2]
  scales: jax.Array = cache.array('BP_K_')
  minima: jax.Array = cache.array('BP_K_')

  def __post_init__(self):
    # S is 1 or that of the codes, and the last axis is H or J.
    axes.check_fields('...BP_KH,...BP_KH', self.scales, self.minima)
    axes.check_fields('...BP_K_,...BP_K_', self.codes, self.scales)

  def decode(self) -> jax.Array:
    """Returns float32 [B, P, PAGE, K, H]."""
    codes = jnp.concatenate([self.codes & 15, self.codes >> 4], axis=-1).astype(jnp.float32)
    return codes * _spread(self.scales, codes) + _spread(self.minima, codes)


def encode_keys(x_BP_KH: jax.Array) -> Pages4:
  """Quantizes keys in groups of one channel over the tokens of a page."""
  x_BP_KH = x_BP_KH.astype(jnp.float32)
  return _encode(x_BP_KH, x_BP_KH.min(2, keepdims=True), x_BP_KH.max(2, keepdims=True))


def encode_values(x_BP_KH: jax.Array) -> Pages4:
  """Quantizes values in groups of neighbouring channels of one token."""
  x_BP_KH = x_BP_KH.astype(jnp.float32)
  width = math.gcd(x_BP_KH.shape[-1], CHANNELS)
  groups = rearrange(x_BP_KH, 'B P page K (J width) -> B P page K J width', width=width)
  return _encode(x_BP_KH, groups.min(-1), groups.max(-1))


def _encode(x_BP_KH, low, high) -> Pages4:
  minima = stored(low)
  scales = stored_scale((high - minima.astype(jnp.float32)) * (1 / 15))
  steps = (x_BP_KH - _spread(minima, x_BP_KH)) / _spread(scales, x_BP_KH)
  codes = jnp.clip(jnp.round(steps), 0, 15).astype(jnp.uint8)
  half = codes.shape[-1] // 2
  return Pages4(codes[..., :half] | codes[..., half:] << 4, scales, minima)


@cache.register
@dataclasses.dataclass(frozen=True)
class PagedCache(LendingCache):
  """Pages of 4-bit codes; row b keeps the exact tokens of its page page_B[b] in `recent`."""

  keys: Pages4
  values: Pages4
  recent_k_BSKH: jax.Array = cache.array('BSKH')
  recent_v_BSKH: jax.Array = cache.array('BSKH')
  page_B: jax.Array = cache.array('B')

  def __post_init__(self):
    recent = self.recent_k_BSKH, self.recent_v_BSKH
    axes.check_fields('...BSKH,...BSKH,...B', *recent, self.page_B)
    if isinstance(self.keys, Pages4) and isinstance(self.values, Pages4):
      codes = self.keys.codes, self.values.codes
      axes.check_fields('...BSKH,...BP_K_,...BP_K_', recent[0], *codes)
      axes.check_fields('...BPSKH,...BPSKH', *codes)

  @classmethod
  def empty(cls, shape: tuple[int, ...], dtype) -> 'PagedCache':
    """A cache for (batch, capacity, heads, head width); the capacity is rounded up to pages.

    Raises ValueError if a head has an odd width.
    """
    batch, capacity, heads, width = shape
    if width % 2:
      raise ValueError(f"'int4' packs two channels a byte, but a head has {width}; use 'int8'")
    page = jnp.zeros((batch, PAGE, heads, width), dtype)
    shape = (batch, -(-capacity // PAGE), *page.shape[1:])
    zeros = lambda encode: jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
      jax.eval_shape(encode, jax.ShapeDtypeStruct(shape, dtype)),
    )
    return cls(
      keys=zeros(encode_keys),
      values=zeros(encode_values),
      recent_k_BSKH=page,
      recent_v_BSKH=jnp.zeros_like(page),
      page_B=jnp.zeros(batch, jnp.int32),
    )

  @property
  def capacity(self) -> int:
    return self.keys.codes.shape[1] * PAGE

  def taken(self, k_BTKH, v_BTKH, positions_BT):
    new, k_BSKH, v_BSKH = self.update(k_BTKH, v_BTKH, positions_BT)
    return new, SlotCache(Floats(k_BSKH), Floats(v_BSKH))

  def update(self, k_BTKH, v_BTKH, positions_BT):
    """Stores new tokens; returns the cache, and the keys and values that they see [B, S, K, H]."""
    rows.check(k_BTKH, self.capacity)
    k_BSKH = self._seen(self.keys, self.recent_k_BSKH, k_BTKH, positions_BT[:, 0])
    v_BSKH = self._seen(self.values, self.recent_v_BSKH, v_BTKH, positions_BT[:, 0])
    length = k_BTKH.shape[1]
    # The page of the next token, or the last page if the cache is full.
    page_B = jnp.minimum((positions_BT[:, -1] + 1) // PAGE, self.capacity // PAGE - 1)
    new = PagedCache(
      keys=_stored_pages(self.keys, k_BSKH, positions_BT[:, 0], length, encode_keys),
      values=_stored_pages(self.values, v_BSKH, positions_BT[:, 0], length, encode_values),
      recent_k_BSKH=rows.read(k_BSKH, page_B * PAGE, PAGE),
      recent_v_BSKH=rows.read(v_BSKH, page_B * PAGE, PAGE),
      page_B=page_B.astype(jnp.int32),
    )
    return new, k_BSKH.astype(k_BTKH.dtype), v_BSKH.astype(v_BTKH.dtype)

  def _seen(self, pages: Pages4, recent_BSKH, new_BTKH, starts_B):
    """Decodes all pages and inserts the exact new tokens and the exact page in which they begin."""
    all_BSKH = rearrange(pages.decode(), 'B P page K H -> B (P page) K H').astype(recent_BSKH.dtype)
    first_B = starts_B // PAGE
    # After a rewind to an earlier page, that page is read as it was stored.
    stored_BSKH = rows.read(all_BSKH, first_B * PAGE, PAGE)
    exact_B = (first_B == self.page_B)[:, None, None, None]
    page_BSKH = jnp.where(exact_B, recent_BSKH, stored_BSKH)
    all_BSKH = rows.write(all_BSKH, page_BSKH, first_B * PAGE)
    return rows.write(all_BSKH, new_BTKH, starts_B)


def _stored_pages(pages: Pages4, seen_BSKH, starts_B, length: int, encode) -> Pages4:
  """Encodes the pages that the new tokens reach, from the page in which they begin.

  The codes of a page that is still incomplete are not used: the page is read from `recent`, and is
  encoded again when its other tokens arrive.
  """
  reached, first_B = -(-length // PAGE), starts_B // PAGE
  window_BSKH = rows.read(seen_BSKH, first_B * PAGE, reached * PAGE)
  new = encode(rearrange(window_BSKH, 'B (P page) K H -> B P page K H', page=PAGE))
  return jax.tree.map(lambda old, new: rows.write(old, new, first_B), pages, new)


def _spread(groups, like):
  """Repeats the value of each group of neighbouring channels for all of its channels: float32."""
  return jnp.repeat(groups.astype(jnp.float32), like.shape[-1] // groups.shape[-1], axis=-1)
