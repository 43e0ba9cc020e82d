"""What a model family is on disk: one table of names and one mapping of configs.

A row maps modules, not tensors: which parameters a module has follows from the model itself, so
biases, gates and tied heads need no conditions here.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from model.config import ModelConfig

# The names of a module's parameters, ours and those of PyTorch.
LEAVES = {'table': 'weight', 'scale': 'weight', 'weight': 'weight', 'bias': 'bias'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec:
  """How arrays of ours lie inside one of theirs: side by side along the outputs.

  transpose: theirs are (O, I), as in torch.nn.Linear; else (I, O) like ours.
  interleaved: the outputs alternate head by head, not part by part (GPT-NeoX).
  """

  transpose: bool = False
  interleaved: bool = False

  def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of theirs, from the shapes of ours."""
    *inputs, _ = shapes[0]
    outputs = sum(shape[-1] for shape in shapes)
    return (outputs, *inputs) if self.transpose else (*inputs, outputs)

  def join(self, arrays: list[np.ndarray], heads: int) -> np.ndarray:
    """Theirs from ours; `heads` is the number of heads that interleave."""
    if len(arrays) == 1:
      return self._turn(arrays[0])
    parts = [self._turn(a) for a in arrays]
    if not self.interleaved:
      return np.concatenate(parts, self._axis)
    rows = parts[0].shape[1:]
    return np.stack([p.reshape(heads, -1, *rows) for p in parts], 1).reshape(-1, *rows)

  def split(self, array: np.ndarray, shapes: list[tuple[int, ...]], heads: int):
    """Ours from theirs, as views where possible; `shapes` are those of ours."""
    if not self.interleaved:
      ends = np.cumsum([shape[-1] for shape in shapes])[:-1]
      return [self._turn(part) for part in np.split(array, ends, self._axis)]
    rows = array.shape[1:]
    parts = array.reshape(heads, len(shapes), -1, *rows)
    return [self._turn(parts[:, i].reshape(-1, *rows)) for i in range(len(shapes))]

  @property
  def _axis(self):
    return 0 if self.transpose else -1

  def _turn(self, array):
    return array.T if self.transpose else array


PLAIN = Codec()
TRANSPOSE = Codec(transpose=True)
INTERLEAVED = Codec(transpose=True, interleaved=True)


@dataclasses.dataclass(frozen=True)
class Row:
  """One module of theirs and the modules of ours that it holds; `{l}` stands for the layer."""

  theirs: str
  ours: tuple[str, ...]
  codec: Codec = PLAIN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A model family in the format of Hugging Face."""

  model_type: str
  architecture: str
  prefix: str  # of all names but the head; bare checkpoints lack it
  rows: tuple[Row, ...]
  ignored: tuple[str, ...]  # regular expressions: buffers that older checkpoints store
  config_from_hf: Callable[[dict], ModelConfig]
  config_to_hf: Callable[[ModelConfig], dict]  # without the keys that all families share
  bos_in_windows: bool = False  # the model predicts badly where no BOS stands before the text

  def weight_of(self, module: str) -> str:
    """The name on disk of the weight of one of our modules outside the layers, such as 'head'."""
    return next(f'{row.theirs}.weight' for row in self.rows if row.ours == (module,))


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of theirs, and the parameters of ours that it is made of."""

  theirs: str
  ours: tuple[str, ...]
  codec: Codec
  heads: int
  shape: tuple[int, ...]
  shapes: tuple[tuple[int, ...], ...]

  def split(self, array: np.ndarray) -> list[np.ndarray]:
    return self.codec.split(array, self.shapes, self.heads)

  def join(self, arrays: list[np.ndarray]) -> np.ndarray:
    return self.codec.join(arrays, self.heads)


def entries(
  family: Family, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> list[Entry]:
  """Pairs the parameters of a model, given as path -> shape, with the tensors of a checkpoint.

  Raises ValueError where the family has no name for a parameter.
  """
  result, left = [], dict(shapes)
  for row in family.rows:
    in_layers = '{l}' in row.theirs
    for l in range(len(config.layers) if in_layers else 1):
      for leaf, their_leaf in LEAVES.items():
        paths = tuple(f'{module.format(l=l)}.{leaf}' for module in row.ours)
        if all(path in left for path in paths):
          own = tuple(left.pop(path) for path in paths)
          name = f'{row.theirs.format(l=l)}.{their_leaf}'
          heads = config.layers[l].query_heads
          result.append(Entry(name, paths, row.codec, heads, row.codec.shape(own), own))
  if left:
    raise ValueError(
      f'a {family.model_type} checkpoint has no names for {len(left)} parameters of this model: '
      f'{", ".join(list(left)[:20])}'
    )
  return result
