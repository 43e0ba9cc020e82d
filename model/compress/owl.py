"""OWL: blocks with more outliers keep more of their weights.

Yin et al. (2024), Outlier Weighed Layerwise Sparsity, https://arxiv.org/abs/2310.05175. The share
of a block's Wanda scores above `threshold` times their mean says how much of it may go: densities
differ by up to 2 * `reach` between the block with the most and the one with the least, and their
mean, weighted by parameters, is the density that was asked for. (The paper weighs blocks alike,
which is the same where they are equally large.)
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from model.compress.registry import PLAN, technique
from ops import sparse
from ops.linear import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwlSpec:
  """`sparsity` of all blocks together; `threshold` and `reach` are M and lambda of the paper."""

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
        f'a reach of {self.reach} could take the sparsity {self.sparsity} of a block out of 0 to 1'
      )


def share_out(survey, spec: OwlSpec) -> dict[str, float]:
  """The sparsity of each layer, from the (layer, w, statistics) of the whole model."""
  outliers, sizes, layers = collections.Counter(), collections.Counter(), {}
  for layer, w, statistics in survey:
    block = '.'.join(layer.split('.')[:2])
    layers[layer] = block
    outliers[block] += float(_outliers(w, statistics['input_norm'], spec.threshold)) * w.size
    sizes[block] += w.size
  blocks = list(sizes)
  share = np.array([outliers[block] / sizes[block] for block in blocks])
  size = np.array([sizes[block] for block in blocks], float)
  span = share.max() - share.min()
  more = 2 * spec.reach * (share - share.min()) / span if span else np.zeros(len(blocks))
  density = 1 - spec.sparsity + more - np.average(more, weights=size)
  sparsity = dict(zip(blocks, 1 - density, strict=True))
  return {layer: sparsity[block] for layer, block in layers.items()}


@jax.jit
def _outliers(w_IO, norm_I, threshold) -> jax.Array:
  """The share of scores above `threshold` times their mean."""
  score_IO = sparse.wanda_score(w_IO, norm_I)
  return (score_IO > threshold * score_IO.mean()).mean()


@technique(
  'owl',
  spec=OwlSpec,
  statistics=('input_norm',),
  paper='Yin et al. 2024, https://arxiv.org/abs/2310.05175',
  plan=share_out,
)
def owl(w, statistics, spec):
  """Drop weights by Wanda's score, fewer of them in blocks with many outliers."""
  del spec
  if isinstance(w, Weight):
    raise ValueError(f'owl prunes plain matrices, not a {type(w).__name__}; prune first')
  score_IO = sparse.wanda_score(w, statistics['input_norm'])
  dropped = jnp.round(statistics[PLAN] * score_IO.shape[0])
  return jnp.where(sparse.keep_highest(score_IO, dropped), w, 0)
