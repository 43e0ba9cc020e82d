"""The format of a model family on disk: tables of names and one mapping of configs.

A row of a table maps modules, not tensors. The parameters of a module follow from the model itself,
so biases, gates and tied heads need no conditions here.

A family may have several layouts: its experts lie in a file one by one, or all in one tensor, or as
codes of few bits. Each layout is a table of its own; the first one is written where it can hold the
model, and the one that fits a checkpoint is read.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

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
RANKS |= {'weight.values': 2, 'weight.scales': 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec:
  """How arrays of ours are concatenated to one of theirs, along the outputs.

  transpose: theirs are (O, I), as in torch.nn.Linear; otherwise (I, O) like ours.
  interleaved: the parts alternate head by head (GPT-NeoX); otherwise they follow each other.
  alternating: the parts alternate element by element (gpt-oss).
  paired: the two elements of a head that rotate together are neighbours (2i, 2i + 1), where ours
    are half a head apart (GGUF's llama).
  runs: the parts alternate head by head, with so many elements of each (DeepSeek).
  tail: the number of elements of a head of theirs, and how many of the last are `paired`.
  offset: a constant that theirs contain and ours do not (GGUF's Gemma: the 1 of the norm scales).
  block: theirs have the inputs in blocks of so many, (O, I / block, block).
  raw: theirs are bytes, the bits of what ours are.
  """

  transpose: bool = False
  interleaved: bool = False
  alternating: bool = False
  paired: bool = False
  runs: tuple[int, ...] | None = None
  tail: tuple[int, int] | None = None
  offset: float = 0.0
  block: int | None = None
  raw: bool = False

  def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of theirs, from the shapes of ours."""
    *inputs, _ = shapes[0]
    outputs = sum(shape[-1] for shape in shapes)
    if self.block is not None:
      inputs = [inputs[0] // self.block, self.block]
    return (outputs, *inputs) if self.transpose else (*inputs, outputs)

  def join(self, arrays: list[np.ndarray], head_width: int) -> np.ndarray:
    """Makes theirs from ours."""
    parts = [self._shifted(self._paired(self._turn(a), head_width), self.offset) for a in arrays]
    if len(parts) == 1:
      joined = parts[0]
    elif runs := self._runs(head_width, len(parts)):
      joined = self._alternate(parts, runs)
    else:
      joined = np.concatenate(parts, self._axis)
    joined = self._with_tails(joined, lambda width: (2, width // 2))
    joined = joined.view(np.uint8) if self.raw else joined
    return joined.reshape(self.shape([a.shape for a in arrays]))

  def split(self, array: np.ndarray, shapes: list[tuple[int, ...]], head_width: int):
    """Makes ours from theirs, as views if possible; `shapes` are those of ours."""
    if self.block is not None:
      array = array.reshape(len(array), -1)
    array = self._with_tails(array, lambda width: (width // 2, 2))
    if runs := self._runs(head_width, len(shapes)):
      parts = self._taken_apart(array, runs)
    else:
      ends = np.cumsum([shape[-1] for shape in shapes])[:-1]
      parts = np.split(array, ends, self._axis)
    return [self._shifted(self._turn(self._halved(p, head_width)), -self.offset) for p in parts]

  def _runs(self, head_width, count) -> tuple[int, ...] | None:
    """How many elements of each part follow each other, if the parts alternate."""
    if self.alternating or self.interleaved:
      return (1 if self.alternating else head_width,) * count
    return self.runs

  def _alternate(self, parts, runs):
    parts = [np.moveaxis(part, self._axis, 0) for part in parts]
    rows = parts[0].shape[1:]
    heads = [part.reshape(-1, run, *rows) for part, run in zip(parts, runs, strict=True)]
    return np.moveaxis(np.concatenate(heads, 1).reshape(-1, *rows), 0, self._axis)

  def _taken_apart(self, array, runs):
    array = np.moveaxis(array, self._axis, 0)
    heads = array.reshape(-1, sum(runs), *array.shape[1:])
    parts = np.split(heads, np.cumsum(runs)[:-1], axis=1)
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
PAIRED = Codec(transpose=True, paired=True)


@dataclasses.dataclass(frozen=True)
class Row:
  """One module of theirs and the modules of ours in it.

  `{l}` stands for the number of the layer, and `{e}` for that of an expert, where theirs has the
  matrices of each expert by themselves. `stacked`: ours have experts, and theirs has all of them
  along a leading axis. Other rows are of modules without experts. A codec may depend on the mixer
  of the layer, where a head has several widths.
  """

  theirs: str
  ours: tuple[str, ...]
  codec: Codec | Callable[[MixerConfig], Codec] = PLAIN
  leaves: Mapping[str, str] = dataclasses.field(default_factory=lambda: LEAVES)
  stacked: bool = False

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
  head_width: int
  shape: tuple[int, ...]
  shapes: tuple[tuple[int, ...], ...]
  expert: int | None = None
  stacked: bool = False

  @property
  def of_experts(self) -> bool:
    return self.stacked or self.expert is not None

  def split(self, array: np.ndarray) -> list[np.ndarray]:
    if not self.stacked:
      return self.codec.split(array, self.shapes, self.head_width)
    parts = zip(*(self.codec.split(one, self.shapes, self.head_width) for one in array))
    return [np.stack(part) for part in parts]

  def join(self, arrays: list[np.ndarray]) -> np.ndarray:
    if not self.stacked:
      return self.codec.join(arrays, self.head_width)
    return np.stack([self.codec.join(list(own), self.head_width) for own in zip(*arrays)])


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
    for l in range(len(config.layers) if in_layers else 1):
      for leaf, their_leaf in row.leaves.items():
        rank = RANKS[leaf] + row.of_experts
        paths = tuple(f'{module.format(l=l)}.{leaf}' for module in row.ours)
        if all(path in left and len(left[path]) == rank for path in paths):
          own = tuple(left.pop(path) for path in paths)
          result += _of_module(row, their_leaf, l, paths, own, config)
  if left:
    raise ValueError(
      f'a {family.model_type} checkpoint has no names for {len(left)} parameters of this model: '
      f'{", ".join(list(left)[:20])}'
    )
  return result


def _of_module(row, leaf, l, paths, shapes, config) -> list[Entry]:
  """The tensors of theirs for arrays of ours: one, or one for each expert."""
  mixer, count = config.layers[l].mixer, shapes[0][0]
  codec = row.codec if isinstance(row.codec, Codec) else row.codec(mixer)
  if row.of_experts:
    shapes = tuple(shape[1:] for shape in shapes)
  shape = codec.shape(list(shapes))
  common = {'ours': paths, 'codec': codec, 'head_width': mixer.head_width, 'shapes': shapes}
  name = lambda **numbers: row.theirs.format(l=l, **numbers) + leaf
  if row.stacked:
    return [Entry(theirs=name(), shape=(count, *shape), stacked=True, **common)]
  numbers = range(count) if row.of_experts else [None]
  return [Entry(theirs=name(e=e), shape=shape, expert=e, **common) for e in numbers]
