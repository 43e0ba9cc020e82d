"""Gives the attention of some layers a sparse pattern: a retrofit of a model that sees everything.

The usual one is a window with sinks: a query sees the last tokens and the first few, on which
models that were trained without a window rest much of their attention. After Xiao et al. (2023),
StreamingLLM, https://arxiv.org/abs/2309.17453. Some layers stay as they are, so that the model
still reaches all of its context, as models that are trained with windows do it (Gemma 2,
https://arxiv.org/abs/2408.00118). The other layers read, and their caches hold, what the pattern
has and no more. No parameter changes; a step that trains can follow.

With true positions the first tokens lie further from the query than the model has ever seen, once
a text is longer than those it was trained on. The paper counts positions within the cache, and so
does `cap_first`. Layers that stay in full have no such remedy.

Which layers stay is given by their order, as a list, or measured: those whose attention costs the
most loss if it alone gets the pattern. That is one pass over the layers after it for each layer.
"""

import dataclasses
from typing import Literal

import numpy as np

from model import units
from model.compress import full_layers
from model.compress.measurements import Measurements
from model.compress.registry import Reshaped, technique
from model.config import ModelConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, parameters
from ops import patterns
from ops.patterns import Pattern

Choice = Literal['order', 'loss']


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseAttentionSpec:
  """A sparse pattern (`ops.patterns`), and which layers stay without it.

  full_every: of so many consecutive layers, one stays as it is; None: no layer does.
  full_layers: the layers that stay, by number from 0 on, in place of `full_every`.
  choose: by 'order' the last layer of each `full_every` stays. By 'loss' equally many stay: those
    that need it most.
  rows: of calibration text, with which 'loss' measures.
  cap_first: the first tokens never seem further away than at the end of the first window, as the
    paper has it; see `AttentionConfig.first_reach`.
  """

  pattern: str = 'window512+first4'
  full_every: int | None = 4
  full_layers: tuple[int, ...] | None = None
  choose: Choice = 'order'
  rows: int = 8
  cap_first: bool = False

  def __post_init__(self):
    recent = self.parsed.recent
    if self.cap_first and not (recent and recent[1]):
      raise ValueError(f'cap_first needs a window with first tokens, not {self.pattern}')
    full_layers.check_every(self.full_every)
    if self.rows < 1:
      raise ValueError(f'rows must be at least 1, not {self.rows}')
    if self.choose == 'loss' and (self.full_layers or self.full_every is None):
      raise ValueError("choose='loss' needs full_every, which says how many layers stay")

  @property
  def parsed(self) -> Pattern:
    return patterns.parse(self.pattern)

  @property
  def changes(self) -> dict:
    """The fields of `AttentionConfig` that a layer gets."""
    reach = sum(self.parsed.recent) - 1 if self.cap_first else None
    return {'sparse': self.parsed, 'first_reach': reach}


def check(config: ModelConfig, spec: SparseAttentionSpec) -> None:
  """Raises ValueError if a layer that gets the pattern cannot have it, or if there is none."""
  chosen = _by_order(config, spec)
  # By loss, any layer may get the pattern.
  for l in range(len(config.layers)) if spec.choose == 'loss' else chosen:
    mixer = config.layers[l].mixer
    if not isinstance(mixer, AttentionConfig):
      raise ValueError(
        f'the mixer of layer {l}, a {type(mixer).__name__}, has no pattern of keys; name the '
        'layers that stay as they are in full_layers'
      )
    if mixer.pattern is not None:
      raise ValueError(
        f'layer {l} has {mixer.pattern} already; name such layers in full_layers to leave them as '
        'they are'
      )
  if spec.parsed.seen(config.max_positions) == config.max_positions:
    raise ValueError(
      f'{spec.pattern} hides nothing within the {config.max_positions} positions of the model; '
      'choose a smaller window'
    )


def _by_order(config: ModelConfig, spec: SparseAttentionSpec) -> list[int]:
  return full_layers.others(config, spec.full_every, spec.full_layers)


def _config(config: ModelConfig, chosen, spec: SparseAttentionSpec) -> ModelConfig:
  """The config in which some layers have the pattern."""
  layers = list(config.layers)
  for l in chosen:
    layers[l] = layers[l].with_mixer(**spec.changes)
  return config.replace(layers=tuple(layers))


@technique(
  'sparse_attention',
  spec=SparseAttentionSpec,
  paper='Xiao et al. 2023, https://arxiv.org/abs/2309.17453',
  scope='shape',
  check=check,
  # Which layers it will be changes neither shapes nor what later steps may do.
  reshapes=lambda model, spec: _config(model.config, _by_order(model.config, spec), spec),
  calibrates=lambda spec: spec.choose == 'loss',
)
def sparse_attention(model, measurements, spec):
  """Give the attention of some layers a sparse pattern, such as a window with sinks."""
  config, values = model.config, {p: one.get_value() for p, one in parameters(model).items()}
  count, pattern = len(config.layers), spec.parsed
  chosen, events = _by_order(config, spec), {}
  if spec.choose == 'loss':
    costs = _costs(model, values, measurements, spec)
    chosen = np.sort(np.argsort(costs, kind='stable')[: len(chosen)]).tolist()
    what = 'loss if it alone had the pattern, in thousandths of a nat per token'
    events = {f'layers.{l}.attention': {what: round(1000 * max(0, costs[l]))} for l in range(count)}
  what = f'keys that a query sees at most, of {config.max_positions}'
  for l in chosen:
    events.setdefault(f'layers.{l}.attention', {})[what] = pattern.seen(config.max_positions)
  return Reshaped(config=_config(config, chosen, spec), parameters=values, events=events)


def _costs(model: Transformer, values, measurements: Measurements, spec) -> np.ndarray:
  """How much the loss rises if one layer alone has the pattern, for each of them [L]."""
  length = measurements.tokens_BT.shape[1]
  if spec.parsed.seen(length) == length:
    raise ValueError(
      f'{spec.pattern} hides nothing in calibration rows of {length} tokens; give longer ones'
    )
  every = _config(model.config, range(len(model.config.layers)), spec)
  base, losses = measurements.losses(units.build(every, values, model.dtype), spec.rows)
  return losses - base
