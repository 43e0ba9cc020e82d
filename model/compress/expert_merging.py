"""Merges similar experts into one with their average weights.

After Li et al. (2023), MC-SMoE, https://arxiv.org/abs/2310.01334. The experts that most tokens
choose stay, and every other one joins the most similar of them. Experts are similar if the router
gives them similar logits on calibration text, or if their outputs are similar there: the cosine
over all tokens. The channels of an expert are first put into the order that fits those of the
expert it joins, by an assignment of the largest sum of scalar products (Ainsworth et al. 2022,
https://arxiv.org/abs/2209.04836), because experts that compute the same may have their channels in
another order. Then all weights are averaged, by how many tokens chose each expert.

Differs from the paper: it keeps the router, so that merged experts still get two logits of their
own; here the columns of the router are averaged like all other weights, and what is left is a plain
model with fewer experts. Every layer loses the same share of its experts. There is no further
decomposition of the merged experts. The assignment takes time cubic in the width of an expert.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
import scipy.optimize

from model import units
from model.compress import expert_pruning
from model.compress.expert_pruning import ExpertSpec
from model.compress.expert_use import ExpertUse
from model.compress.registry import Reshaped, technique
from model.transformer import Transformer, parameters

Similarity = Literal['logits', 'outputs']
Letters = Mapping[str, tuple[str, ...]]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeSpec(ExpertSpec):
  """How many experts are merged into others, and how they are compared."""

  similarity: Similarity = 'logits'


@technique(
  'merge_experts',
  spec=MergeSpec,
  paper='Li et al. 2023, https://arxiv.org/abs/2310.01334',
  scope='shape',
  check=expert_pruning.check,
  reshapes=expert_pruning.reshapes,
  calibrates=lambda spec: True,
)
def merge_experts(model, measurements, spec):
  """Merge experts into similar ones that more tokens choose."""
  uses = measurements.experts(outputs=spec.similarity == 'outputs')
  values = {path: param.get_value() for path, param in parameters(model).items()}
  events, counts = {}, {}
  for l, ffn in expert_pruning.routed(model.config).items():
    counts[l] = expert_pruning.remaining(ffn, spec.ratio)
    families = grouped(uses[l], ffn, counts[l], spec.similarity)
    values |= merged(model, l, families, uses[l].rows_E)
    joined = [' + '.join(map(str, family)) for family in families if len(family) > 1]
    named = f'experts merged into others, of {ffn.experts}: {", ".join(joined)}'
    events[f'layers.{l}'] = {named: ffn.experts - counts[l]}
  config = expert_pruning.with_experts(model.config, counts)
  return Reshaped(config=config, parameters=values, events=events)


def grouped(use: ExpertUse, ffn, count: int, similarity: Similarity) -> list[list[int]]:
  """The families of experts that become one, in increasing order of their heads.

  The first of each is its head, the one that most tokens chose. A family lies within a group of the
  router.
  """
  heads = expert_pruning.best(use.rows_E, ffn.router, count)
  families = {int(head): [int(head)] for head in heads}
  similar_EE = _cosines(use.logits_EE if similarity == 'logits' else use.outputs_EE)
  size = ffn.experts // ffn.router.groups
  for e in sorted(set(range(ffn.experts)) - families.keys()):
    near = [head for head in families if head // size == e // size]
    families[max(near, key=lambda head, e=e: similar_EE[e, head])].append(e)
  return list(families.values())


def _cosines(products_EE) -> np.ndarray:
  lengths_E = np.sqrt(np.maximum(np.diagonal(products_EE), np.finfo(np.float64).tiny))
  return products_EE / (lengths_E[:, None] * lengths_E[None])


def merged(
  model: Transformer, l: int, families: Sequence[Sequence[int]], rows_E: np.ndarray
) -> dict[str, jnp.ndarray]:
  """The parameters of one layer that have an axis of experts, with one expert for each family."""
  letters = {path: names for path, names in units.letters(model).items() if 'E' in names}
  params = parameters(model)
  own = {path: params[path].get_value() for path in letters if units.layer_of(path) == l}
  for path, value in own.items():
    units.check_plain(path, value)
  split = {
    path: np.moveaxis(np.asarray(value, np.float64), letters[path].index('E'), 0)
    for path, value in own.items()
  }
  rest = {path: tuple(n for n in letters[path] if n != 'E') for path in own}
  found = [_average(split, rest, family, rows_E) for family in families]
  return {
    path: jnp.asarray(
      np.stack([one[path] for one in found], axis=letters[path].index('E')).astype(value.dtype)
    )
    for path, value in own.items()
  }


def _average(split: Arrays, letters: Letters, family, rows_E) -> Arrays:
  """One expert of a family; its arrays have these letters."""
  share = np.asarray(rows_E, np.float64)[list(family)]
  share = share / share.sum() if share.any() else np.full(len(family), 1 / len(family))
  head = {path: value[family[0]] for path, value in split.items()}
  total = {path: share[0] * value for path, value in head.items()}
  for e, part in zip(family[1:], share[1:], strict=True):
    one = aligned({path: value[e] for path, value in split.items()}, head, letters)
    total = {path: total[path] + part * one[path] for path in total}
  return total


def aligned(one: Arrays, head: Arrays, letters: Letters) -> Arrays:
  """An expert with its channels in the order that fits those of another."""
  products_FF = _channels(head, letters) @ _channels(one, letters).T
  _, order = scipy.optimize.linear_sum_assignment(products_FF, maximize=True)
  take = lambda path, value: np.take(value, order, axis=letters[path].index('F'))
  return {path: take(path, v) if 'F' in letters[path] else v for path, v in one.items()}


def _channels(one: Arrays, letters: Letters) -> np.ndarray:
  """All weights of each channel: [F, weights]."""
  own = [np.moveaxis(v, letters[p].index('F'), 0) for p, v in one.items() if 'F' in letters[p]]
  return np.concatenate([value.reshape(len(value), -1) for value in own], axis=1)
