"""One layer of a checkpoint of compressed-tensors: its tensors, checked, as a weight."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from model.compressed_tensors import layout, scheme
from model.compressed_tensors.scheme import Scheme
from model.hf_quantized import parts
from model.hf_quantized.codes import Codes
from model.safetensors_io import DTYPES, Tensor
from ops.activations import ActivationQuantized
from ops.formats import E2M1_CODEBOOK
from ops.linear import Matrix
from ops.quantized import QuantizedTensor
from ops.scales import E4m3Scales

_INT8, _INT32, _INT64 = (np.dtype(dtype) for dtype in (np.int8, np.int32, np.int64))
_BYTES = np.dtype(np.uint8)
_FP8 = DTYPES['F8_E4M3']
_FLOATS = (DTYPES['F16'], DTYPES['BF16'], DTYPES['F32'])
_FOURS = (scheme.MXFP4, scheme.NVFP4)
_OURS = {scheme.MXFP4: 'mxfp4', scheme.NVFP4: 'nvfp4', scheme.MXFP8: 'mxfp8'}
_INTEGERS = {2: 'int2', 3: 'int3', 4: 'int4', 8: 'int8'}
_SCALES = {scheme.MXFP4: (_BYTES,), scheme.MXFP8: (_BYTES,), scheme.NVFP4: (_FP8,)}
_NAN_SCALE = 255  # of the bytes that are powers of two


@dataclasses.dataclass(frozen=True)
class Layer:
  shape: tuple[int, int]  # (O, I)
  codes: Callable[[], 'Held']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
  """Codes, and what is stored of the whole matrix; used as `codes.Codes` is.

  powers: the scales are bytes that stand for powers of two, uint8 [J, O], or None.
  small: the scales are e4m3 numbers [J, O], all divided by `divisor`, or None.
  inputs: the bits that inputs are rounded to, or None.  input_scale: of all tokens, or None.
  """

  plain: Codes
  powers: np.ndarray | None = None
  small: np.ndarray | None = None
  divisor: np.ndarray | None = None
  inputs: int | None = None
  input_scale: np.ndarray | None = None

  @property
  def finite(self) -> bool:
    numbers = [one for one in (self.divisor, self.input_scale) if one is not None]
    return self.plain.finite and all(bool(np.isfinite(one).all()) for one in numbers)

  def dense(self) -> np.ndarray:
    """The numbers, float32 [I, O]."""
    return self.plain.dense()

  def columns(self, places: np.ndarray) -> 'Held':
    """Some of the outputs, in this order."""
    take = lambda array: None if array is None else array[:, places]
    return dataclasses.replace(
      self, plain=self.plain.columns(places), powers=take(self.powers), small=take(self.small)
    )

  def weight(self, dtype: jnp.dtype) -> Matrix | str:
    """The weight with the same numbers, or why there is none; `dtype` is that of its dense form."""
    w = self.plain.weight(dtype)
    if isinstance(w, str):
      return w
    w = self._with_own_scales(w)
    if self.inputs is None:
      return w
    scale = None if self.input_scale is None else jnp.asarray(self.input_scale.reshape(()))
    return ActivationQuantized(w, scale, self.inputs)

  def _with_own_scales(self, w: QuantizedTensor) -> QuantizedTensor:
    if self.powers is not None:
      powers = jnp.asarray(np.ascontiguousarray(self.powers).view(DTYPES['F8_E8M0']))
      return dataclasses.replace(w, scales=powers)
    if self.small is not None:
      scale = jnp.asarray(np.float32(1) / self.divisor.reshape(()))
      return dataclasses.replace(w, scales=E4m3Scales(jnp.array(self.small), scale))
    return w


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spread:
  """Which scale an entry of a matrix (O, I) has, of scales [rows, columns]."""

  rows: int
  columns: int
  outputs: int
  height: int  # outputs that share a scale
  width: int  # inputs that share a scale

  def fits(self, shape: tuple[int, ...]) -> bool:
    """Whether scales of this shape, perhaps without axes of length 1, are meant."""
    long = [n for n in shape if n != 1]
    return len(shape) <= 2 and long == [n for n in (self.rows, self.columns) if n != 1]

  def of_columns(self, array: np.ndarray) -> np.ndarray:
    """The scales as [J, O]."""
    rows = array.reshape(self.rows, self.columns)
    return np.ascontiguousarray(np.repeat(rows, self.height, 0)[: self.outputs].T)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensors:
  """The tensors of one layer, whose shapes and dtypes fit."""

  own: Scheme
  inputs: int
  spread: _Spread
  values: Tensor
  scales: Tensor
  zeros: Tensor | None
  order: Tensor | None
  divisor: Tensor | None
  input_scale: Tensor | None


def take(left: dict[str, Tensor], name: str, own: Scheme) -> Layer:
  """Takes the tensors of a layer out of `left`.

  Raises ValueError, naming the tensor, where one is missing or does not fit the scheme.
  """
  of = functools.partial(parts.take, left, name)
  values, outputs, inputs = _values(of, name, own)
  if min(outputs, inputs) < 1:
    raise ValueError(f'the matrix has the shape {(outputs, inputs)}')
  spread = _spread(own, outputs, inputs)
  scales = of('weight_scale', _SCALES.get(own.format, _FLOATS))
  if not spread.fits(scales.shape):
    expected = spread.rows, spread.columns
    raise ValueError(f'{name}.weight_scale has the shape {scales.shape}, not {expected}')
  zeros = None if own.symmetric else _zeros(of, name, own, spread)
  if own.symmetric:
    left.pop(f'{name}.weight_zero_point', None)  # older files have zeros there
  order = of('weight_g_idx', (_INT32, _INT64), 1) if f'{name}.weight_g_idx' in left else None
  if order is not None:
    parts.require(order, f'{name}.weight_g_idx', (inputs,))
  divisor = _constant(of, 'weight_global_scale') if own.format == scheme.NVFP4 else None
  static = own.inputs is not None and own.inputs.static and own.inputs.ours
  input_scale = _constant(of, 'input_scale') if static else None
  left.pop(f'{name}.input_scale', None)
  tensors = _Tensors(
    own=own,
    inputs=inputs,
    spread=spread,
    values=values,
    scales=scales,
    zeros=zeros,
    order=order,
    divisor=divisor,
    input_scale=input_scale,
  )
  return Layer((outputs, inputs), functools.partial(_held, tensors))


def _values(of, name, own) -> tuple[Tensor, int, int]:
  """The codes, and the shape of the matrix (O, I)."""
  if own.format not in (scheme.PACK, *_FOURS):
    values = of('weight', (_INT8,) if own.kind == 'int' else (_FP8,), 2)
    return values, *values.shape
  packed = of('weight_packed', (_BYTES if own.format in _FOURS else _INT32,), 2)
  if own.format in _FOURS:
    return packed, packed.shape[0], 2 * packed.shape[1]
  stated = of('weight_shape', (_INT64, _INT32), 1)
  parts.require(stated, f'{name}.weight_shape', (2,))
  outputs, inputs = (int(n) for n in stated.read())
  words = layout.words(inputs, own.bits), -(-inputs // (layout.WORD // own.bits))
  if packed.shape not in [(outputs, one) for one in words]:
    raise ValueError(
      f'{name}.weight_packed has the shape {packed.shape}, and weight_shape is '
      f'{(outputs, inputs)} of {own.bits} bits'
    )
  return packed, outputs, inputs


def _spread(own: Scheme, outputs: int, inputs: int) -> _Spread:
  height, width = own.block or (1, own.group_size or inputs)
  height = outputs if own.strategy == 'tensor' else min(height, outputs)
  if own.strategy != 'block' and inputs % width:
    raise ValueError(f'groups of {width} do not divide {inputs} inputs')
  rows, columns = -(-outputs // height), -(-inputs // width)
  return _Spread(rows=rows, columns=columns, outputs=outputs, height=height, width=width)


def _zeros(of, name, own, spread) -> Tensor:
  packed = own.format == scheme.PACK and own.strategy in ('group', 'channel')
  zeros = of('weight_zero_point', (_INT32 if packed else _INT8,))
  if packed:
    words = {layout.words(spread.rows, own.bits), -(-spread.rows // (layout.WORD // own.bits))}
    fits = zeros.shape in [(count, spread.columns) for count in words]
  else:
    fits = spread.fits(zeros.shape)
  if not fits:
    raise ValueError(f'{name}.weight_zero_point has the shape {zeros.shape}')
  return zeros


def _constant(of, leaf) -> Tensor:
  tensor = of(leaf, _FLOATS)
  if tensor.shape not in ((), (1,)):
    raise ValueError(f'{leaf} has the shape {tensor.shape}, not one number')
  return tensor


def _held(tensors: _Tensors) -> Held:
  own, spread = tensors.own, tensors.spread
  rows = np.arange(tensors.inputs) // spread.width
  if tensors.order is not None:
    rows = _order(tensors.order.read(), spread.columns)
  scales, more = _scales(tensors)
  plain = Codes(
    values=np.ascontiguousarray(_codes(tensors).T),
    scales=scales,
    zeros=_zero_points(tensors, scales.shape) if own.kind == 'int' else None,
    rows=rows,
    codebook=np.array(E2M1_CODEBOOK, np.float32) if own.format in _FOURS else None,
    format=_INTEGERS.get(own.bits) if own.kind == 'int' else _OURS.get(own.format, 'fp8_e4m3'),
  )
  if own.inputs is None or not own.inputs.ours:
    return Held(plain=plain, **more)
  if tensors.input_scale is not None:
    more['input_scale'] = _positive(tensors.input_scale, 'input_scale')
  return Held(plain=plain, inputs=own.inputs.bits, **more)


def _codes(tensors: _Tensors) -> np.ndarray:
  """The codes [O, I]: unsigned integers, indices of the code book, or fp8."""
  own, values = tensors.own, tensors.values.read()
  if own.format in _FOURS:
    return layout.unpack_pairs(values)
  if own.format == scheme.PACK:
    return layout.unpack_words(values, own.bits, tensors.inputs)
  return _unsigned(values, own.bits) if own.kind == 'int' else values


def _unsigned(values: np.ndarray, bits: int) -> np.ndarray:
  found = values.astype(np.int16) + 2 ** (bits - 1)
  if found.size and (found.min() < 0 or found.max() >= 2**bits):
    raise ValueError(f'{values.min()} to {values.max()} are no numbers of {bits} bits')
  return found.astype(np.uint8)


def _scales(tensors: _Tensors) -> tuple[np.ndarray, dict[str, Any]]:
  """The scales [J, O] as numbers, and how they are stored where a weight type has that form."""
  found = tensors.spread.of_columns(tensors.scales.read())
  if tensors.own.format == scheme.NVFP4:
    divisor = _positive(tensors.divisor, 'weight_global_scale')
    scales = found.astype(np.float32) * (np.float32(1) / divisor)
    return scales, {'small': found, 'divisor': divisor}
  if found.dtype != _BYTES:
    return found, {}
  if (found == _NAN_SCALE).any():
    raise ValueError('weight_scale has the byte 255, which is no number')
  return np.exp2(found.astype(np.float32) - 127), {'powers': found}


def _positive(tensor: Tensor, leaf: str) -> np.ndarray:
  number = tensor.read().astype(np.float32).reshape(())
  if not np.isfinite(number) or number <= np.finfo(np.float32).tiny:
    raise ValueError(f'{leaf} is {number}, not a number above 0')
  return number


def _zero_points(tensors: _Tensors, shape: tuple[int, int]) -> np.ndarray:
  own = tensors.own
  if tensors.zeros is None:
    return np.full(shape, 2 ** (own.bits - 1), np.int16)
  values = tensors.zeros.read()
  if values.dtype == _INT8:
    unsigned = _unsigned(values, own.bits)
  else:
    unsigned = layout.unpack_words(values.T, own.bits, tensors.spread.rows).T
  return tensors.spread.of_columns(unsigned).astype(np.int16)


def _order(groups_I: np.ndarray, groups: int) -> np.ndarray:
  if groups_I.min() < 0 or groups_I.max() >= groups:
    raise ValueError(f'weight_g_idx has groups {groups_I.min()} to {groups_I.max()}, of {groups}')
  return groups_I.astype(np.int64)
