"""The caches of a whole model, one for each layer, as a `CacheSpec` or its text says.

  float        the requested dtype
  bf16         bfloat16, whatever the dtype of the model
  int8, int4   low-bit codes (`model.layers.mixers.sides` and `paged`)
  ...+h2o512   a fixed number of tokens (`model.cache_spec`)

Where all tokens stay, slot s of a row holds position s of that row. The rows of a batch may have
different lengths: a query sees only slots up to its own position, so slots past the end of a row
are never read, and slots with padding are overwritten when the row reaches them. Layers with a
window hold no more than that (`model.layers.mixers.slots`), whatever the policy of the others, and
so do layers with a state of constant size. Layers that read the keys and values of an earlier layer
hold nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from model import cache_spec, sharding
from model.cache_spec import CacheSpec
from model.config import ModelConfig
from model.layers.cache import Cache, CacheFormat
from model.layers.mixers.policies import METHODS
from model.layers.mixers.slots import SlotCache
from model.layers.sublayer import MixerConfig
from model.transformer import Caches

FORMATS = cache_spec.FORMATS


def init(
  config: ModelConfig,
  batch: int,
  capacity: int,
  dtype=jnp.float32,
  format: CacheSpec | str = 'float',
  *,
  mesh: Mesh | None = None,
) -> Caches:
  """Allocates an empty cache for `batch` rows of up to `capacity` tokens, one entry per layer.

  `dtype` is that of the floating-point keys and values that a format stores; 'bf16' ignores it.
  'int4' rounds the capacity up to whole pages. A mesh divides the rows and the heads.

  Raises:
    ValueError: there is no such format, or a layer cannot give tokens up.
  """
  layers = range(len(config.layers))
  make = lambda: tuple(of_layer(config, i, batch, capacity, dtype, format) for i in layers)
  cache_spec.of(format)
  return make() if mesh is None else sharding.make_caches(make, mesh)


def of_layer(
  config: ModelConfig, layer: int, batch: int, capacity: int, dtype, format: CacheSpec | str
) -> Cache:
  """`init` for one of the layers."""
  spec, mixer = cache_spec.of(format), config.layers[layer].mixer
  make = lambda: mixer.cache(batch, capacity, dtype, spec.format)
  if spec.eviction is None:
    return make()
  mixers = [one.mixer for one in config.layers]
  evicting = [i for i, one in enumerate(mixers) if _evicts(one, capacity, spec.format)]
  if layer not in evicting:
    return make()
  budget = spec.eviction.budgets(len(evicting))[evicting.index(layer)]
  if capacity <= budget:
    return make()
  return METHODS[spec.eviction.method].make(jax.eval_shape(make), budget)


@functools.lru_cache(256)
def _evicts(mixer: MixerConfig, capacity: int, format: CacheFormat) -> bool:
  """Whether a cache of this mixer grows with the text; a window or a state does not.

  Raises ValueError if it does, and cannot give tokens up.
  """
  if mixer.pattern is not None and mixer.pattern.recent is None:
    raise ValueError(f'layers that see {mixer.pattern} cannot give tokens up; use all of them')
  if mixer.lends and mixer.pattern is None:
    raise ValueError(
      'a layer whose keys and values later layers read cannot give tokens up, because its own '
      'queries would choose them; use a cache of all tokens, such as int8'
    )
  cache = jax.eval_shape(lambda: mixer.cache(1, capacity, jnp.float32, format))
  if mixer.pattern is not None or cache.capacity is None:
    return False
  if not isinstance(cache, SlotCache):
    raise ValueError(f'a {type(cache).__name__} cannot give tokens up; use a cache of all tokens')
  return True


def insert(caches: Caches, row, one: Caches) -> Caches:
  """Returns the caches with the only row of others, of equal capacity, in place of a row."""
  return tuple(cache.insert(row, other) for cache, other in zip(caches, one, strict=True))


def check_format(format: CacheSpec | str) -> None:
  """Raises ValueError if there is no such cache."""
  cache_spec.of(format)
