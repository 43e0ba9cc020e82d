"""Attention to the keys and values of an earlier layer: the mixer of kind 'shared'.

After Brandon et al. (2024), cross-layer attention, https://arxiv.org/abs/2405.12981. The layer has
queries, an output and, where its kind has them, norms of queries, gates and sinks, but neither
matrices for keys and values nor a cache. It reads those of the layer `back` places before it, which
has `lends`, rotated and stored as that layer has them. With two layers for each cache (CLA2) the
caches of a model take half of the bytes. Decoding reads as many bytes of caches as before, because
each layer reads all keys and values that its queries see; only the arithmetic of the missing
matrices is saved.

Code that runs one layer alone, as calibration does, cannot run such a layer; see
`model.layers.lending`.
"""

import dataclasses

from einops import rearrange

from model.layers import cache as caches
from model.layers.basic import apply
from model.layers.cache import Cache
from model.layers.checks import check_count
from model.layers.mixers.attention import AttentionConfig, Heads
from model.layers.mixers.kv import Held
from model.layers.wiring import Edge, Normed, Shared
from ops.masks import AttentionMask

# In which a layer and the one that lends to it have to agree: what makes keys and values.
SAME = ('kv_heads', 'head_width', 'rotates', 'rope', 'rotary_width', 'qk_norm', 'qk_norm_over')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedConfig(AttentionConfig):
  """The query heads of a layer, and the key/value heads of the layer that it reads.

  back: how many layers before this one the other layer is.
  """

  back: int = 1

  def __post_init__(self):
    super().__post_init__()
    check_count('back', self.back)
    if self.lends:
      raise ValueError('a layer without keys and values of its own lends none; set lends=False')

  def obstacle(self, lender: AttentionConfig) -> str | None:
    """Why the keys and values of another layer cannot be read, or None."""
    for name in SAME:
      ours, theirs = getattr(self, name), getattr(lender, name)
      if ours != theirs:
        return f'{name} is {ours!r} here and {theirs!r} there'
    if lender.pattern is not None and self.pattern != lender.pattern:
      seen = self.pattern or 'all keys'
      return f'it sees {seen} here, and there no more than {lender.pattern} is held'
    return None

  def build(self, stream, *, rngs, dtype):
    return SharedAttention(self, stream, rngs=rngs, dtype=dtype)

  def edges(self, name):
    query, output = f'{name}.query', f'{name}.output'
    gate = (f'{name}.gate',) if self.gated else ()
    return (
      Edge(producer=f'{name}_norm', through=Normed(), consumers=(query, *gate)),
      Edge(producer=None, through=Shared(scores=(query,)), consumers=(output,)),
    )

  def cache(self, batch, capacity, dtype, format):
    """Nothing, whatever the format."""
    del batch, capacity, dtype, format
    return Elsewhere()

  @property
  def cached(self):
    return 0


@caches.register
@dataclasses.dataclass(frozen=True)
class Elsewhere(Cache):
  """The empty cache of a layer whose keys and values are in the cache of an earlier one."""

  by_position = True  # nothing needs to be set back or copied

  @property
  def capacity(self):
    return None


class SharedAttention(Heads):
  """Multi-head attention with queries of its own alone."""

  def make_keys(self, make, norm, width):
    """Makes nothing."""

  def __call__(self, x_BTD, angles, mask: AttentionMask, held: Held | None = None):
    """Returns (y_BTD, an empty cache); `held` is what the other layer has lent in this pass."""
    if held is None:
      raise ValueError(
        f'this layer reads keys and values of the layer {self.config.back} before it, in the same '
        'pass; what runs layers one by one, as calibration does, cannot run it'
      )
    q_BTN, *gates = apply(x_BTD, self.query, *self.gates)
    q_BTNH, own = self.queries(q_BTN, angles)
    y_BTNH = held.read(q_BTNH, mask, **own, **self.scores)
    return self.written(rearrange(y_BTNH, 'B T N H -> B T (N H)'), gates), Elsewhere()
