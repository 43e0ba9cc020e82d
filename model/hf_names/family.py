"""The format of a model family on disk: tables of names and one mapping of configs.

A row of a table maps modules, not tensors. The parameters of a module follow from the model itself,
so biases, gates and tied heads need no conditions here.

A family may have several layouts: its experts lie in a file one by one, or all in one tensor, or as
codes of few bits. Each layout is a table of its own; the first one is written where it can hold the
model, and the one that fits a checkpoint is read.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from model.config import ModelConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.sublayer import MixerConfig, SubLayerConfig
from ops.formats import FormatName

# The arrays of a module, and what their names end in on disk: as in modules of PyTorch, or in
# parameters that belong to the module above. Codes and their scales are arrays of one weight.
LEAVES = {'table': '.weight', 'scale': '.weight', 'weight': '.weight', 'bias': '.bias'}
CHOICE_BIAS = {'choice_bias': '.e_score_correction_bias'}
BARE = {'weight': '', 'bias': '_bias', 'logits': ''}
# How many axes each has; those of experts have one more in front.
RANKS = {'table': 2, 'scale': 1, 'weight': 2, 'bias': 1, 'logits': 1, 'choice_bias': 1}
RANKS |= {'weight.values': 2, 'weight.scales': 2, 'kernel': 2, 'log_rate': 1}


class Heads(NamedTuple):
  """How many heads the outputs of a module are divided into, and how many elements one has."""

  count: int
  width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec:
  """How arrays of ours are concatenated to one of theirs, along the outputs.

  transpose: theirs are (O, I), as in torch.nn.Linear; otherwise (I, O) like ours.
  interleaved: the parts alternate head by head (GPT-NeoX); otherwise they follow each other. A part
    may have more elements of a head than another (Qwen3-Next, DeepSeek).
  alternating: the parts alternate element by element (gpt-oss).
  paired: the two elements of a head that rotate together are neighbours (2i, 2i + 1), where ours
    are half a head apart (GGUF's llama).
  tail: the number of elements of a head of theirs, and how many of the last are `paired`.
  offset: a constant that theirs contain and ours do not (GGUF's Gemma: the 1 of the norm scales).
  block: theirs have the inputs in blocks of so many, (O, I / block, block).
  depthwise: theirs are kernels of a convolution that has one input per output, (O, 1, I).
  raw: theirs are bytes, the bits of what ours are.
  """

  transpose: bool = False
  interleaved: bool = False
  alternating: bool = False
  paired: bool = False
  tail: tuple[int, int] | None = None
  offset: float = 0.0
  block: int | None = None
  depthwise: bool = False
  raw: bool = False

  def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of theirs, from the shapes of ours."""
    *inputs, _ = shapes[0]
    outputs = sum(shape[-1] for shape in shapes)
    if self.block is not None:
      inputs = [inputs[0] // self.block, self.block]
    if self.depthwise:
      inputs = [1, *inputs]
    return (outputs, *inputs) if self.transpose else (*inputs, outputs)

  def join(self, arrays: list[np.ndarray], heads: Heads) -> np.ndarray:
    """Makes theirs from ours."""
    parts = [self._shifted(self._paired(self._turn(a), heads.width), self.offset) for a in arrays]
    if len(parts) == 1:
      joined = parts[0]
    elif count := self._runs(arrays[0].shape[-1], heads):
      joined = self._alternate(parts, count)
    else:
      joined = np.concatenate(parts, self._axis)
    joined = self._with_tails(joined, lambda width: (2, width // 2))
    joined = joined.view(np.uint8) if self.raw else joined
    return joined.reshape(self.shape([a.shape for a in arrays]))

  def split(self, array: np.ndarray, shapes: list[tuple[int, ...]], heads: Heads):
    """Makes ours from theirs, as views if possible; `shapes` are those of ours."""
    if self.block is not None or self.depthwise:
      array = array.reshape(len(array), -1)
    array = self._with_tails(array, lambda width: (width // 2, 2))
    sizes = np.array([shape[-1] for shape in shapes])
    if count := self._runs(sizes[0], heads):
      parts = self._taken_apart(array, sizes, count)
    else:
      parts = np.split(array, np.cumsum(sizes)[:-1], self._axis)
    return [self._shifted(self._turn(self._halved(p, heads.width)), -self.offset) for p in parts]

  def columns(self, shapes: Sequence[tuple[int, ...]], heads: Heads) -> list[np.ndarray] | None:
    """Which outputs of theirs each of ours consists of, in order.

    None: ours are other numbers than theirs, or the inputs lie in another order.
    """
    if self.offset or self.block is not None or self.depthwise or self.raw:
      return None
    places = np.arange(sum(shape[-1] for shape in shapes))
    parts = self.split(places[:, None] if self.transpose else places[None], list(shapes), heads)
    return [part.reshape(-1) for part in parts]

  def _runs(self, size: int, heads: Heads) -> int | None:
    """How many runs each part is divided into, if the parts alternate."""
    return size if self.alternating else heads.count if self.interleaved else None

  def _alternate(self, parts, count):
    parts = [np.moveaxis(part, self._axis, 0) for part in parts]
    rows = parts[0].shape[1:]
    joined = np.concatenate([p.reshape(count, -1, *rows) for p in parts], 1).reshape(-1, *rows)
    return np.moveaxis(joined, 0, self._axis)

  def _taken_apart(self, array, sizes, count):
    array = np.moveaxis(array, self._axis, 0)
    runs = array.reshape(count, -1, *array.shape[1:])
    parts = np.split(runs, np.cumsum(sizes // count)[:-1], 1)
    return [np.moveaxis(part.reshape(-1, *array.shape[1:]), 0, self._axis) for part in parts]

  def _with_tails(self, array, groups):
    """Moves the last rows of each head between neighbouring pairs and two halves."""
    if self.tail is None:
      return array
    head, width = self.tail
    array = np.moveaxis(array, self._axis, 0)
    front, back = np.split(array.reshape(-1, head, *array.shape[1:]), [head - width], axis=1)
    back = self._regroup(back.reshape(-1, *array.shape[1:]), groups(width)).reshape(back.shape)
    return np.moveaxis(np.concatenate([front, back], 1).reshape(array.shape), 0, self._axis)

  @property
  def _axis(self):
    return 0 if self.transpose else -1

  def _turn(self, array):
    return array.T if self.transpose else array

  def _halved(self, array, head_width):
    """Moves the rows of each head from neighbouring pairs to two halves."""
    return self._regroup(array, (head_width // 2, 2)) if self.paired else array

  def _paired(self, array, head_width):
    """The inverse of `_halved`."""
    return self._regroup(array, (2, head_width // 2)) if self.paired else array

  @staticmethod
  def _shifted(array, offset):
    return array + array.dtype.type(offset) if offset else array

  @staticmethod
  def _regroup(array, groups):
    rows = array.shape[1:]
    return array.reshape(-1, *groups, *rows).swapaxes(1, 2).reshape(array.shape)


PLAIN = Codec()
TRANSPOSE = Codec(transpose=True)
INTERLEAVED = Codec(transpose=True, interleaved=True)
DEPTHWISE = Codec(transpose=True, depthwise=True)
PAIRED = Codec(transpose=True, paired=True)


@dataclasses.dataclass(frozen=True)
class Row:
  """One module of theirs and the modules of ours in it.

  `{l}` stands for the number of the layer, and `{e}` for that of an expert, where theirs has the
  matrices of each expert by themselves. `stacked`: ours have experts, and theirs has all of them
  along a leading axis. Other rows are of modules without experts. A codec may depend on the mixer
  of the layer, where a head has several widths.
  kind: of a sub-layer; the row is one of layers that have such a one.
  """

  theirs: str
  ours: tuple[str, ...]
  codec: Codec | Callable[[MixerConfig], Codec] = PLAIN
  leaves: Mapping[str, str] = dataclasses.field(default_factory=lambda: LEAVES)
  stacked: bool = False
  kind: type[SubLayerConfig] = SubLayerConfig

  @property
  def of_experts(self) -> bool:
    return self.stacked or '{e}' in self.theirs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """One form of the tensors of a family.

  format: that of the weights whose codes and scales are tensors of their own; None: all weights are
    plain arrays.  keys: what config.json says of it.
  """

  rows: tuple[Row, ...]
  format: FormatName | None = None
  keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def count(self, stored: Collection[str]) -> int:
    """How many of the names on disk may be names of this layout."""
    patterns = (
      re.escape(row.theirs + leaf).replace(r'\{l\}', r'\d+').replace(r'\{e\}', r'\d+')
      for row in self.rows
      for leaf in row.leaves.values()
    )
    name = re.compile('|'.join(dict.fromkeys(patterns)))
    return sum(name.fullmatch(one) is not None for one in stored)


def _heads_of_attention(mixer: MixerConfig) -> Heads:
  return Heads(mixer.query_heads, mixer.head_width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A model family in the format of Hugging Face."""

  model_type: str
  architecture: str
  prefix: str  # of all names except the head's; bare checkpoints lack it
  rows: tuple[Row, ...]  # of the first layout
  config_from_hf: Callable[[dict], ModelConfig]
  config_to_hf: Callable[[ModelConfig], dict]  # without the keys that all families share
  ignored: tuple[str, ...] = ()  # regular expressions: buffers of this family alone
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name -> name in `rows`
  bos_in_windows: bool = False  # the model predicts badly where no BOS stands before the text
  kinds: tuple[type[SubLayerConfig], ...] = (AttentionConfig, FeedForwardConfig)  # of sub-layers
  heads: Callable[[MixerConfig], Heads] = _heads_of_attention  # that codecs count in
  others: tuple[Layout, ...] = ()  # further layouts

  @property
  def layouts(self) -> tuple[Layout, ...]:
    return (Layout(rows=self.rows), *self.others)

  def weight_of(self, module: str) -> str:
    """The name on disk of the weight of one of our modules outside the layers, such as 'head'."""
    return next(f'{row.theirs}.weight' for row in self.rows if row.ours == (module,))


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of theirs, and the parameters of ours that it consists of.

  expert: which expert of these parameters it is; None: they have no experts, or it has them all.
  stacked: it has them all; `shapes` are those of one.
  """

  theirs: str
  ours: tuple[str, ...]
  codec: Codec
  heads: Heads
  shape: tuple[int, ...]
  shapes: tuple[tuple[int, ...], ...]
  expert: int | None = None
  stacked: bool = False

  @property
  def of_experts(self) -> bool:
    return self.stacked or self.expert is not None

  def split(self, array: np.ndarray) -> list[np.ndarray]:
    if not self.stacked:
      return self.codec.split(array, self.shapes, self.heads)
    parts = zip(*(self.codec.split(one, self.shapes, self.heads) for one in array))
    return [np.stack(part) for part in parts]

  def join(self, arrays: list[np.ndarray]) -> np.ndarray:
    if not self.stacked:
      return self.codec.join(arrays, self.heads)
    return np.stack([self.codec.join(list(own), self.heads) for own in zip(*arrays)])


def entries(
  family: Family,
  config: ModelConfig,
  shapes: Mapping[str, tuple[int, ...]],
  layout: Layout | None = None,
) -> list[Entry]:
  """Pairs the arrays of a model, given as path -> shape, with the tensors of a checkpoint.

  `layout` is one of the family's, by default the first. Raises ValueError if it has no name for an
  array.
  """
  result, left = [], dict(shapes)
  for row in family.rows if layout is None else layout.rows:
    in_layers = '{l}' in row.theirs
    for l, layer in enumerate(config.layers if in_layers else config.layers[:1]):
      if not any(isinstance(part, row.kind) for part in layer.sublayers.values()):
        continue
      for leaf, their_leaf in row.leaves.items():
        rank = RANKS[leaf] + row.of_experts
        paths = tuple(f'{module.format(l=l)}.{leaf}' for module in row.ours)
        if all(path in left and len(left[path]) == rank for path in paths):
          own = tuple(left.pop(path) for path in paths)
          codec = row.codec if isinstance(row.codec, Codec) else row.codec(layer.mixer)
          heads = family.heads(layer.mixer)
          result += _of_module(row, codec, their_leaf, l, paths, own, heads)
  if left:
    raise ValueError(
      f'a {family.model_type} checkpoint has no names for {len(left)} parameters of this model: '
      f'{", ".join(list(left)[:20])}'
    )
  return result


def _of_module(row, codec, leaf, l, paths, shapes, heads) -> list[Entry]:
  """The tensors of theirs for arrays of ours: one, or one for each expert."""
  count = shapes[0][0]
  if row.of_experts:
    shapes = tuple(shape[1:] for shape in shapes)
  shape = codec.shape(list(shapes))
  common = {'ours': paths, 'codec': codec, 'heads': heads, 'shapes': shapes}
  name = lambda **numbers: row.theirs.format(l=l, **numbers) + leaf
  if row.stacked:
    return [Entry(theirs=name(), shape=(count, *shape), stacked=True, **common)]
  numbers = range(count) if row.of_experts else [None]
  return [Entry(theirs=name(e=e), shape=shape, expert=e, **common) for e in numbers]
