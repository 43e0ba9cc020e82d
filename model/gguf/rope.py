"""Rotary embeddings in the metadata of GGUF files, as the keys of a config.json.

Llama 3's scaling is there as one factor a pair (`rope_freqs.weight`), from which the parameters
that gave the factors are worked out again.
"""

import numpy as np

from model.gguf.fields import Fields

FACTORS = 'rope_freqs.weight'
_LONG = ('rope_factors_long.weight', 'rope_factors_short.weight')
_YARN = {'yarn_attn_factor': 'attention_factor', 'yarn_beta_fast': 'beta_fast'}
_YARN |= {'yarn_beta_slow': 'beta_slow'}
# The factors are float32, and came out of a few operations in float32.
_TOLERANCE = 1e-5
# Only ratios to this number matter, and it is not in the file. Llama 3's own, if it can be.
_ORIGINAL_POSITIONS = 8192


def to_hf(fields: Fields, max_positions: int) -> dict:
  """`rope_theta` and `rope_scaling`.

  Raises ValueError where the file asks for what is not computed here (longrope, factors of another
  origin than Llama 3's).
  """
  theta = fields.number('rope.freq_base', 10000.0)
  long = [name for name in _LONG if name in fields.tensors]
  if long:
    raise ValueError(f'{long[0]}: the rope type longrope is not supported')
  fields.refuse('rope.scaling.attn_factor', 1.0)
  fields.refuse('rope.scaling.yarn_log_multiplier', 0.0)
  scaling = _scaling(fields, max_positions)
  if FACTORS in fields.tensors:
    if scaling is not None:
      raise ValueError(f'{FACTORS} together with another rope scaling is not supported')
    scaling = from_factors(fields.tensors[FACTORS].read(), theta, max_positions)
  return {'rope_theta': theta, 'rope_scaling': scaling}


def _scaling(fields, max_positions):
  factor = fields.number('rope.scaling.factor', fields.number('rope.scale_linear', 0.0))
  kind = fields.text('rope.scaling.type', 'linear' if factor else 'none')
  if kind == 'none' or (kind == 'linear' and factor in (0.0, 1.0)):
    return None
  if kind == 'linear':
    return {'rope_type': 'linear', 'factor': factor}
  if kind != 'yarn':
    key = fields.key('rope.scaling.type')
    raise ValueError(f'{key} = {kind!r} is not supported; supported: none, linear, yarn')
  original = fields.size('rope.scaling.original_context_length', max_positions)
  extras = {ours: fields.number(f'rope.scaling.{key}', None) for key, ours in _YARN.items()}
  extras = {key: value for key, value in extras.items() if value is not None}
  # Without a factor it follows from the two lengths, as in transformers.
  common = {'factor': factor or None, 'original_max_position_embeddings': original}
  return {'rope_type': 'yarn', **common, **extras}


def from_factors(factors: np.ndarray, theta: float, max_positions: int) -> dict | None:
  """The `rope_scaling` that divides the frequency of each pair by its factor.

  Slow pairs have the largest factor, fast ones 1, and between them the share of the plain frequency
  grows linearly with it. Any line that goes through the shares in the file does as well as another.
  """
  factors = factors.astype(np.float64)
  largest = float(factors.max())
  if np.allclose(factors, 1.0, rtol=_TOLERANCE):
    return None
  if np.allclose(factors, largest, rtol=_TOLERANCE):
    return {'rope_type': 'linear', 'factor': largest}
  turns = theta ** -(np.arange(factors.size) / factors.size) / (2 * np.pi)  # a position
  shares = (1 / factors - 1 / largest) / (1 - 1 / largest)
  slope, turns_at_zero = _line(turns, shares)
  original = _ORIGINAL_POSITIONS
  if original >= max_positions:
    original = max(1, int(max_positions / largest))
  ends = original * turns_at_zero, original * (turns_at_zero + 1 / slope)
  for low, high in ([round(end, 3) for end in ends], map(float, ends)):
    kept = np.clip((original * turns - low) / (high - low), 0.0, 1.0)
    if np.allclose(factors, 1 / ((1 - kept) / largest + kept), rtol=_TOLERANCE):
      values = {'factor': largest, 'low_freq_factor': low, 'high_freq_factor': high}
      return {'rope_type': 'llama3', **values, 'original_max_position_embeddings': original}
  raise ValueError(f'{FACTORS} holds factors that no llama3 scaling gives: {factors}')


def _line(turns, shares):
  """The slope of a line through the ramp, and where it is zero; pairs go from fast to slow."""
  ramp = np.flatnonzero((shares > _TOLERANCE) & (shares < 1 - _TOLERANCE))
  if len(ramp) > 1:
    first, last = ramp[0], ramp[-1]
    slope = (shares[first] - shares[last]) / (turns[first] - turns[last])
  else:  # at least as steep as to either neighbour
    end = int((shares >= 1 - _TOLERANCE).sum())  # the first pair that is not fast
    around = slice(max(end - 1, 0), end + 1 + len(ramp))
    slope = np.max(np.diff(shares[around]) / np.diff(turns[around]))
    last = ramp[0] if len(ramp) else end
  return slope, turns[last] - shares[last] / slope
