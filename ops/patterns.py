"""Sparse patterns: which of the keys up to its own position a query sees.

  Window(size)            the last `size` keys, itself included (Longformer)
  Window(size, step)      of the keys at distances 0, step, 2 step, ... the nearest `size` (dilated)
  First(count)            the first tokens of the text: attention sinks (StreamingLLM)
  Every(stride)           the keys at stride - 1, 2 stride - 1, ... (Sparse Transformer, fixed)
  Rows(stride)            queries at 0, stride, 2 stride, ... see all keys
  RandomBlocks(size, count, seed)   some blocks of keys, drawn for each block of queries (BigBird)
  a | b                   what either sees

Each has a text, such as 'window512+first4', which configs and flags have and `parse` reads.
'global128' is Longformer's: every 128th token sees all and is seen by all. Causality and segments
are not the pattern's but the mask's: what is seen by all is seen by all after it.

Longformer: Beltagy et al. (2020), https://arxiv.org/abs/2004.05150. BigBird: Zaheer et al. (2020),
https://arxiv.org/abs/2007.14062. Sparse Transformer: Child et al. (2019),
https://arxiv.org/abs/1904.10509. StreamingLLM: Xiao et al. (2023), https://arxiv.org/abs/2309.17453.
What looks ahead in the published forms is left out.
"""

import abc
import dataclasses
import functools
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

Positions = Any  # integers: a number, a numpy or a JAX array


class Pattern(abc.ABC):
  """A set of pairs (query, key) by their positions; only pairs with key <= query are asked for."""

  @abc.abstractmethod
  def sees(self, q: Positions, k: Positions) -> Any:
    """Whether the query at q sees the key at k <= q; broadcasts."""

  @abc.abstractmethod
  def touches(self, q: tuple[Positions, Positions], k: tuple[Positions, Positions]) -> Any:
    """Whether some query within (lowest, highest) may see some key within (lowest, highest).

    It may say yes where there is none, and never no where there is one. Broadcasts.
    """

  @abc.abstractmethod
  def seen(self, length: int) -> int:
    """How many keys the last of `length` tokens sees at most, itself included."""

  def mean(self, length: int) -> float:
    """The mean of `seen` over 1, 2, ..., `length` tokens."""
    return _mean(self, length)

  @property
  def parts(self) -> tuple['Pattern', ...]:
    """What it is the union of."""
    return (self,)

  @property
  def recent(self) -> tuple[int, int] | None:
    """(window, first) if it sees the last `window` and the first `first` tokens, and no others.

    A cache needs to hold no more than these.
    """
    return None

  def __or__(self, other: 'Pattern') -> 'Pattern':
    return Union((*self.parts, *other.parts))

  def picture(self, length: int) -> list[str]:
    """A line for each query, in which '#' is a key that it sees."""
    q, k = np.arange(length)[:, None], np.arange(length)[None]
    return [''.join('.#'[int(one)] for one in row) for row in (k <= q) & self.sees(q, k)]


