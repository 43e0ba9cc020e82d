"""Attention to blocks of keys that each query chooses: the mixer of kind 'moba'.

Mixture of block attention (see ops/block_selection.py): a query sees its own block of tokens and
the `top_k` blocks before it that suit it best, query head by query head. There are no parameters
beyond those of attention, so a trained model can be made into one: the step `block_selection`.

The cache holds all tokens and the mean key of each block. A step of decoding reads the means, the
query's own block and those that are chosen. Key/value heads that several query heads read are held
once.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from model.layers import cache as caches
from model.layers.cache import Cache
from model.layers.mixers.attention import Attention, AttentionConfig
from model.layers.mixers.sides import Floats
from ops import axes, block_selection, blocked, rows
from ops.block_selection import Blocks
from ops.masks import AttentionMask


@dataclasses.dataclass(frozen=True, kw_only=True)
class MobaConfig(AttentionConfig):
  """The heads of a layer, and the blocks that they choose.

  block: tokens of one.  top_k: how many each query chooses, besides its own.
  first: one of these is the first block of the text; see `ops.block_selection.Blocks`.
  """

  block: int
  top_k: int
  first: bool = False
  # Blocks are cut by the row: a document after another one is computed, but not as it would be
  # alone, so whoever wants its exact losses gives it a row of its own.
  packs = False

  def __post_init__(self):
    super().__post_init__()
    Blocks(size=self.block, top_k=self.top_k)  # checks them
    if self.pattern is not None:
      raise ValueError(
        f'a layer chooses the blocks that it sees, or sees {self.pattern}, not both; set window '
        'and sparse to None'
      )
    if self.lends:
      raise ValueError('a layer that chooses blocks lends no keys and values to later layers')

  @classmethod
  def of(cls, attention: AttentionConfig, **blocks) -> 'MobaConfig':
    """With the heads of a layer that sees all keys. Raises ValueError for another layer."""
    if type(attention) is not AttentionConfig:
      raise ValueError(
        f'a {type(attention).__name__} cannot choose blocks; give it attention first'
      )
    fields = {field.name: getattr(attention, field.name) for field in dataclasses.fields(attention)}
    return cls(**fields, **blocks)

  @property
  def blocks(self) -> Blocks:
    return Blocks(size=self.block, top_k=self.top_k, first=self.first)

  def build(self, stream, *, rngs, dtype):
    return Moba(self, stream, rngs=rngs, dtype=dtype)

  def cache(self, batch, capacity, dtype, format):
    """In the float formats alone, because blocks are taken out of it one by one."""
    if format not in ('float', 'bf16'):
      raise ValueError(
        f"a cache of blocks that queries choose has no format {format!r}; use 'float' or 'bf16'"
      )
    return BlockCache.empty(self, batch, capacity, jnp.bfloat16 if format == 'bf16' else dtype)

  def seen(self, context):
    """Tokens, without the means."""
    return int(self._seen(np.asarray(context)))

  def decode_flops(self, context):
    return self._with_means(np.asarray(context))

  def prefill_flops(self, length):
    return self._with_means(np.arange(1, length + 1))

  def _seen(self, contexts: np.ndarray) -> np.ndarray:
    earlier, own = (contexts - 1) // self.block, (contexts - 1) % self.block + 1
    return np.minimum(earlier, self.top_k) * self.block + own

  def _with_means(self, contexts: np.ndarray) -> float:
    means = (contexts - 1) // self.block / 2  # one product each, where a token has two
    return self._flops(float(np.mean(self._seen(contexts) + means)))


@caches.register
@dataclasses.dataclass(frozen=True)
class BlockCache(Cache):
  """The keys and values of whole blocks, and the mean key of each; slot s holds position s.

  A mean is made of the stored keys when the last token of its block comes, and is read from then
  on. So a row can be set back to any length.
  """

  spare = sys.maxsize

  keys: Floats
  values: Floats
  means_BPKH: jax.Array = caches.array('BPKH')  # float32

  def __post_init__(self):
    sides = self.keys.x_BSKH, self.values.x_BSKH
    axes.check_fields('...BSKH,...BSKH,...BPKH', *sides, self.means_BPKH)

  @classmethod
  def empty(cls, config: MobaConfig, batch: int, capacity: int, dtype) -> 'BlockCache':
    blocks, heads = -(-capacity // config.block), (config.kv_heads, config.head_width)
    shape = (batch, blocks * config.block, *heads)
    sides = [Floats.empty(shape, dtype) for _ in range(2)]
    return cls(*sides, jnp.zeros((batch, blocks, *heads), jnp.float32))

  @property
  def capacity(self):
    return self.keys.slots

  @property
  def block(self) -> int:
    return self.capacity // self.means_BPKH.shape[1]

  def written(self, k_BTKH, v_BTKH, positions_BT) -> 'BlockCache':
    """Stores new tokens, and the means of the blocks that they complete."""
    rows.check(k_BTKH, self.capacity)
    first_B, blocks = positions_BT[:, 0], self.means_BPKH.shape[1]
    write = lambda side, x_BTKH: Floats(rows.write(side.x_BSKH, x_BTKH, first_B))
    keys, values = write(self.keys, k_BTKH), write(self.values, v_BTKH)
    most = min((k_BTKH.shape[1] + self.block - 1) // self.block, blocks)
    # Blocks before the first of them get the means that they have; one that is not complete gets a
    # mean that nobody reads.
    from_B = jnp.minimum(first_B // self.block, blocks - most)
    k_BSKH = rows.read(keys.x_BSKH, from_B * self.block, most * self.block)
    new_BPKH = block_selection.means(k_BSKH, most)
    return BlockCache(keys, values, rows.write(self.means_BPKH, new_BPKH, from_B))


class Moba(Attention):
  """Multi-head attention to blocks that each query chooses."""

  def attend(self, x_BTD, q_BTNH, k_BTKH, v_BTKH, mask: AttentionMask, cache, **scores):
    del x_BTD
    sinks_N, blocks = scores.pop('sinks_N'), self.config.blocks
    if cache is None:
      whole = q_BTNH, k_BTKH, v_BTKH, blocks, mask.q_segments_BT
      found = block_selection.whole(*whole, **scores)
    else:
      cache = cache.written(k_BTKH, v_BTKH, mask.q_positions_BT)
      held = cache.keys.x_BSKH, cache.values.x_BSKH, cache.means_BPKH
      found = block_selection.attend(q_BTNH, *held, mask.q_positions_BT, blocks, **scores)
    if sinks_N is not None:
      y_BTNH, logs_BTN = found
      sinks_BTN = jnp.broadcast_to(sinks_N.astype(jnp.float32), logs_BTN.shape)
      found = blocked.merged([found, (jnp.zeros_like(y_BTNH), sinks_BTN)])
    return cache, found[0]
