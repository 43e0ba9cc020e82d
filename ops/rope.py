"""Computes rotary position embeddings, including the variants that extend the context length.

Su et al. (2021), https://arxiv.org/abs/2104.09864: pair i of a head's elements is rotated by the
angle position * frequency[i], with frequency[i] = theta ** (-2 i / d) and d = `rotary_width`. The
kinds differ in the frequencies:

  plain    the formula above
  linear   all frequencies divided by `factor`; Chen et al. (2023), https://arxiv.org/abs/2306.15595
  ntk      theta multiplied by factor ** (d / (d - 2)): the fastest pair keeps its frequency, and
           the slowest is divided by `factor`; bloc97 (2023), analysed in the YaRN paper
  dynamic  plain up to `original_max_positions`; beyond, ntk with a factor that grows with the
           length of the row
  llama3   slow pairs divided by `factor`, fast pairs kept, a linear ramp between; Grattafiori et
           al. (2024), https://arxiv.org/abs/2407.21783
  yarn     as llama3 with a ramp over pair indices, and cos and sin multiplied by an attention
           factor; Peng et al. (2023), https://arxiv.org/abs/2309.00071

The results equal those of Hugging Face transformers (`modeling_rope_utils`), which has no ntk,
except for 'dynamic'. There, the longest row of a batch decides, and the model remembers the longest
input that it has seen. Here, the frequencies of a row depend only on that row in the present call,
so keys that were cached at a shorter length keep the angles of that length. A pair is
(i, i + d/2), Llama's half-split convention on the Hub, not (2i, 2i + 1) as in the RoPE paper.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from ops import axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """The parameters that map positions to angles.

  `kind` is one of 'plain', 'linear', 'ntk', 'dynamic', 'llama3' and 'yarn'. Fields that a kind does
  not use keep their defaults.
  """

  theta: float = 10000.0
  kind: str = 'plain'
  factor: float = 1.0
  original_max_positions: int | None = None
  low_freq_factor: float = 1.0  # llama3
  high_freq_factor: float = 4.0  # llama3
  beta_fast: float = 32.0  # yarn
  beta_slow: float = 1.0  # yarn
  attention_factor: float | None = None  # yarn
  mscale: float | None = None  # yarn
  mscale_all_dim: float | None = None  # yarn
  truncate: bool = True  # yarn

  KINDS = ('plain', 'linear', 'ntk', 'dynamic', 'llama3', 'yarn')

  def __post_init__(self):
    if self.kind not in self.KINDS:
      raise ValueError(f'rope kind {self.kind!r} is not one of {", ".join(self.KINDS)}')
    if self.theta <= 1.0:
      raise ValueError(f'the rope theta must be greater than 1, not {self.theta}')
    if self.factor < 1.0:
      raise ValueError(f'the rope factor must be at least 1, not {self.factor}')
    if self.kind in ('dynamic', 'llama3', 'yarn') and not self.original_max_positions:
      raise ValueError(f'rope kind {self.kind!r} needs original_max_positions')
    if self.kind == 'llama3' and self.low_freq_factor >= self.high_freq_factor:
      raise ValueError(
        f'low_freq_factor {self.low_freq_factor} must be less than high_freq_factor '
        f'{self.high_freq_factor}'
      )


def frequencies(
  config: RopeConfig, rotary_width: int, length: int | jax.Array
) -> tuple[jax.Array, float]:
  """Computes the angular frequency of each pair of elements.

  `length` is the largest position plus one: a number, or an array of lengths of any shape. Only the
  kind 'dynamic' reads it. Returns the frequencies in radians per position, float32
  [rotary_width / 2] ([*length.shape, rotary_width / 2] for 'dynamic'), and the factor by which cos
  and sin are multiplied.

  Raises:
    ValueError: the width is odd, or too small for the kind.
  """
  _check_width(config, rotary_width)
  factor = 1.0
  match config.kind:
    case 'plain':
      values = _plain(config.theta, rotary_width)
    case 'linear':
      values = _plain(config.theta, rotary_width) / config.factor
    case 'ntk':
      stretch = config.factor ** (rotary_width / (rotary_width - 2))
      values = _plain(config.theta * stretch, rotary_width)
    case 'dynamic':
      values = _dynamic(config, rotary_width, length)
    case 'llama3':
      values = _llama3(config, rotary_width)
    case 'yarn':
      values, factor = _yarn(config, rotary_width), _yarn_attention_factor(config)
  return jnp.asarray(values, jnp.float32), factor


def cos_sin(
  positions_BT: jax.Array, config: RopeConfig, rotary_width: int
) -> tuple[jax.Array, jax.Array]:
  """Computes the cosines and sines that `rotate` takes: two [B, T, rotary_width] in float32.

  The two halves of the last axis are equal. The attention factor is included.
  """
  axes.check('BT', positions_BT)
  # Each row has its own length: the other rows of the batch must not change its angles.
  lengths_B1 = jnp.max(positions_BT, axis=1, keepdims=True) + 1
  values, factor = frequencies(config, rotary_width, lengths_B1)
  values = jnp.broadcast_to(values, (positions_BT.shape[0], 1, rotary_width // 2))
  angles = positions_BT.astype(jnp.float32)[:, :, None] * values
  angles = jnp.concatenate([angles, angles], axis=-1)
  return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the first `cos.shape[-1]` elements of each head and keeps the others.

  `cos` and `sin` are the results of `cos_sin`. Computes in float32 and returns the shape and dtype
  of x.
  """
  axes.check('BTNH,BTW,BTW', x_BTNH, cos, sin)
  width = cos.shape[-1]
  if width > x_BTNH.shape[-1]:
    raise ValueError(f'the rotary width {width} exceeds the head width {x_BTNH.shape[-1]}')
  x = x_BTNH[..., :width].astype(jnp.float32)
  first, second = jnp.split(x, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  x = (x * cos[:, :, None, :] + turned * sin[:, :, None, :]).astype(x_BTNH.dtype)
  if width == x_BTNH.shape[-1]:
    return x
  return jnp.concatenate([x, x_BTNH[..., width:]], axis=-1)


def _check_width(config, rotary_width):
  if rotary_width < 2 or rotary_width % 2:
    raise ValueError(f'the rotary width must be even and at least 2, not {rotary_width}')
  if config.kind in ('ntk', 'dynamic') and rotary_width < 4:
    raise ValueError(f'rope kind {config.kind!r} needs a rotary width of 4 or more')


def _plain(theta, rotary_width):
  # Static kinds use float64: at position 100,000 the last bits of a frequency matter.
  return theta ** -(np.arange(0, rotary_width, 2) / rotary_width)


def _dynamic(config, rotary_width, length):
  original = config.original_max_positions
  length = jnp.maximum(jnp.asarray(length, jnp.float32), original)
  stretch = config.factor * length / original - (config.factor - 1)
  theta = config.theta * stretch ** (rotary_width / (rotary_width - 2))
  exponents = np.arange(0, rotary_width, 2, dtype=np.float32) / rotary_width
  return theta[..., None] ** -exponents.reshape((1,) * theta.ndim + (-1,))


def _llama3(config, rotary_width):
  values = _plain(config.theta, rotary_width)
  turns = config.original_max_positions * values / (2 * math.pi)  # in the original context
  low, high = config.low_freq_factor, config.high_freq_factor
  kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return (1 - kept) * values / config.factor + kept * values


def _yarn(config, rotary_width):
  values = _plain(config.theta, rotary_width)
  low = _yarn_pair(config.beta_fast, config, rotary_width)
  high = _yarn_pair(config.beta_slow, config, rotary_width)
  if config.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rotary_width - 1)
  span = high - low if high != low else 0.001  # a ramp without length becomes a step
  stretched = np.clip((np.arange(rotary_width // 2) - low) / span, 0.0, 1.0)
  return stretched * values / config.factor + (1 - stretched) * values


def _yarn_pair(turns, config, rotary_width):
  """Returns the index, not rounded, of the pair with `turns` rotations in the original context."""
  wavelength = config.original_max_positions / (2 * math.pi * turns)
  return rotary_width * math.log(wavelength) / (2 * math.log(config.theta))


def _yarn_attention_factor(config):
  if config.attention_factor is not None:
    return config.attention_factor
  growth = 0.1 * math.log(config.factor)
  if config.mscale and config.mscale_all_dim:
    return (growth * config.mscale + 1) / (growth * config.mscale_all_dim + 1)
  return growth + 1
