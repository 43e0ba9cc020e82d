"""The format of a model family on disk: one table of names and one mapping of configs.

A row of the table maps modules, not tensors. The parameters of a module follow from the model
itself, so biases, gates and tied heads need no conditions here.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from model.config import ModelConfig
from model.layers.attention import AttentionConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.sublayer import SubLayerConfig

# The names of a module's parameters, ours and those of PyTorch.
LEAVES = {'table': 'weight', 'scale': 'weight', 'weight': 'weight', 'bias': 'bias'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec:
  """How arrays of ours are concatenated to one of theirs, along the outputs.

  transpose: theirs are (O, I), as in torch.nn.Linear; otherwise (I, O) like ours.
  interleaved: the parts alternate head by head (GPT-NeoX); otherwise they follow each other.
  paired: the two elements of a head that rotate together are neighbours (2i, 2i + 1), where ours
    are half a head apart (GGUF's llama).
  offset: a constant that theirs contain and ours do not (GGUF's Gemma: the 1 of the norm scales).
  """

  transpose: bool = False
  interleaved: bool = False
  paired: bool = False
  offset: float = 0.0

  def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of theirs, from the shapes of ours."""
    *inputs, _ = shapes[0]
    outputs = sum(shape[-1] for shape in shapes)
    return (outputs, *inputs) if self.transpose else (*inputs, outputs)

  def join(self, arrays: list[np.ndarray], head_width: int) -> np.ndarray:
    """Makes theirs from ours."""
    parts = [self._shifted(self._paired(self._turn(a), head_width), self.offset) for a in arrays]
    if len(parts) == 1:
      return parts[0]
    if not self.interleaved:
      return np.concatenate(parts, self._axis)
    rows = parts[0].shape[1:]
    return np.stack([p.reshape(-1, head_width, *rows) for p in parts], 1).reshape(-1, *rows)

  def split(self, array: np.ndarray, shapes: list[tuple[int, ...]], head_width: int):
    """Makes ours from theirs, as views if possible; `shapes` are those of ours."""
    if self.interleaved:
      rows = array.shape[1:]
      heads = array.reshape(-1, len(shapes), head_width, *rows)
      parts = [heads[:, i].reshape(-1, *rows) for i in range(len(shapes))]
    else:
      ends = np.cumsum([shape[-1] for shape in shapes])[:-1]
      parts = np.split(array, ends, self._axis)
    return [self._shifted(self._turn(self._halved(p, head_width)), -self.offset) for p in parts]

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
  matrices of each expert by themselves.
  """

  theirs: str
  ours: tuple[str, ...]
  codec: Codec = PLAIN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A model family in the format of Hugging Face."""

  model_type: str
  architecture: str
  prefix: str  # of all names except the head's; bare checkpoints lack it
  rows: tuple[Row, ...]
  config_from_hf: Callable[[dict], ModelConfig]
  config_to_hf: Callable[[ModelConfig], dict]  # without the keys that all families share
  ignored: tuple[str, ...] = ()  # regular expressions: buffers of this family alone
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name -> name in `rows`
  bos_in_windows: bool = False  # the model predicts badly where no BOS stands before the text
  kinds: tuple[type[SubLayerConfig], ...] = (AttentionConfig, FeedForwardConfig)  # of sub-layers

  def weight_of(self, module: str) -> str:
    """The name on disk of the weight of one of our modules outside the layers, such as 'head'."""
    return next(f'{row.theirs}.weight' for row in self.rows if row.ours == (module,))


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of theirs, and the parameters of ours that it consists of.

  expert: which expert of these parameters it is; None: they have no experts, or it has them all.
  """

  theirs: str
  ours: tuple[str, ...]
  codec: Codec
  head_width: int
  shape: tuple[int, ...]
  shapes: tuple[tuple[int, ...], ...]
  expert: int | None = None

  def split(self, array: np.ndarray) -> list[np.ndarray]:
    return self.codec.split(array, self.shapes, self.head_width)

  def join(self, arrays: list[np.ndarray]) -> np.ndarray:
    return self.codec.join(arrays, self.head_width)


def entries(
  family: Family, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> list[Entry]:
  """Pairs the parameters of a model, given as path -> shape, with the tensors of a checkpoint.

  Raises ValueError if the family has no name for a parameter.
  """
  result, left = [], dict(shapes)
  for row in family.rows:
    in_layers = '{l}' in row.theirs
    for l in range(len(config.layers) if in_layers else 1):
      for leaf, their_leaf in LEAVES.items():
        paths = tuple(f'{module.format(l=l)}.{leaf}' for module in row.ours)
        if all(path in left for path in paths):
          own = tuple(left.pop(path) for path in paths)
          result += _of_module(row, f'.{their_leaf}', l, paths, own, config)
  if left:
    raise ValueError(
      f'a {family.model_type} checkpoint has no names for {len(left)} parameters of this model: '
      f'{", ".join(list(left)[:20])}'
    )
  return result


def _of_module(row, leaf, l, paths, shapes, config) -> list[Entry]:
  """The tensors of theirs for parameters of ours: one, or one for each expert."""
  width, numbers = config.layers[l].mixer.head_width, [None]
  if '{e}' in row.theirs:
    numbers, shapes = range(shapes[0][0]), tuple(shape[1:] for shape in shapes)
  shape = row.codec.shape(list(shapes))
  return [
    Entry(row.theirs.format(l=l, e=e) + leaf, paths, row.codec, width, shape, shapes, e)
    for e in numbers
  ]
