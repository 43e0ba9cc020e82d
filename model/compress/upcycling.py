"""Makes a dense model into one with experts: sparse upcycling, and splitting into experts.

  copy       experts are copies of the dense network; after Komatsuzaki et al. (2022),
             https://arxiv.org/abs/2212.05055
  drop       copies of which a share of the channels is drawn anew, other ones in each expert; after
             Nakamura et al. (2025), Drop-Upcycling, https://arxiv.org/abs/2502.19261
  partition  each expert gets other channels of the dense network, similar ones together, by
             k-means with clusters of one size; after Zhang et al. (2021), MoEfication,
             https://arxiv.org/abs/2110.01786, and Zhu et al. (2024), LLaMA-MoE,
             https://arxiv.org/abs/2406.16554

With a granularity of G, copies are cut into G shards of consecutive channels, and expert i G + g is
shard g of copy i (He et al. 2024, https://arxiv.org/abs/2410.07524). The columns of the router are
the same for all shards of a copy, so a token chooses whole copies.

The weights of the chosen experts add up to 1, and the output matrices are multiplied by the number
of parts that the dense network was cut into. 'copy' therefore computes what the dense model did,
for every number of choices that is a multiple of G; He et al. put the factor into all matrices,
which is exact for no gated network. 'partition' does so where all experts are chosen and the router
is zero; with fewer choices the output has the size of the dense network's on average.

With one choice per token its weight is 1 whatever the router says, and training reaches the router
by the balance losses alone. The papers train for long afterwards; a recipe can go on with steps
that train.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
import scipy.optimize

from model import units
from model.compress.registry import Reshaped, technique
from model.config import ModelConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.routed import RoutedConfig
from model.transformer import Transformer, parameters
from ops.moe import Router

Mode = Literal['copy', 'drop', 'partition']
ROUNDS = 10  # of k-means
# config.json of these families has experts, or has none, in every layer.
WITH_EXPERTS = {'llama': 'mixtral', 'mistral': 'mixtral'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcycleSpec:
  """How many experts there are and how they come from the dense network.

  choices: experts per token.  granularity: shards of each copy.  drop: the share of channels that
  'drop' draws anew.  noise: random numbers added to the experts, as a share of the spread of each
  matrix.  router_std: the spread of the router's weights.
  """

  experts: int = 8
  choices: int = 2
  granularity: int = 1
  mode: Mode = 'copy'
  drop: float = 0.5
  noise: float = 0.0
  router_std: float = 0.02
  seed: int = 0

  def __post_init__(self):
    if min(self.experts, self.choices, self.granularity) < 1:
      raise ValueError('experts, choices and granularity must be at least 1')
    if self.mode == 'partition' and self.granularity != 1:
      raise ValueError('partition makes no copies that a granularity could cut; leave it at 1')
    if self.experts % self.granularity or self.choices % self.granularity:
      raise ValueError(
        f'{self.experts} experts and {self.choices} choices must be multiples of the granularity '
        f'{self.granularity}, because a token chooses whole copies'
      )
    if not 0 <= self.drop <= 1:
      raise ValueError(f'drop is a share of the channels between 0 and 1, not {self.drop}')
    if not (self.noise >= 0 and self.router_std >= 0):
      raise ValueError('noise and router_std must be at least 0')

  @property
  def parts(self) -> int:
    """How many parts the dense network is cut into."""
    return self.experts if self.mode == 'partition' else self.granularity


def _reshapes(model: Transformer, spec: UpcycleSpec) -> ModelConfig:
  config = model.config
  layers = []
  for l, layer in enumerate(config.layers):
    if not isinstance(layer.ffn, FeedForwardConfig):
      raise ValueError(f'layer {l} is not dense; only dense feed-forward networks are made experts')
    if layer.ffn.width % spec.parts:
      raise ValueError(
        f'the {layer.ffn.width} channels of layer {l} do not divide into {spec.parts} parts'
      )
    layers.append(dataclasses.replace(layer, ffn=_ffn(layer.ffn, spec)))
  family = WITH_EXPERTS.get(config.family, config.family)
  return config.replace(layers=tuple(layers), family=family)


def _ffn(dense: FeedForwardConfig, spec: UpcycleSpec) -> RoutedConfig:
  return RoutedConfig(
    experts=spec.experts,
    width=dense.width // spec.parts,
    router=Router(choices=spec.choices, renormalize=True),
    activation=dense.activation,
    gated=dense.gated,
    bias=dense.bias,
  )


@technique(
  'upcycle',
  spec=UpcycleSpec,
  paper='Komatsuzaki et al. 2022, https://arxiv.org/abs/2212.05055',
  scope='shape',
  reshapes=_reshapes,
  calibrates=lambda spec: False,
)
def upcycle(model, measurements, spec):
  """Make every dense feed-forward network into experts: copies, shards or parts of it."""
  del measurements
  rng, config = np.random.default_rng(spec.seed), _reshapes(model, spec)
  names, values, dense = units.letters(model), {}, {}
  for path, param in parameters(model).items():
    values[path] = param.get_value()
    if path.startswith('layers.') and '.ffn.' in path:
      dense.setdefault(units.layer_of(path), {})[path] = values.pop(path)
  for l, own in dense.items():
    values |= _experts(own, names, spec, rng)
    values[f'layers.{l}.ffn.router.weight'] = _router(config.width, spec, rng)
  events = {'feed-forward networks made into experts': len(dense)}
  return Reshaped(config=config, parameters=values, events={'model': events})


def _router(width: int, spec: UpcycleSpec, rng) -> jnp.ndarray:
  """The router [D, E], in float32; all shards of a copy have the same column."""
  copies = rng.normal(0, spec.router_std, (width, spec.experts // spec.granularity))
  return jnp.asarray(np.repeat(copies, spec.granularity, axis=1), jnp.float32)


def _experts(own, names, spec, rng) -> dict[str, jnp.ndarray]:
  """The parameters of all experts of one layer, by path."""
  plain = {path: np.asarray(value, np.float64) for path, value in own.items()}
  axes = {path: names[path].index('F') if 'F' in names[path] else None for path in own}
  shards = _shards(plain, axes, spec)
  found = []
  for e in range(spec.experts):
    channels = shards[e % len(shards)]
    one = {p: v if axes[p] is None else np.take(v, channels, axes[p]) for p, v in plain.items()}
    found.append(_varied(one, plain, axes, spec, rng))
  result = {path: np.stack([one[path] for one in found]) for path in plain}
  for path in result:
    if path.endswith('.down.weight'):
      result[path] *= spec.parts
  return {path: jnp.asarray(value.astype(own[path].dtype)) for path, value in result.items()}


def _shards(plain, axes, spec) -> list[np.ndarray]:
  """The channels of each part of the dense network."""
  rows = [np.moveaxis(v, axes[p], 0) for p, v in plain.items() if axes[p] is not None]
  count = len(rows[0])
  if spec.mode != 'partition':
    return np.split(np.arange(count), spec.parts)
  flat = [r.reshape(count, -1) for r in rows]
  return balanced_clusters(np.concatenate(flat, axis=1), spec.parts, seed=spec.seed)


def _varied(one, dense, axes, spec, rng) -> dict[str, np.ndarray]:
  """An expert with some channels drawn anew, and with noise."""
  result = dict(one)
  if spec.mode == 'drop':
    width = next(v.shape[axes[p]] for p, v in one.items() if axes[p] is not None)
    drawn = np.sort(rng.permutation(width)[: round(spec.drop * width)])
    for path, value in one.items():
      if axes[path] is not None:
        mean, std = dense[path].mean(), dense[path].std()
        moved = np.moveaxis(value.copy(), axes[path], 0)
        moved[drawn] = rng.normal(mean, std, moved[drawn].shape)
        result[path] = np.moveaxis(moved, 0, axes[path])
  if spec.noise:
    noisy = lambda v, std: v + rng.normal(0, spec.noise * std, v.shape)
    result = {path: noisy(value, dense[path].std()) for path, value in result.items()}
  return result


def balanced_clusters(points: np.ndarray, count: int, *, seed: int) -> list[np.ndarray]:
  """Divides points [points, features] into clusters of one size by k-means: their indices.

  In every round the points are assigned to the centres, each of which takes equally many, such that
  the sum of the squared distances is smallest. The number of points is a multiple of `count`.
  """
  size = len(points) // count
  order = np.random.default_rng(seed).permutation(len(points))
  centres = points[order[:count]]
  for _ in range(ROUNDS):
    squares = np.square(centres).sum(1)[None] - 2 * points @ centres.T
    _, places = scipy.optimize.linear_sum_assignment(np.repeat(squares, size, axis=1))
    clusters = [np.flatnonzero(places // size == c) for c in range(count)]
    centres = np.stack([points[own].mean(0) for own in clusters])
  return clusters
