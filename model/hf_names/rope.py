"""Rotary embeddings in `config.json`.

There are two forms: `rope_theta` and `rope_scaling` (transformers 4, where the key of the type is
`type` or `rope_type`), and `rope_parameters` (transformers 5). Both are read and both are written.
"""

import math

from model.hf_names import fields
from ops.rope import RopeConfig

KINDS = {
  'default': 'plain',
  'linear': 'linear',
  'dynamic': 'dynamic',
  'llama3': 'llama3',
  'yarn': 'yarn',
}


def from_hf(
  hf: dict,
  max_positions: int,
  *,
  theta_key: str = 'rope_theta',
  theta: float = 10000.0,
  types: tuple[str, ...] = tuple(KINDS),
) -> RopeConfig:
  """The rotary embedding of a config.json.

  `theta` is the base where there is none; `types` are the ones that the family supports.
  """
  scaling = parameters(hf)
  theta = fields.number(scaling, 'rope_theta', fields.number(hf, theta_key, theta))
  name = scaling.get('rope_type', scaling.get('type', 'default'))
  if name not in types:
    raise ValueError(
      f'the rope type {name!r} in config.json is not supported here; supported: {", ".join(types)}'
    )
  if name == 'default':
    return RopeConfig(theta=theta)
  common = {'theta': theta, 'kind': KINDS[name]}
  if name == 'linear':
    return RopeConfig(**common, **_numbers(scaling, name, 'factor'))
  if name == 'dynamic':
    factor = _numbers(scaling, name, 'factor')
    return RopeConfig(**common, **factor, original_max_positions=max_positions)
  # A key outside the dictionary takes precedence, as in transformers.
  original = fields.size(scaling, 'original_max_position_embeddings', max_positions)
  original = fields.size(hf, 'original_max_position_embeddings', original)
  common['original_max_positions'] = original
  if name == 'llama3':
    values = _numbers(scaling, name, 'factor', 'low_freq_factor', 'high_freq_factor')
    return RopeConfig(**common, **values)
  return RopeConfig(**common, **_yarn(scaling, max_positions / original))


def parameters(hf: dict) -> dict:
  """`rope_scaling` or, if that is absent or empty, `rope_parameters`, or an empty dictionary."""
  for key in ('rope_scaling', 'rope_parameters'):
    value = hf.get(key)
    if value:
      if not isinstance(value, dict) or any(isinstance(v, dict) for v in value.values()):
        raise ValueError(
          f'{key} in config.json must be one dictionary for all layers, not {value!r}'
        )
      return value
  return {}


def _numbers(scaling, name, *keys):
  absent = [key for key in keys if key not in scaling]
  if absent:
    raise ValueError(f'the rope type {name!r} in config.json lacks {", ".join(absent)}')
  return {key: fields.number(scaling, key, 0.0) for key in keys}


def _yarn(scaling, implied_factor):
  if 'factor' not in scaling:
    raise ValueError("the rope type 'yarn' in config.json lacks factor")
  factor = fields.number_or_null(scaling, 'factor', None)
  return {
    'factor': implied_factor if factor is None else factor,
    # Zero means absent, as in transformers.
    'beta_fast': fields.number_or_null(scaling, 'beta_fast', None) or 32.0,
    'beta_slow': fields.number_or_null(scaling, 'beta_slow', None) or 1.0,
    'attention_factor': fields.number_or_null(scaling, 'attention_factor', None),
    'mscale': fields.number_or_null(scaling, 'mscale', None),
    'mscale_all_dim': fields.number_or_null(scaling, 'mscale_all_dim', None),
    'truncate': fields.flag(scaling, 'truncate', True),
  }


def to_hf(config: RopeConfig | None, *, theta_key: str = 'rope_theta', **partial) -> dict:
  """The keys of a rotary embedding in both forms; `partial` is added to the newer one."""
  names = {kind: name for name, kind in KINDS.items()}
  if config is None or config.kind not in names:
    described = 'learned positions' if config is None else f'the rope kind {config.kind!r}'
    raise ValueError(f'config.json of this family cannot describe {described}')
  scaling = {'rope_type': names[config.kind], **_scaling_to_hf(config)}
  return {
    theta_key: config.theta,
    'rope_scaling': None if config.kind == 'plain' else scaling,
    'rope_parameters': {**scaling, 'rope_theta': config.theta, **partial},
  }


def _scaling_to_hf(config):
  keys = {
    'plain': (),
    'linear': ('factor',),
    'dynamic': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor'),
    'yarn': (
      *('factor', 'beta_fast', 'beta_slow', 'attention_factor', 'mscale', 'mscale_all_dim'),
      'truncate',
    ),
  }[config.kind]
  values = {key: getattr(config, key) for key in keys if getattr(config, key) is not None}
  if config.kind in ('llama3', 'yarn'):
    values['original_max_position_embeddings'] = config.original_max_positions
  return values


def rotary_width(head_width: int, fraction: float) -> int | None:
  """The leading part of a head that rotates; None for the whole head."""
  width = int(head_width * fraction)
  if not 0 < width <= head_width or width % 2:
    raise ValueError(
      f'a partial rotary factor of {fraction} in a head of {head_width} rotates {width} '
      'dimensions; it must be an even number of them'
    )
  return None if width == head_width else width


def rotary_fraction(head_width: int, width: int | None) -> float:
  """The fraction that `rotary_width`, and int() in transformers, turn back into `width`."""
  fraction = 1.0 if width is None else width / head_width
  exact = int(head_width * fraction) == (width or head_width)
  return fraction if exact else math.nextafter(fraction, 1.0)
