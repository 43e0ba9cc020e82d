"""Keys and values of the tokens seen so far, one `KVCache` a layer, in the format of one's choice.

Slot s of a row holds position s of that row. Rows of a batch may have different lengths: a query
sees only slots up to its own position, so what lies beyond a row's end is never read, and padded
slots are overwritten when the row gets there.

  float        as they come, in the dtype asked for
  bf16         bfloat16, whatever the model computes in
  int8, int4   `model.kv_quantized`

Another way to store a cache is another class with the same method, and a row of `FORMATS`.
"""

import dataclasses
import functools
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from model import kv_rows
from model.config import LayerConfig, ModelConfig
from model.kv_quantized import Int4Cache, Int8Cache
from ops import axes

CacheFormat = Literal['float', 'bf16', 'int8', 'int4']


class KVCache(Protocol):
  """One layer's keys and values; a pytree, so that a jitted program can take and donate it."""

  @property
  def capacity(self) -> int:
    """Tokens that a row can hold."""

  def update(
    self, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array
  ) -> tuple['KVCache', jax.Array, jax.Array]:
    """Stores T new tokens a row; returns the cache, and all keys and values that they may see.

    Row b is written from slot positions_BT[b, 0] on, where it ended or anywhere before; the caller
    sees to it that it fits. Padding follows a row's own tokens and repeats their last position.
    Keys and values are [B, S, K, H] each, S the capacity, in the dtype of the new ones, or that of
    the cache where it holds floating numbers: attention widens them as it reads.
    """


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('k_BSKH', 'v_BSKH'), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class FloatCache:
  """Keys and values, each [B, S, K, H], bf16 or f32."""

  k_BSKH: jax.Array
  v_BSKH: jax.Array

  def __post_init__(self):
    axes.check_fields('...BSKH,...BSKH', self.k_BSKH, self.v_BSKH)

  @classmethod
  def empty(cls, layer: LayerConfig, batch: int, capacity: int, dtype) -> 'FloatCache':
    # Zeros, not empty: masked slots are multiplied by zero, and 0 * NaN is NaN.
    shape = (batch, capacity, layer.kv_heads, layer.head_width)
    return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  @property
  def capacity(self) -> int:
    return self.k_BSKH.shape[1]

  def update(self, k_BTKH, v_BTKH, positions_BT):
    kv_rows.check(k_BTKH, self.capacity)
    k_BSKH = kv_rows.write(self.k_BSKH, k_BTKH, positions_BT[:, 0])
    v_BSKH = kv_rows.write(self.v_BSKH, v_BTKH, positions_BT[:, 0])
    return FloatCache(k_BSKH, v_BSKH), k_BSKH, v_BSKH


class Bf16Cache:
  """A `FloatCache` that holds bfloat16 for a model of any dtype."""

  @staticmethod
  def empty(layer: LayerConfig, batch: int, capacity: int, dtype) -> FloatCache:
    del dtype
    return FloatCache.empty(layer, batch, capacity, jnp.bfloat16)


FORMATS = {'float': FloatCache, 'bf16': Bf16Cache, 'int8': Int8Cache, 'int4': Int4Cache}


def init(
  config: ModelConfig,
  batch: int,
  capacity: int,
  dtype=jnp.float32,
  format: CacheFormat = 'float',
) -> tuple[KVCache, ...]:
  """Allocates an empty cache for `batch` rows of up to `capacity` tokens, one entry a layer.

  What a format keeps in floating point is in `dtype`. 'int4' rounds the capacity up to whole pages.
  """
  check_format(format)
  return tuple(FORMATS[format].empty(layer, batch, capacity, dtype) for layer in config.layers)


def check_format(format: str) -> None:
  """Raises ValueError if there is no such format of a cache."""
  if format not in FORMATS:
    raise ValueError(f'{format!r} is no format of a cache; the formats are {", ".join(FORMATS)}')
