"""The caches of a whole model, one for each layer, in one of several formats.

  float        the requested dtype
  bf16         bfloat16, whatever the dtype of the model
  int8, int4   low-bit codes (`model.layers.mixers.sides` and `paged`)

Slot s of a row holds position s of that row. The rows of a batch may have different lengths: a
query sees only slots up to its own position, so slots past the end of a row are never read, and
slots with padding are overwritten when the row reaches them. Layers with a window hold no more than
that (`model.layers.mixers.slots`).
"""

from typing import get_args

import jax.numpy as jnp
from jax.sharding import Mesh

from model import sharding
from model.config import ModelConfig
from model.layers.cache import CacheFormat
from model.transformer import Caches

FORMATS = get_args(CacheFormat)


def init(
  config: ModelConfig,
  batch: int,
  capacity: int,
  dtype=jnp.float32,
  format: CacheFormat = 'float',
  *,
  mesh: Mesh | None = None,
) -> Caches:
  """Allocates an empty cache for `batch` rows of up to `capacity` tokens, one entry per layer.

  `dtype` is that of the floating-point keys and values that a format stores; 'bf16' ignores it.
  'int4' rounds the capacity up to whole pages. A mesh divides the rows and the heads.
  """
  check_format(format)
  make = lambda: tuple(layer.mixer.cache(batch, capacity, dtype, format) for layer in config.layers)
  return make() if mesh is None else sharding.make_caches(make, mesh)


def insert(caches: Caches, row, one: Caches) -> Caches:
  """Returns the caches with the only row of others, of equal capacity, in place of a row."""
  return tuple(cache.insert(row, other) for cache, other in zip(caches, one, strict=True))


def check_format(format: str) -> None:
  """Raises ValueError if there is no cache format of this name."""
  if format not in FORMATS:
    raise ValueError(f'{format!r} is not a cache format; the formats are {", ".join(FORMATS)}')
