"""Plans how many texts are read with few tokens and few programs.

Each text is read for the predictions after some of its last tokens. Texts that are equal, or of
which one begins with another, are one row. Rows that begin alike are a group: their common
beginning is read once into a cache, and each row goes on from there, such as the answers to one
question, or the questions after the same examples. The last token of a beginning comes before all
predictions that are wanted.

Reads are padded to a few widths, because each one is a program to compile. They are chosen so that
padding and compiling cost least together, where a program costs as much as `PROGRAM` tokens. By the
same cost, it is decided how long a beginning has to be, so that short ones are not shared where
that saves nothing. Rows that share nothing stand one after another in wider ones, as far as the
model tells documents in one row apart.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

Tokens = tuple[int, ...]

STEP = 8  # widths are multiples of it
PROGRAM = 2048  # tokens that are read in the time of compiling a program, for small models on CPUs
CACHED = 2  # tokens in caches for each token of a call
PACKED = 256  # tokens of the narrowest row that holds several texts
LEAST_SHARED = (16, 32, 64, 128, None)  # tokens of a beginning that is shared; None: none is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
  """Tokens to read, and the `targets` that follow each of them from number `wanted` on."""

  tokens: Tokens
  wanted: int
  targets: Tokens


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a row stands: from a column of a row of a call on, after a beginning of the stage."""

  number: int  # of the row
  row: int
  column: int = 0
  beginning: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """Rows that are read at once, in `size` rows of `width` tokens, of which some may be idle."""

  width: int
  size: int
  places: tuple[Place, ...]


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

  def start(self, place: Place) -> int:
    """The tokens of a row that are in the caches already."""
    return len(self.beginnings[place.beginning]) if self.beginnings else 0


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
      len(self.rows[place.number]) - stage.start(place)
      for stage in self.stages
      for call in stage.calls
      for place in call.places
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


def plan(texts: Sequence[Text], tokens: int, *, packs: bool = True) -> Plan:
  """Plans to read texts; a call reads at most `tokens` tokens at once, or one row.

  packs: whether several texts may stand in one row of a call.
  """
  rows, row_of = _rows([text.tokens for text in texts])
  wanted = [len(row) for row in rows]
  for text, row in zip(texts, row_of, strict=True):
    wanted[row] = min(wanted[row], text.wanted)
  plans = []
  for least in LEAST_SHARED:
    groups = _groups(rows, wanted, least)
    alone = [group.begin for group in groups if not group.shared]
    stages = [Stage(calls=(call,)) for call in _alone(rows, alone, tokens, packs)]
    plans.append(Plan(rows, row_of, (*_shared_stages(rows, groups, tokens), *stages)))
  return min(plans, key=lambda one: one.cost)


def widths(lengths: Sequence[int]) -> list[int]:
  """The multiples of `STEP` to which lengths are padded, so that tokens and programs cost least."""
  ceilings = sorted(map(_ceiling, lengths))
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


def _ceiling(length: int) -> int:
  return -(-length // STEP) * STEP


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


def _alone(rows, numbers: Sequence[int], tokens: int, packs: bool) -> list[Call]:
  """Calls that read rows from their first tokens on, the longest first."""
  numbers = sorted(numbers, key=lambda number: -len(rows[number]))
  lengths = [len(rows[number]) for number in numbers]
  if packs:
    bins = _packed(lengths)
  else:
    bins = [(width, [i]) for width, same in _by_width(range(len(numbers)), lengths) for i in same]
  calls = []
  for width, same in itertools.groupby(sorted(bins, key=lambda one: -one[0]), lambda one: one[0]):
    same = [members for _, members in same]
    size = _size(len(same), tokens // width)
    for part in _parts(same, size):
      places = []
      for row, members in enumerate(part):
        ends = [0, *itertools.accumulate(lengths[i] for i in members)]
        places += [Place(numbers[i], row, end) for i, end in zip(members, ends)]
      calls.append(Call(width=width, size=size, places=tuple(places)))
  return calls


def _packed(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
  """Puts texts of falling lengths into rows, each into the first that has room: (width, texts).

  A row that is opened for a text is as wide as a power of two times `PACKED`, or as all texts.
  """
  bins, most = [], _ceiling(sum(lengths))
  room = []  # (tokens that are left, texts) of each row that may take another one
  for i, length in enumerate(lengths):
    place = next((one for one in room if one[0] >= length), None)
    if place is None:
      width = PACKED << max(0, -(-length // PACKED) - 1).bit_length()
      place = [min(width, most), []]
      bins.append((place[0], place[1]))
      room.append(place)
    place[0] -= length
    place[1].append(i)
    room = [one for one in room if one[0] >= lengths[-1]] if place[0] < lengths[-1] else room
  return bins


def _shared_stages(rows, groups: Sequence[_Group], tokens: int) -> list[Stage]:
  groups = sorted((g for g in groups if g.shared), key=lambda g: -g.shared)
  stages = []
  for width, same in _by_width(groups, [g.shared for g in groups]):
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
      stages.append(Stage(**read, calls=tuple(_rests(own, lengths, sizes))))
  return stages


def _rests(members, lengths, sizes: Mapping[int, int]) -> list[Call]:
  """Calls that read so many tokens of each member, the longest first; sizes: width -> rows.

  members: the number of a row, and that of its beginning.
  """
  order = sorted(range(len(members)), key=lambda i: -lengths[i])
  members, lengths = [members[i] for i in order], [lengths[i] for i in order]
  return [
    Call(
      width=width,
      size=sizes[width],
      places=tuple(Place(number, row, beginning=at) for row, (number, at) in enumerate(part)),
    )
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


def _by_width(items, lengths, chosen=None):
  """(width, items) for each width that some need, in order of their lengths, of those chosen."""
  chosen = widths(lengths) if chosen is None else chosen
  needed = [_width(length, chosen) for length in lengths]
  pairs = itertools.groupby(zip(needed, items, strict=True), key=lambda pair: pair[0])
  return [(width, [item for _, item in same]) for width, same in pairs]
