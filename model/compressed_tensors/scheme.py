"""How a group of layers is quantized, as `config_groups` of a config.json says it.

A `Scheme` has what the bits of a layer depend on. It is written in the keys that all releases of
compressed-tensors since 0.9 know, and read from theirs, strictly: a key that would change the
numbers and is not understood is an error, never ignored.

Format: https://github.com/vllm-project/compressed-tensors, quantization/quant_args.py,
quant_scheme.py and quant_config.py (0.20).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

PACK, INT, FLOAT, NAIVE = 'pack-quantized', 'int-quantized', 'float-quantized', 'naive-quantized'
MXFP4, MXFP8, NVFP4 = 'mxfp4-pack-quantized', 'mxfp8-quantized', 'nvfp4-pack-quantized'
MIXED = 'mixed-precision'
FORMATS = (PACK, INT, FLOAT, NAIVE, MXFP4, MXFP8, NVFP4)
PLAIN = (INT, FLOAT, NAIVE)  # the codes are a tensor named weight, one number an entry
METHOD = 'compressed-tensors'
VERSION = '0.20.0'  # of the description that is written

Kind = Literal['int', 'float']
Strategy = Literal['tensor', 'channel', 'group', 'tensor_group', 'block']
_STRATEGIES = ('tensor', 'channel', 'group', 'tensor_group', 'block')
_OF_INPUTS = ('tensor', 'token', 'group', 'tensor_group')
_KNOWN = {
  *('num_bits', 'type', 'symmetric', 'strategy', 'group_size', 'dynamic', 'actorder'),
  *('block_structure', 'scale_dtype', 'zp_dtype', 'observer', 'observer_kwargs'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """How inputs are rounded: by a scale of each token, or by one that is stored."""

  bits: int
  kind: Kind = 'int'
  strategy: str = 'token'
  static: bool = False
  symmetric: bool = True

  @property
  def ours(self) -> bool:
    """Whether `ActivationQuantized` rounds so."""
    whole = self.strategy == ('tensor' if self.static else 'token')
    return self.kind == 'int' and self.bits in (8, 4) and self.symmetric and whole

  def to_json(self) -> dict[str, Any]:
    return {
      'num_bits': self.bits,
      'type': self.kind,
      'symmetric': self.symmetric,
      'strategy': self.strategy,
      'group_size': None,
      'dynamic': not self.static,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
  """The codes of a layer's weight, and how its inputs are rounded.

  group_size: how many inputs share a scale; None: all, or as `strategy` and `block` say.
  block: outputs and inputs that share a scale.
  """

  format: str
  bits: int
  kind: Kind
  strategy: Strategy
  group_size: int | None = None
  block: tuple[int, int] | None = None
  symmetric: bool = True
  inputs: Inputs | None = None

  def __post_init__(self):
    if self.format not in FORMATS:
      raise ValueError(f'the format {self.format!r} is not one of {", ".join(FORMATS)}')
    widths = {MXFP4: (4,), NVFP4: (4,), MXFP8: (8,)}.get(self.format)
    if widths is None:
      widths = range(1, 9) if self.kind == 'int' else (8,)
    if self.bits not in widths:
      raise ValueError(f'{self.format} of {self.kind} has no {self.bits!r} bits')
    if self.kind == 'float' and not self.symmetric:
      raise ValueError('floating codes have no zero points; symmetric is true')
    floats = self.format in (MXFP4, MXFP8, NVFP4, FLOAT)
    if self.format != NAIVE and floats != (self.kind == 'float'):
      raise ValueError(f'{self.format} does not hold codes of the type {self.kind}')
    self._check_groups()

  def _check_groups(self):
    grouped = self.strategy in ('group', 'tensor_group')
    if grouped != (self.group_size is not None):
      raise ValueError(f'the strategy {self.strategy} and groups of {self.group_size} do not fit')
    fixed = {MXFP4: ('group', 32), MXFP8: ('group', 32), NVFP4: ('tensor_group', 16)}
    found = self.strategy, self.group_size
    if self.format in fixed and found != fixed[self.format]:
      raise ValueError(f'{self.format} has {fixed[self.format]} as strategy and group, not {found}')
    if self.format not in fixed and self.strategy == 'tensor_group':
      raise ValueError(f'{self.format} has no strategy tensor_group')
    if (self.strategy == 'block') != (self.block is not None):
      raise ValueError(f'the strategy {self.strategy} and the block {self.block} do not fit')

  @property
  def label(self) -> str:
    """A short name, such as 'int4 g32 pack-quantized'."""
    group = f' g{self.group_size}' if self.group_size else ''
    zeros = '' if self.symmetric else ' with zero points'
    inputs = f', inputs {self.inputs.kind}{self.inputs.bits}' if self.inputs else ''
    return f'{self.kind}{self.bits}{group}{zeros}{inputs}, {self.format}'

  def to_json(self, targets: list[str]) -> dict[str, Any]:
    """The group of config.json for the modules that `targets` name."""
    weights = {
      'num_bits': self.bits,
      'type': self.kind,
      'symmetric': self.symmetric,
      'strategy': self.strategy,
      'group_size': self.group_size,
      'dynamic': False,
    }
    if self.format in (MXFP4, MXFP8):
      weights |= {'scale_dtype': 'torch.uint8', 'zp_dtype': 'torch.uint8'}
    return {
      'targets': targets,
      'format': self.format,
      'weights': weights,
      'input_activations': None if self.inputs is None else self.inputs.to_json(),
      'output_activations': None,
    }


def from_json(group: Any, format: Any) -> Scheme:
  """Reads a group of config.json; `format` is that of the whole file.

  Raises ValueError, naming the key, for what is damaged or not read.
  """
  if not isinstance(group, Mapping):
    raise ValueError(f'a group is no object but {group!r}')
  weights = _arguments(group, 'weights')
  if weights is None:
    raise ValueError('a group has no weights')
  if _flag(weights, 'dynamic', False):
    raise ValueError('the scales of weights are dynamic; only stored ones are read')
  order = weights.get('actorder')
  if order not in (None, False, 'weight', 'static', 'group', 'dynamic'):
    raise ValueError(f'actorder {order!r} is not known')
  if group.get('output_activations') is not None:
    raise ValueError('output_activations are rounded, which no weight type does')
  size = weights.get('group_size')
  size = None if size == -1 else size
  if size is not None and (type(size) is not int or size < 1):
    raise ValueError(f'group_size {size!r} is no whole number above 0')
  strategy = weights.get('strategy')
  if strategy is None:
    channel = weights.get('group_size') == -1
    strategy = 'group' if size else 'channel' if channel else 'tensor'
  return Scheme(
    format=group.get('format') or format,
    bits=_bits(weights),
    kind=_one_of(weights, 'type', ('int', 'float'), 'int'),
    strategy=_one_of({'strategy': strategy}, 'strategy', _STRATEGIES, None),
    group_size=size if strategy in ('group', 'tensor_group') else None,
    block=_block(weights.get('block_structure')),
    symmetric=_flag(weights, 'symmetric', True),
    inputs=_inputs(group),
  )


def _inputs(group) -> Inputs | None:
  found = _arguments(group, 'input_activations')
  if found is None:
    return None
  dynamic = found.get('dynamic', False)
  if dynamic not in (True, False, 'local'):
    raise ValueError(f'dynamic {dynamic!r} of input_activations is neither true nor false')
  strategy = _one_of(found, 'strategy', (*_OF_INPUTS, None), None)
  return Inputs(
    bits=_bits(found),
    kind=_one_of(found, 'type', ('int', 'float'), 'int'),
    strategy=strategy or 'tensor',
    static=dynamic is False,
    symmetric=_flag(found, 'symmetric', True),
  )


def _arguments(group, key) -> Mapping | None:
  found = group.get(key)
  if found is None:
    return None
  if not isinstance(found, Mapping):
    raise ValueError(f'{key} is no object but {found!r}')
  unknown = sorted(map(str, set(found) - _KNOWN))
  if unknown:
    raise ValueError(f'{key} has the unknown keys {", ".join(unknown)}')
  return found


def _bits(found) -> int:
  bits = found.get('num_bits', 8)
  if type(bits) is not int or not 1 <= bits <= 16:
    raise ValueError(f'num_bits {bits!r} is no width of codes')
  return bits


def _flag(found, key, default) -> bool:
  value = found.get(key, default)
  if not isinstance(value, bool):
    raise ValueError(f'{key} {value!r} is neither true nor false')
  return value


def _one_of(found, key, known, default):
  value = found.get(key, default)
  if value not in known:
    raise ValueError(f'{key} {value!r} is not one of {", ".join(map(str, known))}')
  return value


def _block(found) -> tuple[int, int] | None:
  if found is None:
    return None
  if isinstance(found, str):
    found = [int(part) if part.isdecimal() else part for part in found.split('x')]
  counts = isinstance(found, list | tuple) and all(type(n) is int and n > 0 for n in found)
  if not counts or len(found) != 2:
    raise ValueError(f'block_structure {found!r} is not two whole numbers above 0')
  return found[0], found[1]
