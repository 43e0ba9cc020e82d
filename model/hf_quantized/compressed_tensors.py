"""Checkpoints of compressed-tensors, as llm-compressor and `model.compressed_tensors` write them.

`config_groups` says what the codes of a layer are; which layers have some follows from the tensors.
The names of a layer X are (weights are [O, I], and J groups of inputs share a scale):

  pack-quantized        X.weight_packed int32 [O, I * b / 32], X.weight_scale [O, J],
                        X.weight_zero_point int32 [O * b / 32, J], X.weight_shape,
                        and X.weight_g_idx int32 [I] where columns were quantized in another order
  int-, float-, naive-  X.weight int8 or e4m3 [O, I], X.weight_scale, X.weight_zero_point int8
  mxfp4-, nvfp4-pack-   X.weight_packed uint8 [O, I / 2], X.weight_scale uint8 or e4m3, and
                        X.weight_global_scale float32 [1], which scales are divided by
  mxfp8-                X.weight e4m3, X.weight_scale uint8

and any of the second row, or plain numbers, may be a bitmask and values (`compressed_tensors.masks`
names them). Inputs that are rounded to integers, by a scale of each token or a stored one
(X.input_scale), stay so. What no weight type does (inputs rounded to floats, quantized caches) is
left out, and a warning is logged.

Format: https://github.com/vllm-project/compressed-tensors, 0.9 to 0.20.
"""

import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from model.compressed_tensors import scheme
from model.compressed_tensors.scheme import Scheme
from model.hf_quantized import compressed_layer, compressed_masks, parts
from model.hf_quantized.codes import FLOAT32, CodedTensor
from model.safetensors_io import Tensor

LOG = logging.getLogger(__name__)
SCALE, PACKED, PLAIN = 'weight_scale', 'weight_packed', 'weight'
# Scales of what is computed at run time, and which no weight type has.
UNUSED = (
  *('input_zero_point', 'input_global_scale', 'output_scale', 'output_zero_point'),
  *('q_scale', 'k_scale', 'v_scale', 'q_zero_point', 'k_zero_point', 'v_zero_point'),
)
_STATES = (None, 'compressed')


def read(settings: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """The tensors of the plain model. Raises ValueError as `Method.read` says."""
  left = compressed_masks.expanded(settings.get('sparsity_config'), dict(stored))
  groups = _groups(settings)
  names = list(dict.fromkeys(parts.modules(left, PACKED) + parts.modules(left, SCALE)))
  if names and not groups:
    raise ValueError(f'{names[0]} is stored as codes, and config_groups in config.json is empty')
  dropped = set()
  for name in names:
    own = _scheme(groups, name)
    if own.inputs is not None and not own.inputs.ours:
      dropped.add(f'inputs are not rounded to {own.inputs.kind}{own.inputs.bits}')
    left[f'{name}.weight'] = _layer(left, name, own)
  if settings.get('kv_cache_scheme'):
    dropped.add('the cache is not quantized')
  for line in sorted(dropped):
    LOG.warning('what the checkpoint says of running the model is left out: %s', line)
  return left


def _groups(settings) -> list[tuple[list[str], Scheme]]:
  """The targets and the scheme of each group, in order. Raises ValueError, naming the key."""
  transforms = settings.get('transform_config') or {}
  if not isinstance(transforms, Mapping) or transforms.get('config_groups'):
    raise ValueError('transform_config rotates inputs at run time, which is not supported')
  state = settings.get('quantization_status')
  if state not in _STATES:
    raise ValueError(f'quantization_status is {state!r}; only compressed checkpoints are read')
  found = settings.get('config_groups') or {}
  if not isinstance(found, Mapping):
    raise ValueError(f'config_groups must be a JSON object, not {found!r}')
  return [_group(name, group, settings.get('format')) for name, group in found.items()]


def _group(name, group, format):
  try:
    own, targets = scheme.from_json(group, format), group.get('targets')
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
      raise ValueError(f'targets must be a list of names, not {targets!r}')
    for one in targets:
      if one.startswith('re:'):
        re.compile(one.removeprefix('re:'))
  except (ValueError, re.error) as error:
    raise ValueError(f'config_groups in config.json, {name}: {error}') from None
  return targets, own


def _scheme(groups, name: str) -> Scheme:
  """The scheme of a layer: by its name, by an expression, or that of all linear layers."""
  if len(groups) == 1:
    return groups[0][1]
  matches = (
    lambda target: target == name,
    lambda target: target.startswith('re:') and re.match(target.removeprefix('re:'), name),
    lambda target: target == 'Linear',
  )
  for fits in matches:
    for targets, own in groups:
      if any(fits(target) for target in targets):
        return own
  raise ValueError(f'{name} is stored as codes, and no target in config_groups names it')


def _layer(left: dict[str, Tensor], name: str, own: Scheme) -> CodedTensor:
  """Takes the tensors of a layer out of `left`, and checks them against its scheme."""
  try:
    layer = compressed_layer.take(left, name, own)
  except ValueError as error:
    raise ValueError(f'{name}, {own.label}: {error}') from None
  codes = functools.partial(_named, name, layer.codes)
  return CodedTensor(layer.shape, FLOAT32, lambda: np.ascontiguousarray(codes().dense().T), codes)


def _named(name, codes):
  try:
    return codes()
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from None
