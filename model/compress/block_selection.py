"""Makes the attention of some layers choose blocks of keys: a retrofit without new parameters.

After Lu et al. (2025), mixture of block attention (MoBA), https://arxiv.org/abs/2502.13189, who
train with it and let some layers stay dense. A query sees its own block and the `top_k` blocks
before it that suit it best (`model.layers.mixers.moba`). Caches hold all tokens; less of them is
read. A model that was trained without it rests on its first tokens, so with `first` their block is
always one of the chosen, which the paper does not have. With blocks enough the model computes what
it did.
"""

import dataclasses

from model.compress import full_layers
from model.compress.registry import Reshaped, technique
from model.config import ModelConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.moba import MobaConfig
from model.transformer import Transformer, parameters
from ops.block_selection import Blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSelectionSpec:
  """How long blocks are, how many a query chooses besides its own, and which layers stay dense.

  first: the first block is always one of the chosen.
  full_every: of so many consecutive layers, the last stays as it is; None: no layer does.
  full_layers: the layers that stay, by number from 0 on, in place of `full_every`.
  """

  block: int = 64
  top_k: int = 4
  first: bool = True
  full_every: int | None = 4
  full_layers: tuple[int, ...] | None = None

  def __post_init__(self):
    Blocks(size=self.block, top_k=self.top_k)  # checks them
    full_layers.check_every(self.full_every)


def check(config: ModelConfig, spec: BlockSelectionSpec) -> None:
  """Raises ValueError if a layer cannot choose blocks, or would choose all of them."""
  for l in full_layers.others(config, spec.full_every, spec.full_layers):
    mixer = config.layers[l].mixer
    problem = None
    if type(mixer) is not AttentionConfig:
      problem = f'has a {type(mixer).__name__}, which is no attention to all keys'
    elif mixer.pattern is not None:
      problem = f'has {mixer.pattern} already'
    elif mixer.lends:
      problem = 'lends its keys and values to later layers'
    if problem:
      raise ValueError(f'layer {l} {problem}; name the layers that stay as they are in full_layers')
  seen = (spec.top_k + 1) * spec.block
  if seen >= config.max_positions:
    raise ValueError(
      f'{spec.top_k} blocks of {spec.block} tokens and the own one are all {config.max_positions} '
      'positions of the model; choose fewer or smaller ones'
    )


def _reshapes(model: Transformer, spec: BlockSelectionSpec) -> ModelConfig:
  layers = list(model.config.layers)
  for l in full_layers.others(model.config, spec.full_every, spec.full_layers):
    mixer = MobaConfig.of(layers[l].mixer, block=spec.block, top_k=spec.top_k, first=spec.first)
    layers[l] = dataclasses.replace(layers[l], mixer=mixer)
  return model.config.replace(layers=tuple(layers))


@technique(
  'block_selection',
  spec=BlockSelectionSpec,
  paper='Lu et al. 2025, https://arxiv.org/abs/2502.13189',
  scope='shape',
  check=check,
  reshapes=_reshapes,
  calibrates=lambda spec: False,
)
def choose_blocks(model, measurements, spec):
  """Let each query of some layers choose the blocks of keys that it attends to (MoBA)."""
  del measurements
  config = _reshapes(model, spec)
  what = f'keys that a query reads at most, of {config.max_positions}'
  events = {
    f'layers.{l}.attention': {what: layer.mixer.seen(config.max_positions)}
    for l, layer in enumerate(config.layers)
    if isinstance(layer.mixer, MobaConfig)
  }
  values = {path: param.get_value() for path, param in parameters(model).items()}
  return Reshaped(config=config, parameters=values, events=events)
