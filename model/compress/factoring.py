"""Registers the factoring of a matrix into two narrow ones as a technique (ops/low_rank.py)."""

import dataclasses

from model.compress.registry import technique
from ops import low_rank
from ops.linear import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankSpec:
  """The rank, or the share of the numbers of the matrix that the two factors may take."""

  rank: int | None = None
  share: float = 0.5

  def __post_init__(self):
    if self.rank is not None and self.rank < 1:
      raise ValueError(f'a rank is at least 1, not {self.rank}')
    if not 0 < self.share <= 1:
      raise ValueError(f'a share is above 0 and at most 1, not {self.share}')

  def rank_of(self, inputs: int, outputs: int) -> int:
    if self.rank is not None:
      return self.rank
    return max(1, int(self.share * inputs * outputs / (inputs + outputs)))


@technique(
  'low_rank',
  spec=LowRankSpec,
  paper='Eckart and Young 1936, https://doi.org/10.1007/BF02288367',
)
def low_rank_product(w, statistics, spec):
  """Replace a matrix by a product of two narrow ones, by its singular vectors."""
  del statistics
  if isinstance(w, Weight):
    raise ValueError(f'low_rank takes plain matrices apart, not a {type(w).__name__}')
  return low_rank.factorise(w, spec.rank_of(*w.shape[-2:]))
