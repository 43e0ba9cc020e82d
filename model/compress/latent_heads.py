"""Makes attention into latent attention: keys and values of all heads from one short vector.

After Ji et al. (2025), MHA2MLA, https://arxiv.org/abs/2502.14837. Each head keeps the rotation of
some pairs of its elements, and gives up that of the others, whose keys are then linear in the
input. The matrices of these keys and of all values, side by side, are replaced by two thinner ones,
so that a cache holds the latent of a token, and the rotated keys of each key/value head.

  choice   the pairs that keep their rotation
    high, low, uniform   those of the highest or lowest frequencies, or evenly spread ones
    norm                 those that contribute most to scores: the product of the root mean squares
                         of the pair in queries and in keys, added up over all heads
  importance   what the thinner matrices lose least of
    weights              the weights: the singular value decomposition, as in the paper
    outputs              keys and values on calibration text: x W with the least mean squared error
                         is x (W V) V^T, for V the first eigenvectors of the covariance of x W

With all pairs and the full rank the model computes what it did. Otherwise the paper trains for 0.3
to 1 % of the tokens of pretraining afterwards; a recipe can go on with steps that train.

Differs from the paper: all heads of a layer keep the same pairs, which the mean over heads decides;
'outputs' is an addition; biases are decomposed with the matrices, as the row of one more input that
is always 1. Decomposing takes the cube of the width of all keys and values, in float64.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from model.compress.norms import MOMENTS
from model.compress.registry import Reshaped, technique
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.latent import LatentConfig
from model.transformer import Transformer, parameters
from ops import rope

Choice = Literal['high', 'low', 'uniform', 'norm']
DAMPING = 1e-6  # of a covariance, as a share of its mean diagonal: all directions count a little
STATISTICS = ('input_covariance', MOMENTS)
READERS = ('query', 'key', 'value')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentHeadsSpec:
  """The size of the latent and of the part that rotates.

  rank_per_head: the width of the latent, as a multiple of the key/value heads (None: full rank).
  pairs: how many pairs of each head keep their rotation (None: all).
  """

  rank_per_head: int | None = None
  pairs: int | None = None
  choice: Choice = 'norm'
  importance: Literal['weights', 'outputs'] = 'outputs'

  def __post_init__(self):
    if self.rank_per_head is not None and self.rank_per_head < 1:
      raise ValueError(f'rank_per_head must be at least 1, not {self.rank_per_head}')
    if self.pairs is not None and self.pairs < 0:
      raise ValueError(f'pairs is a number of pairs, at least 0, not {self.pairs}')

  @property
  def by_norm(self) -> bool:
    """Whether pairs are chosen by what they contribute on calibration text."""
    return self.choice == 'norm' and self.pairs is not None


def _calibrates(spec: LatentHeadsSpec) -> bool:
  return spec.importance == 'outputs' or spec.by_norm


def _reshapes(model: Transformer, spec: LatentHeadsSpec) -> ModelConfig:
  """The config of the result, in which the numbers of the pairs may be others."""
  config = model.config
  places = enumerate(config.layers)
  layers = [_latent(config, l, spec, _places(_rotary_pairs(config, x), spec)) for l, x in places]
  return config.replace(layers=tuple(layers))


def _latent(config: ModelConfig, l: int, spec: LatentHeadsSpec, pairs) -> LayerConfig:
  """A layer with latent heads, of which these pairs rotate."""
  layer = config.layers[l]
  heads, known = layer.mixer, _rotary_pairs(config, layer)
  _check(l, heads)
  rotary = 2 * len(pairs)
  still = heads.head_width - rotary
  full = min(config.width + heads.qkv_bias, heads.kv_heads * (still + heads.head_width))
  rank = full if spec.rank_per_head is None else spec.rank_per_head * heads.kv_heads
  if rank > full:
    raise ValueError(
      f'rank_per_head {spec.rank_per_head} makes latents of {rank} numbers, above the full rank '
      f'{full} of layer {l}; lower it'
    )
  some = 0 < len(pairs) < known
  mixer = LatentConfig(
    query_heads=heads.query_heads,
    kv_heads=heads.kv_heads,
    still_width=still,
    rotary_width=rotary,
    value_width=heads.head_width,
    rank=rank,
    shared_rotary=False,
    pairs=tuple(pairs) if some else None,
    full_rotary_width=2 * known if some else None,
    rope=heads.rope,
    query_scale=heads.query_scale,
    latent_norms=False,
    qkv_bias=heads.qkv_bias,
    output_bias=heads.output_bias,
  )
  return dataclasses.replace(layer, mixer=mixer)


def _check(l: int, heads) -> None:
  """Raises ValueError for attention that latent heads cannot compute."""
  if type(heads) is not AttentionConfig:
    raise ValueError(f'layer {l} has a {type(heads).__name__}, and latents replace attention alone')
  for trait, what in (
    ('qk_norm', 'norms of queries and keys'),
    ('sinks', 'sinks'),
    ('softcap', 'a soft cap'),
    ('pattern', 'a window or a sparse pattern'),
  ):
    if getattr(heads, trait):
      raise ValueError(f'layer {l} has {what}, which latent attention does not')


def _rotary_pairs(config: ModelConfig, layer: LayerConfig) -> int:
  """How many pairs of a head rotate."""
  return (layer.mixer.rotated or 0) // 2 if config.rope_of(layer) is not None else 0


def _places(count: int, spec: LatentHeadsSpec, scores: np.ndarray | None = None) -> list[int]:
  """The pairs of `count` that keep their rotation, in increasing order."""
  kept = count if spec.pairs is None else spec.pairs
  if kept > count:
    raise ValueError(f'pairs {kept} is more than the {count} pairs of a head that rotate; lower it')
  if spec.choice == 'low':
    found = range(count - kept, count)
  elif spec.choice == 'uniform':
    found = np.arange(kept) * count // max(kept, 1)
  elif scores is not None:
    found = np.sort(np.argsort(-scores, kind='stable')[:kept])
  else:
    found = range(kept)
  return [int(i) for i in found]


@technique(
  'latent_heads',
  spec=LatentHeadsSpec,
  paper='Ji et al. 2025, https://arxiv.org/abs/2502.14837',
  scope='shape',
  reshapes=_reshapes,
  calibrates=_calibrates,
)
def latent_heads(model, measurements, spec):
  """Replace keys and values by a latent that they are made from, and some rotated keys."""
  values = {path: param.get_value() for path, param in parameters(model).items()}
  layers, events = [], {}
  for l, inputs in enumerate(_inputs(model, measurements, spec)):
    name = f'layers.{l}.attention'
    own = {part: values.pop(path) for part in READERS for path in [f'{name}.{part}.weight']}
    biases = {part: values.pop(f'{name}.{part}.bias', None) for part in READERS}
    dtype = own['query'].dtype
    rows = {part: _with_bias(own[part], biases[part]) for part in READERS}
    layer, found = _converted(model.config, l, spec, rows, inputs)
    layers.append(layer)
    values |= {f'{name}.{path}': jnp.asarray(x.astype(dtype)) for path, x in found.items()}
    events[f'layers.{l}'] = {
      f'numbers of a token in a cache, of {model.config.layers[l].mixer.cached}': layer.mixer.cached
    }
  return Reshaped(
    config=model.config.replace(layers=tuple(layers)), parameters=values, events=events
  )


def _inputs(model, measurements, spec):
  """The covariance of the inputs of each layer, of which one more may be 1; None: not measured."""
  if not _calibrates(spec):
    yield from [None] * len(model.layers)
    return
  layer = 'attention.query'
  for l, measured in enumerate(measurements.inputs(lambda block: (layer,), STATISTICS)):
    covariance_II = np.asarray(measured[layer]['input_covariance'], np.float64)
    if model.config.layers[l].mixer.qkv_bias:
      mean_I = np.asarray(measured[layer][MOMENTS][0], np.float64)
      covariance_II = np.block([[covariance_II, mean_I[:, None]], [mean_I[None], np.ones((1, 1))]])
    yield covariance_II


def _with_bias(w_IO, bias_O) -> np.ndarray:
  """A matrix in float64, with its bias as one more row."""
  w_IO = np.asarray(w_IO, np.float64)
  return w_IO if bias_O is None else np.concatenate([w_IO, np.asarray(bias_O, np.float64)[None]])


def _converted(config, l, spec, rows, covariance_II) -> tuple[LayerConfig, dict[str, np.ndarray]]:
  """The config of a layer and its parameters by path, from its matrices with their biases."""
  heads, known = config.layers[l].mixer, _rotary_pairs(config, config.layers[l])
  split = lambda w, count: w.reshape(len(w), count, heads.head_width)
  q_INH = split(rows['query'], heads.query_heads)
  k_IKH, v_IKH = (split(rows[part], heads.kv_heads) for part in ('key', 'value'))
  scores = _contributions(q_INH, k_IKH, covariance_II, known) if spec.by_norm else None
  pairs = np.array(_places(known, spec, scores), int)
  layer = _latent(config, l, spec, pairs.tolist())
  turned = np.concatenate([pairs, pairs + known])
  still = np.setdiff1d(np.arange(heads.head_width), turned)
  k_still_IKH = k_IKH[..., still]
  own_rope = config.rope_of(config.layers[l])
  if own_rope is not None and known:
    # Cosines and sines have this factor in queries and in keys, which pairs at rest then lack.
    _, factor = rope.frequencies(own_rope, 2 * known, 1)
    k_still_IKH = k_still_IKH * np.where(still < 2 * known, factor**2, 1.0)
  flat = lambda w: w.reshape(len(w), -1)
  joint = np.concatenate([flat(k_still_IKH), flat(v_IKH)], axis=1)
  weighs = covariance_II if spec.importance == 'outputs' else None
  down_IR, up_RO = decompose(joint, layer.mixer.rank, weighs)
  key_up, value_up = np.split(up_RO, [heads.kv_heads * len(still)], axis=1)
  found = {'query': flat(q_INH[..., np.concatenate([still, turned])]), 'kv_down': down_IR}
  found |= {'rotary_key': flat(k_IKH[..., turned])} if len(turned) else {}
  result = {'value_up.weight': value_up}
  result |= {'key_up.weight': key_up} if len(still) else {}
  for name, w in found.items():
    result[f'{name}.weight'] = w[:-1] if heads.qkv_bias else w
    result |= {f'{name}.bias': w[-1]} if heads.qkv_bias else {}
  return layer, result


def decompose(
  w_IO: np.ndarray, rank: int, covariance_II: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Two matrices [I, R] and [R, O], whose product is nearest to the one given.

  Near is the mean squared error of x W, for inputs of this covariance; None: that of the weights.
  The rows of the second are orthonormal.
  """
  w_IO = np.asarray(w_IO, np.float64)
  if covariance_II is None:
    energy_OO = w_IO.T @ w_IO
  else:
    damped_II = covariance_II + DAMPING * np.mean(np.diag(covariance_II)) * np.eye(len(w_IO))
    energy_OO = w_IO.T @ damped_II @ w_IO
  _, axes_OO = np.linalg.eigh(energy_OO)
  axes_OR = axes_OO[:, ::-1][:, :rank]
  return w_IO @ axes_OR, axes_OR.T


def _contributions(q_INH, k_IKH, covariance_II, pairs: int) -> np.ndarray:
  """How much each pair of elements contributes to scores, over all heads."""
  copies = q_INH.shape[1] // k_IKH.shape[1]
  square = lambda w: np.einsum('INH,INH->NH', w, np.tensordot(covariance_II, w, 1))
  both = lambda x: x[:, :pairs] + x[:, pairs : 2 * pairs]
  q_N_, k_K_ = (np.sqrt(np.maximum(both(square(w)), 0)) for w in (q_INH, k_IKH))
  return (q_N_ * np.repeat(k_K_, copies, axis=0)).sum(0)
