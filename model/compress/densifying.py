"""Makes a model with experts into a dense one.

  average      one network of the width of an expert: all experts with their channels in one order
               (see `expert_merging`), averaged by how many tokens chose each
  concatenate  one network of the `experts` most used ones side by side

A dense network has no router, so the mean routing weights go into the output matrices: the output
of an expert is multiplied by the mean of its weight over all calibration tokens. That is exact
where the weights do not depend on the token, as in a model that was upcycled and not trained.
Shared experts, times the mean of their gate, stand beside the others.

Such a model is a start for steps that train, such as distillation from the model with experts;
after Fedus et al. (2021), section 4.2, https://arxiv.org/abs/2101.03961, who start from the layers
that are not routed.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from model import units
from model.compress import expert_merging, expert_pruning
from model.compress.expert_use import ExpertUse
from model.compress.registry import Reshaped, technique
from model.config import ModelConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.routed import RoutedConfig
from model.transformer import Transformer, parameters
from ops import structure

WITHOUT_EXPERTS = {'mixtral': 'llama'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensifySpec:
  """How experts become one network; `experts` is how many stand side by side, None for all."""

  mode: Literal['average', 'concatenate'] = 'average'
  experts: int | None = None

  def __post_init__(self):
    if self.experts is not None and (self.mode == 'average' or self.experts < 1):
      raise ValueError('experts says how many at least, 1 or more, stand side by side')

  def count(self, ffn: RoutedConfig) -> int:
    """How many experts stand side by side."""
    if self.mode == 'average':
      return 1
    if self.experts is not None and self.experts > ffn.experts:
      raise ValueError(f'there are {ffn.experts} experts, not {self.experts} to stand side by side')
    return self.experts or ffn.experts


def _reshapes(model: Transformer, spec: DensifySpec) -> ModelConfig:
  layers = list(model.config.layers)
  for l, ffn in expert_pruning.routed(model.config).items():
    dense = FeedForwardConfig(
      width=spec.count(ffn) * ffn.width + ffn.shared_width,
      activation=ffn.activation,
      gated=ffn.gated,
      bias=ffn.bias,
    )
    layers[l] = dataclasses.replace(layers[l], ffn=dense)
  family = WITHOUT_EXPERTS.get(model.config.family, model.config.family)
  return model.config.replace(layers=tuple(layers), family=family)


@technique(
  'densify',
  spec=DensifySpec,
  paper='Fedus et al. 2021, https://arxiv.org/abs/2101.03961',
  scope='shape',
  check=expert_pruning.check,
  reshapes=_reshapes,
  calibrates=lambda spec: True,
)
def densify(model, measurements, spec):
  """Make the experts of every layer into one dense network, by average or side by side."""
  uses, tokens = measurements.experts(), measurements.tokens_BT.size
  values = {path: param.get_value() for path, param in parameters(model).items()}
  events = {}
  for l, ffn in expert_pruning.routed(model.config).items():
    prefix = f'layers.{l}.ffn.'
    own = {path: values.pop(path) for path in list(values) if path.startswith(prefix)}
    values |= _dense(model, own, l, uses[l], tokens, spec)
    events[f'layers.{l}'] = {f'experts made one network, of {ffn.experts}': spec.count(ffn)}
  config = _reshapes(model, spec)
  return Reshaped(config=config, parameters=values, events=events)


def _dense(model, own, l: int, use: ExpertUse, tokens: int, spec) -> dict[str, jnp.ndarray]:
  """The parameters of the dense network of one layer."""
  ffn = model.config.layers[l].ffn
  for path, value in own.items():
    units.check_plain(path, value)
  if spec.mode == 'average':
    by_rows = [int(e) for e in np.argsort(-use.rows_E, kind='stable')]
    own |= expert_merging.merged(model, l, [by_rows], use.rows_E)
    chosen, gains = [0], [use.weights_E.sum() / tokens]
  else:
    chosen = structure.best(use.rows_E, spec.count(ffn)).tolist()
    gains = use.weights_E[chosen] / tokens
    gains = gains * use.weights_E.sum() / max(use.weights_E[chosen].sum(), 1e-30)
  find = lambda name: own.get(f'layers.{l}.ffn.{name}')
  networks = [
    (lambda name, e=e: None if find(name) is None else find(name)[e], gain)
    for e, gain in zip(chosen, gains, strict=True)
  ]
  if ffn.shared_width:
    networks.append((lambda name: find(f'shared.{name}'), float(use.opened) / tokens))
  return {f'layers.{l}.ffn.{name}': value for name, value in _side_by_side(networks).items()}


def _side_by_side(networks) -> dict[str, jnp.ndarray]:
  """The parameters of one network that adds up others, each times a number."""
  found = {}
  for name, axis in (('gate.weight', 1), ('up.weight', 1), ('gate.bias', 0), ('up.bias', 0)):
    if networks[0][0](name) is not None:
      found[name] = jnp.concatenate([of(name) for of, _ in networks], axis=axis)
  scaled = lambda name: [
    (np.asarray(of(name), np.float64) * gain).astype(of(name).dtype) for of, gain in networks
  ]
  found['down.weight'] = jnp.asarray(np.concatenate(scaled('down.weight'), axis=0))
  if networks[0][0]('down.bias') is not None:
    found['down.bias'] = jnp.asarray(sum(scaled('down.bias')))
  return found
