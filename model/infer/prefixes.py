"""Beginnings of texts whose keys and values are kept: a radix tree over blocks of tokens.

Every node is a block of a fixed number of tokens after those of its ancestors, and has a place in
the arrays that hold its keys and values. When all places are taken, the least recently used block
is evicted. Using a block counts as using all blocks before it, so no block outlives those that it
follows.
"""

import collections
import dataclasses
from collections.abc import Hashable, Sequence


@dataclasses.dataclass(eq=False)
class _Node:
  key: tuple[int, ...] | Hashable
  parent: '_Node | None'
  place: int
  children: dict = dataclasses.field(default_factory=dict)


class Prefixes:
  """The tree, with `places` places for blocks of `block` tokens."""

  def __init__(self, places: int, block: int):
    self.block = block
    self._roots: dict[Hashable, _Node] = {}
    self._free = list(range(places))[::-1]
    self._by_use: collections.OrderedDict[_Node, None] = collections.OrderedDict()

  def __len__(self):
    return len(self._by_use)

  def match(self, tokens: Sequence[int], kind: Hashable = None) -> list[int]:
    """The places of the longest run of whole blocks from the first token on.

    Texts of different kinds share nothing; an adapter is one.
    """
    path = self._path(tokens, kind)
    self._use(path)
    return [node.place for node in path]

  def add(self, tokens: Sequence[int], kind: Hashable = None) -> dict[int, int]:
    """Makes places for the whole blocks that have none yet: {block of these tokens: place}.

    The caller fills them before the next `match`.
    """
    path, new = self._path(tokens, kind), {}
    self._use(path)
    own = set(path)
    for i in range(len(path), len(tokens) // self.block):
      place = self._place(own)
      if place is None:
        break
      parent = path[-1] if path else self._roots.setdefault(kind, _Node(kind, None, -1))
      node = _Node(self._key(tokens, i), parent, place)
      parent.children[node.key] = node
      path.append(node)
      own.add(node)
      new[i] = place
      self._use(path)
    return new

  def _place(self, kept) -> int | None:
    if self._free:
      return self._free.pop()
    oldest = next(iter(self._by_use), None)
    if oldest is None or oldest in kept:
      return None
    del self._by_use[oldest]
    del oldest.parent.children[oldest.key]
    return oldest.place

  def _path(self, tokens, kind) -> list[_Node]:
    node, path = self._roots.get(kind), []
    while node is not None:
      node = node.children.get(self._key(tokens, len(path)))
      if node is not None:
        path.append(node)
    return path

  def _key(self, tokens, i) -> tuple[int, ...]:
    return tuple(tokens[i * self.block : (i + 1) * self.block])

  def _use(self, path) -> None:
    # The deepest first: the least recently used node is always one that nothing comes after.
    for node in reversed(path):
      self._by_use[node] = None
      self._by_use.move_to_end(node)
