"""Hands the keys and values of one layer to later layers of the same pass.

A layer with `lends` returns a `Lent` in place of its cache. A layer with `back` = n has no cache of
its own; in its place it is given what the layer n places before it has lent. Code that runs the
layers of a model one after another keeps a `Lenders` for the pass; code that runs one layer alone
refuses layers that read from another.
"""

import collections
from collections.abc import Sequence

from model.layers.block import LayerConfig
from model.layers.cache import Cache
from model.layers.mixers.kv import Held
from model.layers.sublayer import MixerConfig


class Lenders:
  """What the last layers of a pass have lent."""

  def __init__(self, layers: Sequence[LayerConfig]):
    self._lent = collections.deque(maxlen=max(layer.mixer.back for layer in layers))

  def given(self, mixer: MixerConfig, cache: Cache | None) -> Cache | Held | None:
    """The argument that stands for the cache of the next layer, which has this mixer."""
    return self._lent[-mixer.back] if mixer.back else cache

  def taken(self, mixer: MixerConfig, found) -> Cache | None:
    """Keeps what the layer lends for the next layers, and returns the cache that it returned."""
    self._lent.append(found.held if mixer.lends else None)
    return found.cache if mixer.lends else found


def shares(layers: Sequence[LayerConfig]) -> bool:
  """Whether a layer reads the keys and values of another one."""
  return any(layer.mixer.back for layer in layers)


def check(layers: Sequence[LayerConfig]) -> None:
  """Raises ValueError where a layer cannot read what it should."""
  for l, mixer in enumerate(layer.mixer for layer in layers):
    if not mixer.back:
      continue
    if mixer.back > l:
      raise ValueError(
        f'layer {l} reads the keys and values of the layer {mixer.back} before it, but there is no '
        'such layer'
      )
    lender = layers[l - mixer.back].mixer
    problem = mixer.obstacle(lender) if lender.lends else 'that layer lends none'
    if problem:
      raise ValueError(
        f'layer {l} cannot read the keys and values of layer {l - mixer.back}: {problem}'
      )


def check_kept(layers: Sequence[LayerConfig], numbers: Sequence[int]) -> None:
  """Raises ValueError if some layers of a model cannot stand alone without the others."""
  for new, old in enumerate(numbers):
    back = layers[old].mixer.back
    if back and (new < back or numbers[new - back] != old - back):
      raise ValueError(
        f'layer {old} reads the keys and values of layer {old - back}, so it has to stay {back} '
        'after it; keep both and what lies between, or neither'
      )


def pieces(layers: Sequence[LayerConfig]) -> list[int]:
  """Lengths of the shortest runs of layers that read from no layer outside their run."""
  starts = set(range(len(layers)))
  for l, layer in enumerate(layers):
    starts -= set(range(l - layer.mixer.back + 1, l + 1)) if layer.mixer.back else set()
  edges = [*sorted(starts), len(layers)]
  return [end - start for start, end in zip(edges, edges[1:])]
