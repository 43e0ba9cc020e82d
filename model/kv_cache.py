"""Caches the keys and values of past tokens, one `KVCache` per layer, in one of several formats.

Slot s of a row holds position s of that row. The rows of a batch may have different lengths: a
query sees only slots up to its own position, so slots past the end of a row are never read, and
slots with padding are overwritten when the row reaches them.

  float        the requested dtype
  bf16         bfloat16, whatever the dtype of the model
  int8, int4   low-bit codes (`model.kv_quantized`)

A new format is a class with the methods of `KVCache` and `empty`, and an entry of `FORMATS`.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from model import kv_rows
from model.config import ModelConfig
from model.kv_quantized import Int4Cache, Int8Cache
from model.layers.attention import AttentionConfig, KVCache
from ops import axes

CacheFormat = Literal['float', 'bf16', 'int8', 'int4']


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('k_BSKH', 'v_BSKH'), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class FloatCache:
  """Keys and values in a floating-point type, each [B, S, K, H]."""

  k_BSKH: jax.Array
  v_BSKH: jax.Array

  def __post_init__(self):
    axes.check_fields('...BSKH,...BSKH', self.k_BSKH, self.v_BSKH)

  @classmethod
  def empty(cls, heads: AttentionConfig, batch: int, capacity: int, dtype) -> 'FloatCache':
    # Not uninitialised: masked slots are multiplied by zero, and 0 * NaN is NaN.
    shape = (batch, capacity, heads.kv_heads, heads.head_width)
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
  def empty(heads: AttentionConfig, batch: int, capacity: int, dtype) -> FloatCache:
    del dtype
    return FloatCache.empty(heads, batch, capacity, jnp.bfloat16)


FORMATS = {'float': FloatCache, 'bf16': Bf16Cache, 'int8': Int8Cache, 'int4': Int4Cache}


def init(
  config: ModelConfig,
  batch: int,
  capacity: int,
  dtype=jnp.float32,
  format: CacheFormat = 'float',
) -> tuple[KVCache, ...]:
  """Allocates an empty cache for `batch` rows of up to `capacity` tokens, one entry per layer.

  `dtype` is that of the floating-point keys and values that a format stores; 'bf16' ignores it.
  'int4' rounds the capacity up to whole pages.
  """
  check_format(format)
  return tuple(
    FORMATS[format].empty(layer.mixer, batch, capacity, dtype) for layer in config.layers
  )


def check_format(format: str) -> None:
  """Raises ValueError if there is no cache format of this name."""
  if format not in FORMATS:
    raise ValueError(f'{format!r} is not a cache format; the formats are {", ".join(FORMATS)}')
