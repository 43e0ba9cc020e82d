"""Key/value caches of 8-bit and 4-bit codes, decoded as they are read.

int8   One symmetric scale a token and head: x = code * scale. A token is stored once and never
       looked at again, so nothing depends on how many tokens came at a time.
int4   After Liu et al. (2024), "KIVI", https://arxiv.org/abs/2402.02750: x = code * scale +
       minimum, keys in groups of `PAGE` tokens of one channel, for a few channels are large in
       all tokens, values in groups of up to `CHANNELS` channels of one token. A page needs all of
       its tokens, so the tokens of a row's last page are kept as they came until it is complete.

A call sees its own tokens, and the page in which it begins, exactly, and all pages before as they
are stored. So tokens fed one by one, or page by page, see the same things; a longer prompt sees
itself exactly, as in the paper, and no query sees a scale that a later token had a part in. What
is stored for given keys and values does not depend on how many of them came at a time.

Different from the paper: a page of values is stored when the page of keys is, where the paper keeps
the last tokens' values exact by a window that rolls; and the smallest bit width here is 4.

Scales and minima are float16, not bfloat16: they are small, and a minimum that is large beside its
group's range needs the mantissa. Magnitudes of keys and values must stay below 65504. Bytes a token
and head of width 64: int8 132, int4 80 (and `PAGE` exact tokens a row), bfloat16 256. The decoded
keys and values of one layer at a time are a temporary of the program.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from einops import rearrange

from model import kv_rows
from model.config import LayerConfig
from ops import axes

PAGE = 32  # tokens
CHANNELS = 32
SCALE_DTYPE = jnp.float16
SMALLEST_SCALE = 2.0**-24  # the least float16 above zero: a constant group has no range


def _pytree(cls):
  fields = [field.name for field in dataclasses.fields(cls)]
  return jax.tree_util.register_dataclass(cls, data_fields=fields, meta_fields=[])


@_pytree
@dataclasses.dataclass(frozen=True)
class Tokens8:
  """Keys or values of one layer: int8 codes, and a scale a token and head."""

  codes_BSKH: jax.Array
  scales_BSK: jax.Array

  def __post_init__(self):
    axes.check_fields('...BSKH,...BSK', self.codes_BSKH, self.scales_BSK)

  def write(self, new_BTKH: jax.Array, starts_B: jax.Array) -> 'Tokens8':
    new_BTKH = new_BTKH.astype(jnp.float32)
    scales_BTK = _stored_scale(jnp.abs(new_BTKH).max(-1) * (1 / 127))
    steps = new_BTKH / scales_BTK.astype(jnp.float32)[..., None]
    codes_BTKH = jnp.clip(jnp.round(steps), -127, 127).astype(jnp.int8)
    return Tokens8(
      kv_rows.write(self.codes_BSKH, codes_BTKH, starts_B),
      kv_rows.write(self.scales_BSK, scales_BTK, starts_B),
    )

  def decode(self, dtype) -> jax.Array:
    """Returns [B, S, K, H]."""
    scales_BSK = self.scales_BSK.astype(jnp.float32)
    return (self.codes_BSKH.astype(jnp.float32) * scales_BSK[..., None]).astype(dtype)


@_pytree
@dataclasses.dataclass(frozen=True)
class Int8Cache:
  """The 'int8' format."""

  keys: Tokens8
  values: Tokens8

  def __post_init__(self):
    if isinstance(self.keys, Tokens8) and isinstance(self.values, Tokens8):
      axes.check_fields('...BSKH,...BSKH', self.keys.codes_BSKH, self.values.codes_BSKH)

  @classmethod
  def empty(cls, layer: LayerConfig, batch: int, capacity: int, dtype) -> 'Int8Cache':
    del dtype  # nothing is kept in floating point
    shape = (batch, capacity, layer.kv_heads, layer.head_width)
    side = lambda: Tokens8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:3], SCALE_DTYPE))
    return cls(side(), side())

  @property
  def capacity(self) -> int:
    return self.keys.codes_BSKH.shape[1]

  def update(self, k_BTKH, v_BTKH, positions_BT):
    kv_rows.check(k_BTKH, self.capacity)
    keys = self.keys.write(k_BTKH, positions_BT[:, 0])
    values = self.values.write(v_BTKH, positions_BT[:, 0])
    return Int8Cache(keys, values), keys.decode(k_BTKH.dtype), values.decode(v_BTKH.dtype)


@_pytree
@dataclasses.dataclass(frozen=True)
class Pages4:
  """Keys or values of one layer in P pages of S tokens: 4-bit codes, two channels a byte.

  Channel h < H/2 is in the low half of byte h, channel h + H/2 in the high one. Scales and minima
  are [B, P, 1, K, H] for groups of tokens, and [B, P, S, K, J] for J groups of channels.
  """

  codes: jax.Array  # uint8 [B, P, S, K, H/2]
  scales: jax.Array
  minima: jax.Array

  def __post_init__(self):
    # S is 1 or that of the codes, and the last axis is H or J.
    axes.check_fields('...BP_KH,...BP_KH', self.scales, self.minima)
    axes.check_fields('...BP_K_,...BP_K_', self.codes, self.scales)

  def decode(self) -> jax.Array:
    """Returns float32 [B, P, S, K, H]."""
    codes = jnp.concatenate([self.codes & 15, self.codes >> 4], axis=-1).astype(jnp.float32)
    return codes * _spread(self.scales, codes) + _spread(self.minima, codes)


def encode_keys(x_BPSKH: jax.Array) -> Pages4:
  """Quantizes each channel over the tokens of a page."""
  x_BPSKH = x_BPSKH.astype(jnp.float32)
  return _encode(x_BPSKH, x_BPSKH.min(2, keepdims=True), x_BPSKH.max(2, keepdims=True))


def encode_values(x_BPSKH: jax.Array) -> Pages4:
  """Quantizes each token over groups of neighbouring channels."""
  x_BPSKH = x_BPSKH.astype(jnp.float32)
  width = math.gcd(x_BPSKH.shape[-1], CHANNELS)
  groups = rearrange(x_BPSKH, 'B P S K (J H) -> B P S K J H', H=width)
  return _encode(x_BPSKH, groups.min(-1), groups.max(-1))


def _encode(x_BPSKH, low, high) -> Pages4:
  minima = _stored(low)
  scales = _stored_scale((high - minima.astype(jnp.float32)) * (1 / 15))
  steps = (x_BPSKH - _spread(minima, x_BPSKH)) / _spread(scales, x_BPSKH)
  codes = jnp.clip(jnp.round(steps), 0, 15).astype(jnp.uint8)
  half = codes.shape[-1] // 2
  return Pages4(codes[..., :half] | codes[..., half:] << 4, scales, minima)


@_pytree
@dataclasses.dataclass(frozen=True)
class Int4Cache:
  """The 'int4' format. `recent` keys and values are those of page `page_B[b]` of a row, exact."""

  keys: Pages4
  values: Pages4
  recent_k_BSKH: jax.Array
  recent_v_BSKH: jax.Array
  page_B: jax.Array

  def __post_init__(self):
    recent = self.recent_k_BSKH, self.recent_v_BSKH
    axes.check_fields('...BSKH,...BSKH,...B', *recent, self.page_B)
    if isinstance(self.keys, Pages4) and isinstance(self.values, Pages4):
      codes = self.keys.codes, self.values.codes
      axes.check_fields('...BSKH,...BP_K_,...BP_K_', recent[0], *codes)
      axes.check_fields('...BPSKH,...BPSKH', *codes)

  @classmethod
  def empty(cls, layer: LayerConfig, batch: int, capacity: int, dtype) -> 'Int4Cache':
    if layer.head_width % 2:
      raise ValueError(
        f"'int4' packs two channels a byte, but a head has {layer.head_width}; use 'int8'"
      )
    page = jnp.zeros((batch, PAGE, layer.kv_heads, layer.head_width), dtype)
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

  def update(self, k_BTKH, v_BTKH, positions_BT):
    kv_rows.check(k_BTKH, self.capacity)
    k_BSKH = self._seen(self.keys, self.recent_k_BSKH, k_BTKH, positions_BT[:, 0])
    v_BSKH = self._seen(self.values, self.recent_v_BSKH, v_BTKH, positions_BT[:, 0])
    length = k_BTKH.shape[1]
    # The page of the next token; where the cache is full, the last one.
    page_B = jnp.minimum((positions_BT[:, -1] + 1) // PAGE, self.capacity // PAGE - 1)
    cache = Int4Cache(
      keys=_stored_pages(self.keys, k_BSKH, positions_BT[:, 0], length, encode_keys),
      values=_stored_pages(self.values, v_BSKH, positions_BT[:, 0], length, encode_values),
      recent_k_BSKH=kv_rows.read(k_BSKH, page_B * PAGE, PAGE),
      recent_v_BSKH=kv_rows.read(v_BSKH, page_B * PAGE, PAGE),
      page_B=page_B.astype(jnp.int32),
    )
    return cache, k_BSKH.astype(k_BTKH.dtype), v_BSKH.astype(v_BTKH.dtype)

  def _seen(self, pages: Pages4, recent_BSKH, new_BTKH, starts_B):
    """Everything stored, with the page in which the new tokens begin and themselves exact."""
    all_BSKH = rearrange(pages.decode(), 'B P S K H -> B (P S) K H').astype(recent_BSKH.dtype)
    first_B = starts_B // PAGE
    # A row that was taken back to an earlier page finds that page as it was stored.
    stored_BSKH = kv_rows.read(all_BSKH, first_B * PAGE, PAGE)
    exact_B = (first_B == self.page_B)[:, None, None, None]
    page_BSKH = jnp.where(exact_B, recent_BSKH, stored_BSKH)
    all_BSKH = kv_rows.write(all_BSKH, page_BSKH, first_B * PAGE)
    return kv_rows.write(all_BSKH, new_BTKH, starts_B)


def _stored_pages(pages: Pages4, seen_BSKH, starts_B, length: int, encode) -> Pages4:
  """`pages` with those encoded that the new tokens may complete, from the one they begin in on.

  A page that is still incomplete is encoded for nothing: it is read from `recent`, and encoded
  again with its other tokens.
  """
  reached, first_B = -(-length // PAGE), starts_B // PAGE
  window_BSKH = kv_rows.read(seen_BSKH, first_B * PAGE, reached * PAGE)
  new = encode(rearrange(window_BSKH, 'B (P S) K H -> B P S K H', S=PAGE))
  return jax.tree.map(lambda old, new: kv_rows.write(old, new, first_B), pages, new)


def _spread(groups, like):
  """One float32 a channel, where `groups` has one a group of neighbouring channels."""
  return jnp.repeat(groups.astype(jnp.float32), like.shape[-1] // groups.shape[-1], axis=-1)


def _stored_scale(x):
  return _stored(jnp.maximum(x, SMALLEST_SCALE))


def _stored(x):
  # XLA may leave a rounding out between two computations in float32; codes need the stored number.
  return jax.lax.optimization_barrier(x.astype(SCALE_DTYPE))