@dataclasses.dataclass(frozen=True)
class Window(Pattern):
  """The nearest `size` keys at distances that are multiples of `step`, itself included."""

  size: int
  step: int = 1

  def __post_init__(self):
    if self.size < 1:
      raise ValueError(f'a window holds at least one key, not {self.size}')
    _check(step=self.step)

  def sees(self, q, k):
    distance = q - k
    near = distance < self.size * self.step
    return near if self.step == 1 else near & (distance % self.step == 0)

  def touches(self, q, k):
    return k[1] > q[0] - self.size * self.step

  def seen(self, length):
    return min(self.size, -(-length // self.step))

  @property
  def recent(self):
    return (self.size, 0) if self.step == 1 else None

  def __str__(self):
    return f'window{self.size}' + (f'x{self.step}' if self.step > 1 else '')


@dataclasses.dataclass(frozen=True)
class First(Pattern):
  """The first `count` tokens."""

  count: int

  def __post_init__(self):
    _check(count=self.count)

  def sees(self, q, k):
    return (k < self.count) & (k <= q)

  def touches(self, q, k):
    return (k[0] < self.count) & (k[0] <= q[1])

  def seen(self, length):
    return min(self.count, length)

  def __str__(self):
    return f'first{self.count}'


@dataclasses.dataclass(frozen=True)
class Every(Pattern):
  """One key of every `stride`: those with key % stride == residue % stride."""

  stride: int
  residue: int = -1

  def __post_init__(self):
    _check(stride=self.stride)
    if not -1 <= self.residue < self.stride:
      raise ValueError(f'residue must be from -1 to {self.stride - 1}, not {self.residue}')

  @property
  def start(self) -> int:
    """The first key."""
    return self.residue % self.stride

  def sees(self, q, k):
    return (k % self.stride == self.start) & (k <= q)

  def touches(self, q, k):
    count = lambda position: (position - self.start) // self.stride
    return (count(k[1]) > count(k[0] - 1)) & (k[0] <= q[1])

  def seen(self, length):
    return max(0, -(-(length - self.start) // self.stride))

  def __str__(self):
    return f'every{self.stride}' + (f'@{self.residue}' if self.residue >= 0 else '')


@dataclasses.dataclass(frozen=True)
class Rows(Pattern):
  """Every `stride`-th query, from the first on, sees all keys."""

  stride: int

  def __post_init__(self):
    _check(stride=self.stride)

  def sees(self, q, k):
    return (q % self.stride == 0) & (k <= q)

  def touches(self, q, k):
    return (q[1] // self.stride > (q[0] - 1) // self.stride) & (k[0] <= q[1])

  def seen(self, length):
    return length if (length - 1) % self.stride == 0 else 0

  def __str__(self):
    return f'rows{self.stride}'


@dataclasses.dataclass(frozen=True)
class RandomBlocks(Pattern):
  """For each block of `size` queries, `count` blocks of keys before it.

  One is drawn from each of `count` equal parts of what comes before, by the seed and the number of
  the block alone, so the pattern needs no table.
  """

  size: int
  count: int
  seed: int = 0

  def __post_init__(self):
    _check(size=self.size, count=self.count)
    if not 0 <= self.seed < 2**32:
      raise ValueError(f'a seed is within 0 and 2 ** 32 - 1, not {self.seed}')

  def sees(self, q, k):
    q, k = q // self.size, k // self.size
    return functools.reduce(lambda a, b: a | b, (k == self._drawn(q, i) for i in range(self.count)))

  def touches(self, q, k):
    low, high = q[0] // self.size, q[1] // self.size
    k_low, k_high = k[0] // self.size, k[1] // self.size
    found = high > low + 1
    for block in (low, high):
      for i in range(self.count):
        drawn = self._drawn(block, i)
        found = found | ((k_low <= drawn) & (drawn <= k_high))
    return found

  def seen(self, length):
    return min(self.size * self.count, (length - 1) // self.size * self.size)

  def _drawn(self, block, i: int):
    """Which block of keys the i-th draw gives to a block of queries; -1: none is before it."""
    before = jnp.maximum(block, 0)
    low, high = i * before // self.count, (i + 1) * before // self.count
    number = _hashed(before, self.seed * 0x9E3779B1 + i * 0x85EBCA77)
    return jnp.where(high > low, low + number % jnp.maximum(high - low, 1), -1)

  def __str__(self):
    return f'random{self.size}x{self.count}' + (f'@{self.seed}' if self.seed else '')


@dataclasses.dataclass(frozen=True)
class Union(Pattern):
  """What any of some patterns sees."""

  of: tuple[Pattern, ...]

  @property
  def parts(self):
    return self.of

  def sees(self, q, k):
    return functools.reduce(lambda a, b: a | b, (part.sees(q, k) for part in self.of))

  def touches(self, q, k):
    return functools.reduce(lambda a, b: a | b, (part.touches(q, k) for part in self.of))

  def seen(self, length):
    return min(length, sum(part.seen(length) for part in self.of))

  @property
  def recent(self):
    firsts = [part.count for part in self.of if isinstance(part, First)]
    others = [part.recent for part in self.of if not isinstance(part, First)]
    if len(others) != 1 or others[0] is None:
      return None
    return others[0][0], max(firsts, default=0)

  def __str__(self):
    return '+'.join(map(str, self.of))


@dataclasses.dataclass(frozen=True)
class Without(Pattern):
  """What one pattern sees and another does not."""

  pattern: Pattern
  other: Pattern

  def sees(self, q, k):
    return self.pattern.sees(q, k) & ~self.other.sees(q, k)

  def touches(self, q, k):
    return self.pattern.touches(q, k)

  def seen(self, length):
    return self.pattern.seen(length)


def _global(stride: int) -> Pattern:
  return Every(stride, 0) | Rows(stride)


_NUMBER = r'([1-9]\d*)'
_FORMS = {
  rf'window{_NUMBER}(?:x{_NUMBER})?': Window,
  rf'first{_NUMBER}': First,
  rf'every{_NUMBER}(?:@(\d+))?': Every,
  rf'rows{_NUMBER}': Rows,
  rf'global{_NUMBER}': _global,
  rf'random{_NUMBER}x{_NUMBER}(?:@(\d+))?': RandomBlocks,
}
FORMS = 'window512, window64x4, first4, every128, global256, random64x3'


def parse(text: str) -> Pattern:
  """Reads a text such as 'window512+first4'.

  Raises ValueError if it is none.
  """
  found = [_part(one, text) for one in text.split('+')]
  return functools.reduce(lambda a, b: a | b, found)


def _part(one: str, text: str) -> Pattern:
  for form, make in _FORMS.items():
    if match := re.fullmatch(form, one):
      return make(*(int(number) for number in match.groups() if number is not None))
  where = '' if one == text else f' in {text!r}'
  raise ValueError(f'{one!r}{where} is no sparse pattern; there are {FORMS}, joined by +')


@functools.cache
def _mean(pattern: Pattern, length: int) -> float:
  return float(np.mean([pattern.seen(t) for t in range(1, length + 1)]))


def _check(**counts: int) -> None:
  for name, value in counts.items():
    if value < 1:
      raise ValueError(f'{name} of a sparse pattern must be at least 1, not {value}')


def _hashed(x, salt: int):
  """A number from 0 to 2 ** 31 - 1 that looks random (the finalizer of MurmurHash3)."""
  x = jnp.asarray(x).astype(jnp.uint32) ^ jnp.uint32(salt % 2**32)
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return ((x ^ (x >> 16)) >> 1).astype(jnp.int32)
