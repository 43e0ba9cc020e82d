"""Makes the attention of some layers linear: a state of constant size in place of all past tokens.

After Kasai et al. (2021), T2R, https://arxiv.org/abs/2103.13076: the matrices of queries, keys,
values and outputs stay, and features elu(x) + 1, whose products are divided by their sum, replace
the softmax of scores (`model.layers.mixers.linear`). Heads that read the same keys and values get
copies of them. Queries and keys are each multiplied by the square root of the scale of scores.

  linear    nothing is added; all past tokens count
  decaying  as in GLA (Yang et al., 2023, https://arxiv.org/abs/2312.06635) what the state holds
            decays by key channel and token; the decays begin as one constant, exp(-1 / memory),
            and the matrices that make them depend on the token learn from there

The features are positive, so they are not rotated, and only decays tell these layers the order of
tokens. The result is a start for training and useless without it. Some layers keep full attention,
because a state of constant size cannot keep single words far back.

Differs from the papers: features are not learned maps of their own (Hedgehog, LoLCATs), and there
is no window beside the state. The baseline of any such model is a window with first tokens of as
many bytes (`sparse_attention`), which is often the better one even untrained
(https://arxiv.org/abs/2608.28444).
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from model.compress import full_layers
from model.compress.registry import Reshaped, technique
from model.config import ModelConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.linear import LinearConfig
from model.transformer import Transformer, parameters

READERS = ('query', 'key', 'value')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearizeSpec:
  """What the layers become, and which of them stay as they are (`compress.full_layers`).

  memory: that of the initial decays, in tokens.  seed: of the matrices that decays come from.
  """

  mixer: Literal['linear', 'decaying'] = 'linear'
  full_every: int | None = 4
  full_layers: tuple[int, ...] | None = None
  memory: int = 1024
  seed: int = 0

  def __post_init__(self):
    full_layers.check_every(self.full_every)
    if self.memory < 1:
      raise ValueError(f'memory is a number of tokens, at least 1, not {self.memory}')


def check(config: ModelConfig, spec: LinearizeSpec) -> None:
  """Raises ValueError if a layer cannot become linear, or none would."""
  for l in full_layers.others(config, spec.full_every, spec.full_layers):
    mixer = config.layers[l].mixer
    if type(mixer) is not AttentionConfig:
      problem = f'has a {type(mixer).__name__}, which is no attention with keys of its own'
    else:
      problem = _obstacle(mixer)
    if problem:
      raise ValueError(f'layer {l} {problem}; name the layers that stay as they are in full_layers')


def _obstacle(mixer: AttentionConfig) -> str | None:
  """The trait of a layer that linear attention does not have, or None."""
  traits = {
    'norms of queries and keys': mixer.qk_norm,
    'a cap of scores': mixer.softcap is not None,
    'sinks': mixer.sinks,
    'gates': mixer.gated,
    'an output bias': mixer.output_bias,
    'readers': mixer.lends,
    f'the pattern {mixer.pattern}': mixer.pattern is not None,
  }
  found = [name for name, there in traits.items() if there]
  return f'has {found[0]}, which linear attention has not' if found else None


def _linear(heads: AttentionConfig, spec: LinearizeSpec) -> LinearConfig:
  return LinearConfig(
    heads=heads.query_heads,
    key_width=heads.head_width,
    value_width=heads.head_width,
    normalized=True,
    decay='channel' if spec.mixer == 'decaying' else 'none',
    bias=heads.qkv_bias,
  )


def _reshapes(model: Transformer, spec: LinearizeSpec) -> ModelConfig:
  layers = list(model.config.layers)
  for l in full_layers.others(model.config, spec.full_every, spec.full_layers):
    layers[l] = dataclasses.replace(layers[l], mixer=_linear(layers[l].mixer, spec))
  return model.config.replace(layers=tuple(layers))


@technique(
  'linearize',
  spec=LinearizeSpec,
  paper='Kasai et al. 2021, https://arxiv.org/abs/2103.13076',
  scope='shape',
  check=check,
  reshapes=_reshapes,
  calibrates=lambda spec: False,
)
def linearize(model, measurements, spec):
  """Make the attention of some layers linear, with a state of constant size in place of a cache."""
  del measurements
  config, rng, events = _reshapes(model, spec), np.random.default_rng(spec.seed), {}
  values = {path: param.get_value() for path, param in parameters(model).items()}
  for l in full_layers.others(config, spec.full_every, spec.full_layers):
    heads, at = model.config.layers[l].mixer, f'layers.{l}.attention'
    for part in READERS:
      for leaf in ('weight', 'bias') if heads.qkv_bias else ('weight',):
        path = f'{at}.{part}.{leaf}'
        values[path] = _carried(part, values[path], heads)
    if spec.mixer == 'decaying':
      dtype = values[f'{at}.query.weight'].dtype
      own = _decays(config.width, config.layers[l].mixer, spec.memory, rng)
      values |= {f'{at}.{name}': jnp.asarray(array, dtype) for name, array in own.items()}
    held = heads.query_heads * heads.head_width * (heads.head_width + 1)
    events[at] = {f'numbers of a state, in place of {heads.cached} for each token': held}
  return Reshaped(config=config, parameters=values, events=events)


def _carried(part: str, value, heads: AttentionConfig) -> jnp.ndarray:
  """Repeats a matrix or a bias of key/value heads for all query heads."""
  array = np.asarray(value, np.float64)
  if part != 'query':
    array = array.reshape(*array.shape[:-1], heads.kv_heads, heads.head_width)
    array = np.repeat(array, heads.copies, axis=-2).reshape(*array.shape[:-2], -1)
  if part != 'value':
    array = array * (heads.query_scale or heads.head_width**-0.5) ** 0.5
  return jnp.asarray(array.astype(value.dtype))


def _decays(width: int, mixer: LinearConfig, memory: int, rng) -> dict[str, np.ndarray]:
  """The matrices of decays: at first the same for all tokens, with gradients that change that."""
  keys = mixer.heads * mixer.key_width
  # sigmoid(bias) ** (1 / temperature) = exp(-1 / memory)
  bias = -math.log(math.expm1(mixer.decay_temperature / memory))
  arrays = {
    'decay_in.weight': rng.normal(0, width**-0.5, (width, mixer.decay_rank)),
    'decay_out.weight': np.zeros((mixer.decay_rank, keys)),
    'decay_out.bias': np.full(keys, bias),
  }
  return arrays | ({'decay_in.bias': np.zeros(mixer.decay_rank)} if mixer.bias else {})
