"""Rotary embeddings in the metadata of GGUF files, as the keys of a config.json.

Llama 3's scaling is there as one factor a pair (`rope_freqs.weight`), from which the parameters
that gave the factors are worked out again.
"""

import dataclasses

import numpy as np

from model.gguf.fields import Fields
from ops.rope import RopeConfig, frequencies

FACTORS = 'rope_freqs.weight'
_LONG = ('rope_factors_long.weight', 'rope_factors_short.weight')
_BETAS = ('yarn_beta_fast', 'yarn_beta_slow')
_YARN = {'yarn_attn_factor': 'attention_factor', **{k: k.removeprefix('yarn_') for k in _BETAS}}
# The factors are float32, and came out of a few operations in float32.
_TOLERANCE = 1e-5
# The file does not hold this number. The others are relative to it, so Llama 3's own will do.
_ORIGINAL_POSITIONS = 8192


def scaling(fields: Fields, theta: float, max_positions: int) -> dict | None:
  """The `rope_scaling` of config.json.

  Raises ValueError where the file asks for what is not computed here (longrope, factors of another
  origin than Llama 3's).
  """
  long = [name for name in _LONG if name in fields.tensors]
  if long:
    raise ValueError(f'{long[0]}: the rope type longrope is not supported')
  fields.refuse('rope.scaling.attn_factor', 1.0)
  fields.refuse('rope.scaling.yarn_log_multiplier', 0.0)
  found = _scaling(fields, max_positions)
  if FACTORS in fields.tensors:
    if found is not None:
      raise ValueError(f'{FACTORS} together with another rope scaling is not supported')
    found = from_factors(_factors(fields), theta, max_positions)
  return found


def describe(config: RopeConfig, rotary_width: int) -> tuple[dict, np.ndarray | None]:
  """What `scaling` reads: keys without the architecture in front, and the factors, if any.

  Raises ValueError for a kind that a file cannot describe.
  """
  if config.kind == 'plain':
    return {}, None
  if config.kind == 'llama3':
    plain = dataclasses.replace(config, kind='plain')
    own, scaled = (np.asarray(frequencies(c, rotary_width, 1)[0]) for c in (plain, config))
    return {}, own / scaled
  keys = {'rope.scaling.type': config.kind, 'rope.scaling.factor': config.factor}
  if config.kind == 'linear':
    return keys, None
  if config.kind != 'yarn' or config.attention_factor is not None:
    what = f'the rope kind {config.kind!r}'
    what += ' with an attention factor of its own' if config.kind == 'yarn' else ''
    raise ValueError(
      f'a GGUF file cannot describe {what}; it can describe plain, linear, llama3 and yarn'
    )
  keys['rope.scaling.original_context_length'] = config.original_max_positions
  return keys | {
    f'rope.scaling.{k}': getattr(config, k.removeprefix('yarn_')) for k in _BETAS
  }, None


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


def _factors(fields):
  """One factor for each pair of elements that rotates."""
  head_width = fields.size('embedding_length') // fields.size('attention.head_count')
  head_width = fields.size('attention.key_length', head_width)
  pairs = fields.size('rope.dimension_count', head_width) // 2
  tensor = fields.tensors[FACTORS]
  if tensor.shape != (pairs,):
    raise ValueError(f'{FACTORS} is {tensor.shape}, but {pairs} pairs of elements rotate')
  return tensor.read()


def from_factors(factors: np.ndarray, theta: float, max_positions: int) -> dict | None:
  """The `rope_scaling` that divides the frequency of each pair by its factor.

  Slow pairs have the largest factor, fast ones 1. Between them the share of the plain frequency
  grows linearly with that frequency, and any line through the shares in the file describes them.
  """
  factors = factors.astype(np.float64)
  if not (np.isfinite(factors).all() and factors.min() > 1 - _TOLERANCE):
    raise ValueError(f'{FACTORS} holds factors that are less than 1 or not finite: {factors}')
  largest = float(factors.max())
  if np.allclose(factors, 1.0, rtol=_TOLERANCE):
    return None
  if np.allclose(factors, largest, rtol=_TOLERANCE):
    return {'rope_type': 'linear', 'factor': largest}
  original = _ORIGINAL_POSITIONS
  if original >= max_positions:
    original = max(1, int(max_positions / largest))
  # Turns of each pair within the original context, and the share of its plain frequency.
  turns = original * theta ** -(np.arange(factors.size) / factors.size) / (2 * np.pi)
  shares = (1 / factors - 1 / largest) / (1 - 1 / largest)
  ends = _ramp(turns, shares)
  for low, high in ([round(end, 3) for end in ends], ends):
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if np.allclose(factors, 1 / ((1 - kept) / largest + kept), rtol=_TOLERANCE):
      values = {'factor': largest, 'low_freq_factor': low, 'high_freq_factor': high}
      return {'rope_type': 'llama3', **values, 'original_max_position_embeddings': original}
  raise ValueError(f'{FACTORS} holds factors that no llama3 scaling gives: {factors}')


def _ramp(turns, shares):
  """Where a line through the ramp is 0 and where it is 1; pairs go from fast to slow."""
  inner = np.flatnonzero((shares > _TOLERANCE) & (shares < 1 - _TOLERANCE))
  if len(inner) > 1:
    first, last = inner[0], inner[-1]
    slope = (shares[first] - shares[last]) / (turns[first] - turns[last])
  else:  # at least as steep as to either neighbour
    end = int((shares >= 1 - _TOLERANCE).sum())  # the first pair that is not fast
    around = slice(max(end - 1, 0), end + 1 + len(inner))
    slope = np.max(np.diff(shares[around]) / np.diff(turns[around]))
    last = inner[0] if len(inner) else end
  low = float(turns[last] - shares[last] / slope)
  return low, low + float(1 / slope)
