"""Stores the embedding as the product of two narrow matrices, exact where tokens are frequent.

The rows are projected to the R directions that keep the most of their squared lengths, each row
weighted by how often its token occurs: [V, D] becomes [V, R] and [R, D]. Weights are the counts
plus one, to a power; 0 is the plain truncated SVD, which the recipe step `low_rank` is too. Where
the embedding is also the head, so is the product, and the head errs more than the lookup does,
because each logit is compared with all others. Chen et al. 2018 (GroupReduce,
https://arxiv.org/abs/1806.06950) weight by frequency as well, in groups of tokens.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import units
from model.transformer import Transformer
from model.vocabulary import rows
from ops.low_rank import LowRankTensor
from ops.transposed import TransposedTensor

POWER = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What factoring did.

  error: the squared error of the rows over their squared lengths.  weighted_error: the same with
  the weights of the tokens.  numbers: those that the model holds, before and after.
  """

  rank: int
  error: float
  weighted_error: float
  numbers: tuple[int, int]


def factorise(
  model: Transformer, rank: int, counts: np.ndarray | None = None, *, power: float = POWER
) -> tuple[Transformer, Report]:
  """Returns a copy of the model whose embedding is a product of rank R.

  counts: occurrences of each token, of at most as many tokens as there are rows; None: all alike.
  Raises ValueError if the rank is not below the width, or the embedding is compressed already.
  """
  table = model.embedding.table.get_value()
  units.check_plain('embedding.table', table)
  tokens, width = table.shape
  if not 1 <= rank < width:
    raise ValueError(f'the rank must be at least 1 and below the width of {width}, not {rank}')
  weights_V = np.ones(tokens)
  if counts is not None:
    if len(counts) > tokens:
      counts = counts[:tokens]
    weights_V[: len(counts)] += counts
  weights_V = weights_V**power
  table_VD = np.asarray(table, np.float64)
  squares_DD = (table_VD * weights_V[:, None]).T @ table_VD
  _, directions_DD = np.linalg.eigh(squares_DD)
  basis_DR = directions_DD[:, ::-1][:, :rank]
  parts_VR = table_VD @ basis_DR
  lost_V = np.square(table_VD - parts_VR @ basis_DR.T).sum(1)
  length_V = np.square(table_VD).sum(1)
  result = nnx.clone(model)
  result.embedding.table.set_value(
    TransposedTensor(
      LowRankTensor(jnp.asarray(basis_DR, table.dtype), jnp.asarray(parts_VR.T, table.dtype))
    )
  )
  return result, Report(
    rank=rank,
    error=float(lost_V.sum() / length_V.sum()),
    weighted_error=float(weights_V @ lost_V / (weights_V @ length_V)),
    numbers=(rows.stored_count(model), rows.stored_count(result)),
  )
