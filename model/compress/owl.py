"""Prunes by OWL, which keeps more weights in the blocks that have more outliers.

Yin et al. (2024), Outlier Weighed Layerwise Sparsity, https://arxiv.org/abs/2310.05175. The outlier
ratio of a block is the fraction of its Wanda scores above `threshold` times their mean. The density
(1 - sparsity) of a block is a linear function of its outlier ratio: the highest and the lowest
density differ by 2 * `reach`, and their mean, weighted by parameters, is the requested density. The
paper gives all blocks the same weight, which is equal for blocks of equal size. All matrices of a
block have the same sparsity, and are pruned by Wanda or by SparseGPT.

The densities span 2 * `reach` however little the outlier ratios differ. In a model of few blocks,
the block with the fewest outliers is therefore pruned much harder, even where that costs quality.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from model.compress import obs
from model.compress.registry import PLAN, PREPARED, technique
from ops import experts, sparse
from ops.linear import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwlSpec:
  """`sparsity` of all blocks together; `threshold` and `reach` are the paper's M and lambda."""

  sparsity: float = 0.7
  threshold: float = 5.0
  reach: float = 0.08

  def __post_init__(self):
    if not 0 < self.sparsity < 1:
      raise ValueError(f'a sparsity is between 0 and 1, not {self.sparsity}')
    if self.threshold <= 0:
      raise ValueError(f'the threshold is a multiple of the mean above 0, not {self.threshold}')
    if self.reach < 0 or 2 * self.reach > min(self.sparsity, 1 - self.sparsity):
      raise ValueError(
        f'a reach of {self.reach} could move the sparsity {self.sparsity} of a block out of 0 to 1'
      )


def share_out(survey, spec: OwlSpec) -> dict[str, float]:
  """Computes the sparsity of each layer from the (layer, w, statistics) of the whole model."""
  share, size, layers = [], [], []
  for _, members in itertools.groupby(survey, key=lambda row: _block(row[0])):
    names, weights, statistics = zip(*members, strict=True)
    norms = [measured['input_norm'] for measured in statistics]
    share.append(float(_outliers(weights, norms, spec.threshold)))
    size.append(float(sum(w.size for w in weights)))
    layers.append(names)
  share = np.array(share)
  span = share.max() - share.min()
  more = 2 * spec.reach * (share - share.min()) / span if span else np.zeros(len(share))
  density = 1 - spec.sparsity + more - np.average(more, weights=size)
  return {layer: 1 - kept for names, kept in zip(layers, density, strict=True) for layer in names}


def _block(layer: str) -> str:
  """Returns the path of a layer's block, such as 'layers.3'."""
  return '.'.join(layer.split('.')[:2])


@jax.jit
def _outliers(weights, norms, threshold) -> jax.Array:
  """Returns the fraction of a block's scores that exceed `threshold` times their mean."""
  scores = [_score(w, norm) for w, norm in zip(weights, norms, strict=True)]
  count = sum(score_IO.size for score_IO in scores)
  limit = threshold * sum(score_IO.sum() for score_IO in scores) / count
  return sum((score_IO > limit).sum() for score_IO in scores) / count


def _score(w, norm) -> jax.Array:
  score = sparse.wanda_score if experts.count(w) is None else jax.vmap(sparse.wanda_score)
  return score(w, norm)


@technique(
  'owl',
  spec=OwlSpec,
  statistics=('input_norm',),
  paper='Yin et al. 2024, https://arxiv.org/abs/2310.05175',
  plan=share_out,
  prunes=True,
)
def owl(w, statistics, spec):
  """Prune by Wanda's score, with a lower sparsity in blocks with more outliers."""
  del spec
  if isinstance(w, Weight):
    raise ValueError(f'owl prunes plain matrices, not a {type(w).__name__}; prune first')
  score_IO = sparse.wanda_score(w, statistics['input_norm'])
  dropped = jnp.round(statistics[PLAN] * score_IO.shape[0])
  return jnp.where(sparse.keep_highest(score_IO, dropped), w, 0)


@technique(
  'owl_sparsegpt',
  spec=OwlSpec,
  statistics=('input_norm', 'input_covariance'),
  paper='Yin et al. 2024, https://arxiv.org/abs/2310.05175',
  plan=share_out,
  prepare=lambda statistics, spec: obs.prepare(statistics, obs.SparseGptSpec()),
  prunes=True,
)
def owl_sparsegpt(w, statistics, spec):
  """Prune by SparseGPT, with a lower sparsity in blocks with more outliers."""
  del spec
  return obs.prune(w, statistics[PREPARED], obs.SparseGptSpec(), statistics[PLAN])
