"""Implements the techniques without a solver: casting, rounding to nearest, pruning by a score."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from model.compress.registry import Outcome, pruning_score, technique
from ops import formats, quantized, sparse
from ops.linear import map_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class CastSpec:
  """The dtype in which floating-point parameters are stored."""

  dtype: Literal['bfloat16', 'float16', 'float32'] = 'bfloat16'

  def __post_init__(self):
    if self.dtype not in ('bfloat16', 'float16', 'float32'):
      raise ValueError(f'cast takes bfloat16, float16 and float32, not {self.dtype!r}')


@technique(
  'cast',
  spec=CastSpec,
  paper='Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740',
  scope='parameters',
)
def cast(w, statistics, spec):
  """Store every parameter in another floating-point type."""
  del statistics
  overflow = []

  def narrow(values):
    result = values.astype(spec.dtype)
    overflow.append(jnp.sum(jnp.isinf(result) & ~jnp.isinf(values)))
    return result

  return Outcome(map_values(narrow, w), {'weights past the range of the type': sum(overflow)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeSpec:
  """A storage format of ops/quantized.py; the fields are the arguments of its `quantize`."""

  format: quantized.FormatName = 'int8'
  group_size: int | None = None
  symmetric: bool = True
  double: bool = False
  clip: quantized.Clip = 'none'

  def __post_init__(self):
    formats.check_form(**dataclasses.asdict(self))
    if self.group_size is not None and self.group_size < 1 and self.group_size != -1:
      raise ValueError(f'a group size is positive, or -1 for a whole column, not {self.group_size}')


def other_group(usual: int | None, group: int, inputs: int) -> dict[str, int]:
  """Returns the event that a group size other than the usual one is used, or no event."""
  if usual in (None, group):
    return {}
  return {f'group size, because {usual} does not divide {inputs} inputs': group}


@technique(
  'round_to_nearest',
  spec=QuantizeSpec,
  paper='Krishnamoorthi 2018, https://arxiv.org/abs/1806.08342',
)
def round_to_nearest(w, statistics, spec):
  """Round every weight to the nearest value of a low-bit format."""
  del statistics
  events = {}

  def quantize(values):
    usual = quantized.FORMATS[spec.format].default_group
    group = quantized.resolve_group(spec.format, values.shape[0], spec.group_size)
    if spec.group_size is None:
      events.update(other_group(usual, group, values.shape[0]))
    return quantized.quantize(values, **dataclasses.asdict(spec))

  return Outcome(map_values(quantize, w), events)


@pruning_score(
  'magnitude',
  paper='Han et al. 2015, https://arxiv.org/abs/1506.02626',
)
def magnitude(w_IO: jax.Array, statistics) -> jax.Array:
  """Drop the weights of smallest magnitude."""
  del statistics
  return sparse.magnitude_score(w_IO)


@pruning_score(
  'wanda',
  statistics=('input_norm',),
  paper='Sun et al. 2023, https://arxiv.org/abs/2306.11695',
)
def wanda(w_IO: jax.Array, statistics) -> jax.Array:
  """Drop the weights with the smallest product of magnitude and input norm."""
  return sparse.wanda_score(w_IO, statistics['input_norm'])
