"""Finds the buffers of a compiled program in its text, and the widened weights among them.

A program that multiplies by a compressed weight saves nothing if it first writes the weight to
memory in a wider type. Values inside a fusion have no buffer, so computations inside fusions are
left out, and so are the program's arguments. XLA:TPU may keep a buffer in its vector memory (VMEM);
such a buffer counts too, because it is written and read again.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import jax

from ops import linear

_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.-]+) \(.*\{$')
_ARRAY = re.compile(r'\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]')
_RESULT = re.compile(r'^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(')
_FUSED = re.compile(r'\bfusion\(.*\bcalls=%?([\w.-]+)')
_APPLIED = re.compile(r'\bto_apply=%?([\w.-]+)')
# Instructions without a buffer of their own: arguments, views, parts of tuples, carries of loops.
_NO_BUFFER = {'parameter', 'bitcast', 'tuple', 'get-tuple-element', 'while'}
PADDING = 9 / 8  # a copy may be padded to whole blocks


@dataclasses.dataclass(frozen=True)
class Buffer:
  """An array that a program writes to memory."""

  dtype: str  # as in the program's text, such as 'bf16'
  shape: tuple[int, ...]
  op: str

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def bits(self) -> int:
    """The bits of one element."""
    found = re.search(r'[0-9]+', self.dtype)
    return int(found[0]) if found else 8  # pred


def buffers(text: str) -> Iterator[Buffer]:
  """Yields each array that instructions outside fusions write, from the text of an HLO module."""
  lines = text.splitlines()
  inner = {m[1] for line in lines for m in (_FUSED.search(line), _APPLIED.search(line)) if m}
  inside = False
  for line in lines:
    computation = _COMPUTATION.match(line)
    if computation:
      inside = computation[1] in inner
    result = _RESULT.match(line)
    if result and not inside and result[2] not in _NO_BUFFER:
      for dtype, shape in _ARRAY.findall(result[1]):
        yield Buffer(dtype, tuple(map(int, filter(None, shape.split(',')))), result[2])


def widened(text: str, weights: Iterable[linear.Matrix]) -> list[Buffer]:
  """Returns the buffers with as many elements as one of the weights, but more bits per element.

  An activation of the size of a weight is among them; check the shape.
  """
  sizes = {(math.prod(w.shape), _bits(w)) for w in weights}
  return [
    buffer
    for buffer in buffers(text)
    if any(size <= buffer.size <= PADDING * size and buffer.bits > bits for size, bits in sizes)
  ]


def _bits(w: linear.Matrix) -> float:
  """The bits per element in the largest array of a weight."""
  largest = max(jax.tree.leaves(w), key=lambda leaf: leaf.size)
  return jax.dtypes.itemsize_bits(largest.dtype) * largest.size / math.prod(w.shape)
