"""Students: smaller models that begin with a teacher's layers, or at random in its shape.

DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108) takes layers 0, 2, 4, 7, 9 and 11 of
12, with the embeddings and the head. These are the nearest layers to six points spread evenly from
the first to the last; `spread` applies this rule to other depths. In the paper, starting at random
costs more (3.69 points of GLUE) than leaving out any part of the loss.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.layers import lending
from model.transformer import Transformer


def spread(count: int, depth: int) -> tuple[int, ...]:
  """Chooses `count` of `depth` layers: the nearest to even steps from the first to the last.

  A point in the middle of two layers takes the higher one. A single layer is the first.
  """
  if not 1 <= count <= depth:
    raise ValueError(f'a student has between 1 and all {depth} layers of its teacher, not {count}')
  if count == 1:
    return (0,)
  # In integers: the floor of i (depth - 1) / (count - 1) + 1/2.
  return tuple((2 * i * (depth - 1) + count - 1) // (2 * (count - 1)) for i in range(count))


def from_layers(teacher: Transformer, layers: int | Sequence[int]) -> Transformer:
  """Builds a student from copies of a teacher's layers, embeddings, final norm and head.

  `layers` is a number, for the rule of `spread`, or the indices themselves, in the order in which
  the student runs them. Weights keep their types and dtypes. Raises ValueError for other indices.
  """
  chosen = _chosen(teacher, layers)
  student = _copy(teacher)
  student.config = _config(teacher, chosen)
  student.layers = nnx.List([_copy(teacher.layers[index]) for index in chosen])
  return student


def at_random(teacher: Transformer, layers: int | Sequence[int], *, seed: int = 0) -> Transformer:
  """Builds a student with new weights and the shape that `from_layers` would give it."""
  config = _config(teacher, _chosen(teacher, layers))
  return Transformer(config, rngs=nnx.Rngs(seed), dtype=teacher.dtype)


def _chosen(teacher: Transformer, layers: int | Sequence[int]) -> tuple[int, ...]:
  depth = len(teacher.layers)
  chosen = spread(layers, depth) if isinstance(layers, int) else tuple(layers)
  if not chosen or not all(0 <= index < depth for index in chosen):
    raise ValueError(f'the teacher has the layers 0 to {depth - 1}; {list(chosen)} are not of them')
  lending.check_kept(teacher.config.layers, chosen)
  return chosen


def _config(teacher: Transformer, chosen: Sequence[int]) -> ModelConfig:
  return teacher.config.replace(layers=tuple(teacher.config.layers[index] for index in chosen))


def _copy(module: nnx.Module):
  """The same module with arrays of its own: a teacher is read while its student is trained."""
  graphdef, state = nnx.split(module)
  return nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
