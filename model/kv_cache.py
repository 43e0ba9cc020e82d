"""Keys and values of the tokens seen so far, contiguous, one `KVCache` a layer.

Slot s of a row holds position s of that row. Rows of a batch may have different lengths: a query
sees only slots up to its own position, so what lies beyond a row's end is never read, and padded
slots are overwritten when the row gets there.

Another way to store a cache (quantized, paged) is another class with the same two methods.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from model.config import ModelConfig

# Mapped over rows, slice updates become a scatter, which XLA:CPU runs row by row with bounds
# checks; unrolled, they are copies in place, but each has to be compiled.
UNROLLED_ROWS = 8


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('k_BSKH', 'v_BSKH'), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class KVCache:
  """One layer's keys and values, each [B, S, K, H], bf16 or f32."""

  k_BSKH: jax.Array
  v_BSKH: jax.Array

  @property
  def capacity(self) -> int:
    return self.k_BSKH.shape[1]

  def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, starts_B: jax.Array) -> 'KVCache':
    """Stores T new tokens a row, from slot starts_B[b] on; the caller sees to it that they fit."""
    if k_BTKH.shape[1] > self.capacity:
      raise ValueError(f'{k_BTKH.shape[1]} tokens do not fit into a cache of {self.capacity}')
    return KVCache(
      _write(self.k_BSKH, k_BTKH, starts_B),
      _write(self.v_BSKH, v_BTKH, starts_B),
    )

  def read(self, dtype) -> tuple[jax.Array, jax.Array]:
    """Returns all keys and values, [B, S, K, H] each, in `dtype`."""
    return self.k_BSKH.astype(dtype), self.v_BSKH.astype(dtype)


def _write(cache_BSKH, new_BTKH, starts_B):
  new_BTKH = new_BTKH.astype(cache_BSKH.dtype)
  write_row = lambda row_SKH, new_TKH, start: jax.lax.dynamic_update_slice(
    row_SKH, new_TKH, (start, 0, 0)
  )
  if len(cache_BSKH) > UNROLLED_ROWS:
    return jax.vmap(write_row)(cache_BSKH, new_BTKH, starts_B)
  for b in range(len(cache_BSKH)):
    cache_BSKH = jax.lax.dynamic_update_slice(
      cache_BSKH, new_BTKH[b : b + 1], (b, starts_B[b], 0, 0)
    )
  return cache_BSKH


def init(config: ModelConfig, batch: int, capacity: int, dtype=jnp.float32) -> tuple[KVCache, ...]:
  """Allocates an empty cache for `batch` rows of up to `capacity` tokens, one entry a layer."""

  def layer_cache(layer):
    # Zeros, not empty: masked slots are multiplied by zero, and 0 * NaN is NaN.
    shape = (batch, capacity, layer.kv_heads, layer.head_width)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  return tuple(layer_cache(layer) for layer in config.layers)
