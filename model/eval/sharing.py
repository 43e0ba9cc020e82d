"""Plans how many texts are read with few tokens and few programs.

Each text is read for the predictions after some of its last tokens. Texts that are equal, or of
which one begins with another, are one row. Rows that begin alike are a group: their common
beginning is read once into a cache, and each row goes on from there, such as the answers to one
question, or the questions after the same examples. The last token of a beginning comes before all
predictions that are wanted.

Reads are padded to a few widths, because each one is a program to compile. They are chosen so that
padding and compiling cost least together, where a program costs as much as `PROGRAM` tokens. By the
same cost, it is decided how long a beginning has to be, so that short ones are not shared where
that saves nothing.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

Tokens = tuple[int, ...]

STEP = 8  # widths are multiples of it
PROGRAM = 2048  # tokens that are read in the time of compiling a program, for small models on CPUs
CACHED = 2  # tokens in caches for each token of a call
LEAST_SHARED = (16, 32, 64, 128, None)  # tokens of a beginning that is shared; None: none is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
  """Tokens to read, and the `targets` that follow each of them from number `wanted` on."""

  tokens: Tokens
  wanted: int
  targets: Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """Rows that are read at once, in `size` rows of `width` tokens; those that are too many are idle.

  rows: the number of each row, and that of its beginning among those of the stage.
  """

  width: int
  size: int
  rows: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """Beginnings that are read at once, in `size` rows of `width` tokens, and the calls after them.

  Without beginnings (`width` is 0), each row is read from its first token on.
  """

  beginnings: tuple[Tokens, ...] = ()
  width: int = 0
  size: int = 0
  capacity: int = 0  # tokens that a row of the cache holds
  calls: tuple[Call, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is read: the tokens of each row, the row of each text, and the order."""

  rows: tuple[Tokens, ...]
  row_of: tuple[int, ...]
  stages: tuple[Stage, ...]

  @property
  def read(self) -> int:
    """Tokens that are read, without padding."""
    shared = sum(len(one) for stage in self.stages for one in stage.beginnings)
    return shared + sum(
      len(self.rows[row]) - len(stage.beginnings[at] if stage.beginnings else ())
      for stage in self.stages
      for call in stage.calls
      for row, at in call.rows
    )

  @property
  def cost(self) -> int:
    """Tokens that are read with padding and idle rows, and what compiling costs in tokens."""
    reads = [(s.size, s.width, s.capacity) for s in self.stages if s.beginnings]
    calls = [(s.size, c.size, c.width, s.capacity) for s in self.stages for c in s.calls]
    tokens = sum(size * width for size, width, _ in reads)
    tokens += sum(size * width for _, size, width, _ in calls)
    return tokens + PROGRAM * (len(set(reads)) + len(set(calls)))


@dataclasses.dataclass(frozen=True)
class _Group:
  """The rows begin, ..., end - 1, which have the first `shared` tokens in common."""

  begin: int
  end: int
  shared: int

  @property
  def rows(self) -> range:
    return range(self.begin, self.end)


def plan(texts: Sequence[Text], tokens: int) -> Plan:
  """Plans to read texts; a call reads at most `tokens` tokens at once, or one row."""
  rows, row_of = _rows([text.tokens for text in texts])
  wanted = [len(row) for row in rows]
  for text, row in zip(texts, row_of, strict=True):
    wanted[row] = min(wanted[row], text.wanted)
  plans = (_plan(rows, row_of, _groups(rows, wanted, least), tokens) for least in LEAST_SHARED)
  return min(plans, key=lambda one: one.cost)


