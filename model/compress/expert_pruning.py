"""Removes the experts that matter least, the same share in each routed layer.

An expert goes with its column of the router, its bias and the bias of its choice. Scores, all over
the tokens that chose the expert:

  reap       the mean of g |y|, where y is the expert's output and g its share of the weights of the
             chosen experts; after Lasby et al. (2025), REAP, https://arxiv.org/abs/2510.13999
  norm       the mean of |y|, without the router
  gate_norm  the sum of g |y|: 'reap' times 'frequency'
  frequency  how many tokens chose it
  random     drawn by `seed`: the baseline of the others

Where groups of experts limit the choice, every group loses equally many, so that they stay equal.
A router whose weights are not renormalized divides by fewer scores afterwards, so the weights of
the experts that stay grow; the papers leave that as it is.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from model import units
from model.compress.expert_use import ExpertUse
from model.compress.registry import Reshaped, technique
from model.config import ModelConfig
from model.layers.routed import RoutedConfig
from model.transformer import Transformer, parameters
from ops import structure
from ops.moe import Router

Score = Literal['reap', 'norm', 'gate_norm', 'frequency', 'random']


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSpec:
  """The least share of the experts of each layer that is removed."""

  ratio: float = 0.25

  def __post_init__(self):
    if not 0 <= self.ratio < 1:
      raise ValueError(f'ratio is a share of the experts, at least 0 and below 1, not {self.ratio}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneExpertsSpec(ExpertSpec):
  """Which experts are removed; `seed` is that of the score 'random'."""

  score: Score = 'reap'
  seed: int = 0


def check(config: ModelConfig, spec) -> None:
  """Raises ValueError if no layer has experts."""
  del spec
  if not routed(config):
    raise ValueError('no layer of the model has experts')


def routed(config: ModelConfig) -> dict[int, RoutedConfig]:
  """The feed-forward networks with experts, by the number of the layer."""
  ffns = {l: layer.ffn for l, layer in enumerate(config.layers)}
  return {l: ffn for l, ffn in ffns.items() if isinstance(ffn, RoutedConfig)}


def remaining(ffn: RoutedConfig, ratio: float) -> int:
  """How many experts stay; the same number of each group if groups limit the choice."""
  size = ffn.experts // ffn.router.groups
  return ffn.router.groups * (size - math.ceil(ratio * size - 1e-6))


def with_experts(config: ModelConfig, counts: Mapping[int, int]) -> ModelConfig:
  """The config with other numbers of experts. Raises ValueError if a router cannot choose."""
  layers = list(config.layers)
  for l, count in counts.items():
    if count < 1:
      raise ValueError(f'no expert of layer {l} would stay; ask for a smaller ratio')
    layers[l] = layers[l].with_ffn(experts=count)
  return config.replace(layers=tuple(layers))


def reshapes(model: Transformer, spec: ExpertSpec) -> ModelConfig:
  """The config that is left."""
  ffns = routed(model.config).items()
  return with_experts(model.config, {l: remaining(ffn, spec.ratio) for l, ffn in ffns})


@technique(
  'prune_experts',
  spec=PruneExpertsSpec,
  paper='Lasby et al. 2025, https://arxiv.org/abs/2510.13999',
  scope='shape',
  check=check,
  reshapes=reshapes,
  calibrates=lambda spec: spec.score != 'random',
)
def prune_experts(model, measurements, spec):
  """Remove the experts of low importance with their columns of the router."""
  rng, events, kept = np.random.default_rng(spec.seed), {}, {}
  uses = measurements.experts() if measurements is not None else {}
  for l, ffn in routed(model.config).items():
    scores_E = rng.random(ffn.experts) if spec.score == 'random' else score(uses[l], spec.score)
    kept[l] = best(scores_E, ffn.router, remaining(ffn, spec.ratio))
    gone = np.setdiff1d(np.arange(ffn.experts), kept[l])
    named = f'experts removed, of {ffn.experts}: {", ".join(map(str, gone))}'
    events[f'layers.{l}'] = {named: len(gone)}
  config, values = cut(model, kept)
  return Reshaped(config=config, parameters=values, events=events)


def score(use: ExpertUse, name: Score) -> np.ndarray:
  """The importance of each expert, 0 for one that no token chose: float64 [E]."""
  rows_E = np.maximum(use.rows_E, 1)
  match name:
    case 'reap':
      return use.shares_E / rows_E
    case 'norm':
      return use.norms_E / rows_E
    case 'gate_norm':
      return use.shares_E
    case 'frequency':
      return use.rows_E
  raise ValueError(f'{name!r} is no score that is measured')


def best(scores_E: np.ndarray, router: Router, count: int) -> np.ndarray:
  """The `count` experts of the highest scores, equally many of each group: increasing indices."""
  parts = np.split(np.asarray(scores_E), router.groups)
  own = count // router.groups
  return np.concatenate([structure.best(s, own) + g * len(s) for g, s in enumerate(parts)])


def cut(
  model: Transformer, kept: Mapping[int, np.ndarray]
) -> tuple[ModelConfig, dict[str, jax.Array]]:
  """Keeps some experts of each layer: the config and the parameters that are left."""
  names, values = units.letters(model), {}
  for path, param in parameters(model).items():
    values[path] = value = param.get_value()
    l = units.layer_of(path)
    if l in kept and 'E' in names[path]:
      units.check_plain(path, value)
      values[path] = jnp.take(value, kept[l], axis=names[path].index('E'))
  return with_experts(model.config, {l: len(indices) for l, indices in kept.items()}), values
