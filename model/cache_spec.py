"""Describes the caches of a model: the format of numbers, and which tokens stay if not all do.

  int8                 all tokens, in int8
  h2o512               512 tokens for each layer and key/value head, in the dtype of the model
  int8+snapkv1024      both

Formats are float, bf16, int8 and int4; policies are in `model.layers.mixers.policies`, and the
number after one is how many tokens stay, the new one included. Pages of int4 have no eviction,
because codes of 32 tokens share their scales.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import get_args

from model.layers.cache import CacheFormat
from model.layers.mixers.policies import METHODS
from model.layers.mixers.sides import SIDES

FORMATS = get_args(CacheFormat)
_FORM = re.compile(
  rf'((?P<format>{"|".join(FORMATS)})\+)?(?P<method>{"|".join(METHODS)})(?P<budget>[0-9]+)'
)
FORMS = f'{", ".join(FORMATS)}, and {", ".join(f"{name}512" for name in METHODS)} or int8+h2o512'


@dataclasses.dataclass(frozen=True)
class Eviction:
  """A policy by its name, and how many tokens it keeps."""

  method: str
  budget: int

  def __post_init__(self):
    if self.method not in METHODS:
      names = ', '.join(METHODS)
      raise ValueError(f'{self.method!r} is no policy of eviction; there are {names}')
    least = METHODS[self.method].least
    if self.budget < least:
      raise ValueError(f'{self.method} keeps at least {least} tokens, not {self.budget}')

  def budgets(self, layers: int) -> Sequence[int]:
    """How many tokens each layer keeps, for this number of layers."""
    return METHODS[self.method].budgets(self.budget, layers)

  def __str__(self):
    return f'{self.method}{self.budget}'


@dataclasses.dataclass(frozen=True)
class CacheSpec:
  """A format and, where not all tokens stay, a policy."""

  format: CacheFormat = 'float'
  eviction: Eviction | None = None

  def __post_init__(self):
    if self.format not in FORMATS:
      raise ValueError(f'{self.format!r} is not a cache format; the formats are {FORMS}')
    if self.eviction is not None and self.format not in SIDES:
      raise ValueError(
        f'{self.format} stores whole pages, from which {self.eviction} cannot take tokens; '
        f'use one of {", ".join(SIDES)}'
      )

  def __str__(self):
    return '+'.join(map(str, filter(None, (self.format, self.eviction))))


def of(spec: CacheSpec | str) -> CacheSpec:
  """Parses a text such as 'int8+snapkv1024'. Raises ValueError if it is not valid."""
  if isinstance(spec, CacheSpec):
    return spec
  found = _FORM.fullmatch(spec)
  if found is None:
    return CacheSpec(spec)
  return CacheSpec(found['format'] or 'float', Eviction(found['method'], int(found['budget'])))