def _plan(rows, row_of, groups: Sequence[_Group], tokens: int) -> Plan:
  alone = [group.begin for group in groups if not group.shared]
  lengths = [len(rows[row]) for row in alone]
  sizes = _sizes([lengths], {width: tokens // width for width in widths(lengths)})
  calls = _calls([(row, 0) for row in alone], lengths, sizes)
  stages = [Stage(calls=(call,)) for call in calls]
  return Plan(rows, row_of, (*_shared_stages(rows, groups, tokens), *stages))


def widths(lengths: Sequence[int]) -> list[int]:
  """The multiples of `STEP` to which lengths are padded, so that tokens and programs cost least."""
  ceilings = sorted(-(-length // STEP) * STEP for length in lengths)
  tops = sorted(set(ceilings))
  below = [0, *(sum(c <= top for c in ceilings) for top in tops)]
  best: list[tuple[int, list[int]]] = [(0, [])]
  for end, top in enumerate(tops, 1):
    options = (
      (best[begin][0] + (below[end] - below[begin]) * top + PROGRAM, best[begin][1])
      for begin in range(end)
    )
    cost, before = min(options, key=lambda option: option[0])
    best.append((cost, [*before, top]))
  return best[-1][1]


def _rows(texts: Sequence[Tokens]) -> tuple[tuple[Tokens, ...], tuple[int, ...]]:
  """The texts that no other one begins with, in order, and the number of each text's own."""
  kept, row_of = [], [0] * len(texts)
  # In this order, a text comes right after those that begin with it.
  for i in sorted(range(len(texts)), key=lambda i: texts[i], reverse=True):
    if not kept or kept[-1][: len(texts[i])] != texts[i]:
      kept.append(texts[i])
    row_of[i] = len(kept) - 1
  return tuple(kept), tuple(row_of)


def _groups(rows: Sequence[Tokens], wanted: Sequence[int], least: int | None) -> list[_Group]:
  """Neighbours that share a beginning, as far as a wider group saves more than a narrower one."""
  if least is None:
    return [_Group(i, i + 1, 0) for i in range(len(rows))]
  groups: list[_Group] = []
  for i, row in enumerate(rows):
    if groups:
      last = groups[-1]
      common = _common(rows[last.begin][: last.shared], row[: wanted[i]])
      count = i - last.begin
      if common >= least and count * common > (count - 1) * last.shared:
        groups[-1] = _Group(last.begin, i + 1, common)
        continue
    groups.append(_Group(i, i + 1, wanted[i]))
  return [g if len(g.rows) > 1 else _Group(g.begin, g.end, 0) for g in groups]


def _common(one: Tokens, other: Tokens) -> int:
  """How many first tokens are the same."""
  pairs = enumerate(zip(one, other))
  return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _shared_stages(rows, groups: Sequence[_Group], tokens: int) -> list[Stage]:
  groups = sorted((g for g in groups if g.shared), key=lambda g: -g.shared)
  stages, lengths = [], [g.shared for g in groups]
  for width, same in _by_width(groups, lengths, widths(lengths)):
    rest_widths = widths([len(rows[row]) - g.shared for g in same for row in g.rows])
    capacity = width + rest_widths[-1]
    most = max(1, CACHED * tokens // capacity)
    size = _size(len(same), most)
    parts = _parts(same, size)
    members = [[(row, at) for at, group in enumerate(part) for row in group.rows] for part in parts]
    rests = [
      [len(rows[row]) - part[at].shared for row, at in own] for part, own in zip(parts, members)
    ]
    sizes = _sizes(rests, dict.fromkeys(rest_widths, most))
    for part, own, lengths in zip(parts, members, rests, strict=True):
      beginnings = tuple(rows[g.begin][: g.shared] for g in part)
      read = {'beginnings': beginnings, 'width': width, 'size': size, 'capacity': capacity}
      stages.append(Stage(**read, calls=tuple(_calls(own, lengths, sizes))))
  return stages


def _calls(members, lengths, sizes: Mapping[int, int]) -> list[Call]:
  """Calls that read so many tokens of each member, the longest first; sizes: width -> rows."""
  order = sorted(range(len(members)), key=lambda i: -lengths[i])
  members, lengths = [members[i] for i in order], [lengths[i] for i in order]
  return [
    Call(width=width, size=sizes[width], rows=tuple(part))
    for width, same in _by_width(members, lengths, sizes)
    for part in _parts(same, sizes[width])
  ]


def _sizes(stages: Sequence[Sequence[int]], most: Mapping[int, int]) -> dict[int, int]:
  """The rows of the calls of each width, the same in all stages, so that they share programs.

  stages: the lengths in each. most: width -> rows.
  """
  counts = [collections.Counter(_width(length, most) for length in one) for one in stages]
  return {width: _size(max(c[width] for c in counts), rows) for width, rows in most.items()}


def _size(count: int, most: int) -> int:
  """Rows of a call, so that the fewest calls of one size hold all of them."""
  calls = -(-count // max(1, most))
  return -(-count // max(1, calls))


def _parts(items: Sequence, size: int) -> list[Sequence]:
  return [items[i : i + size] for i in range(0, len(items), size)]


def _width(length: int, chosen: Iterable[int]) -> int:
  return min(width for width in chosen if width >= length)


def _by_width(items, lengths, chosen):
  """(width, items) for each width that some of them need; they are in order of their lengths."""
  needed = [_width(length, chosen) for length in lengths]
  pairs = itertools.groupby(zip(needed, items, strict=True), key=lambda pair: pair[0])
  return [(width, [item for _, item in same]) for width, same in pairs]
