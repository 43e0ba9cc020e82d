"""Our weights as codes, scales and zero points of compressed-tensors: [I, O], in numpy.

Integers of 2 and 3 bits are written as 4-bit ones, whose codes hold theirs. N:M-sparse and masked
weights get the code of zero where nothing is stored. Scales that are quantized themselves are
written as the float32 numbers that they stand for, but NVFP4's, which have a form of their own.
`scheme_of` needs no values and takes experts too; the other functions take one matrix.
"""

import jax.numpy as jnp
import numpy as np

from model.compressed_tensors import scheme
from model.compressed_tensors.scheme import Inputs, Scheme
from ops.activations import ActivationQuantized
from ops.formats import FORMATS
from ops.linear import Matrix, Weight, dense, stored
from ops.masked import MaskedTensor
from ops.quantized import QuantizedTensor
from ops.scales import E4m3Scales
from ops.sparse import SparseTensor

FP8 = np.dtype(jnp.float8_e4m3fn)
# Format of ours -> format of theirs for weights alone, and where inputs are rounded too.
_FORMS = {
  'int8': (scheme.PACK, scheme.INT),
  'int4': (scheme.PACK, scheme.INT),
  'int3': (scheme.PACK, scheme.INT),
  'int2': (scheme.PACK, scheme.INT),
  'fp8_e4m3': (scheme.NAIVE, scheme.FLOAT),
  'mxfp4': (scheme.MXFP4, scheme.MXFP4),
  'mxfp8': (scheme.MXFP8, scheme.MXFP8),
  'nvfp4': (scheme.NVFP4, scheme.NVFP4),
}


def scheme_of(w: Matrix) -> Scheme:
  """The scheme that holds the codes of a weight. Raises ValueError, saying why, if none does."""
  w, inputs = _inputs_of(w)
  core, size = _core(w)
  format = _FORMS[core.format][inputs is not None]
  spec, whole = FORMATS[core.format], core.group_size == core.inputs
  strategy = 'channel' if whole and spec.block is None else 'group'
  if format == scheme.NVFP4:
    strategy = 'tensor_group'
  return Scheme(
    format=format,
    bits=max(spec.bits, 4),
    kind='int' if spec.integer else 'float',
    strategy=strategy,
    group_size=None if strategy == 'channel' else size,
    symmetric=core.zeros is None,
    inputs=inputs,
  )


def _inputs_of(w: Matrix) -> tuple[Matrix, Inputs | None]:
  w = stored(w)
  if not isinstance(w, ActivationQuantized):
    return w, None
  static = w.scale is not None
  return w.values, Inputs(bits=w.bits, static=static, strategy='tensor' if static else 'token')


def _core(w: Matrix) -> tuple[QuantizedTensor, int]:
  """The codes inside a weight, and how many inputs of the whole matrix share a scale."""
  if isinstance(w, MaskedTensor):
    return _core(w.values)
  if isinstance(w, SparseTensor):
    core, size = _core(w.values)
    if size % w.n and size != core.inputs:
      raise ValueError(f'groups of {size} kept inputs end within the {w.n}:{w.m} pattern')
    return core, size * w.m // w.n
  if not isinstance(w, QuantizedTensor):
    name = type(w).__name__ if isinstance(w, Weight) else 'array'
    raise ValueError(f'{"an" if name[0] in "aA" else "a"} {name} has no codes')
  if w.format not in _FORMS:
    raise ValueError(f'the format has no {w.format}')
  if not w.holds_zero:
    raise ValueError('the format has no zero points that are not integers')
  return w, w.group_size


def codes(w: Matrix) -> np.ndarray:
  """The codes of all inputs: int8 if symmetric, else uint8; fp8; or the 4 bits of e2m1."""
  return _codes(_inputs_of(w)[0])


def _codes(w) -> np.ndarray:
  if isinstance(w, QuantizedTensor):
    spec = FORMATS[w.format]
    if spec.codebook is not None:
      return np.asarray(w.stored_codes()).astype(np.uint8)
    found = np.asarray(w.codes())
    return found.astype(np.int8 if w.zeros is None else np.uint8) if spec.integer else found
  held = _codes(w.values)
  if isinstance(w, MaskedTensor):
    return np.where(np.asarray(w.kept()), held, _zero_codes(w, held.dtype))
  whole = _zero_codes(w, held.dtype)
  groups = np.arange(len(held))[:, None] // w.n * w.m
  np.put_along_axis(whole, groups + np.asarray(w.positions()), held, 0)
  return whole


def _zero_codes(w, dtype) -> np.ndarray:
  """The codes that stand for 0 everywhere in a matrix."""
  core, size = _core(w)
  if core.zeros is None:
    return np.zeros(w.shape, dtype)
  return np.repeat(np.asarray(core.zeros), size, axis=0)


def scales(w: Matrix) -> np.ndarray:
  """The scales [J, O] as they are stored: floating, bytes of powers of two, or e4m3."""
  core, _ = _core(_inputs_of(w)[0])
  if isinstance(core.scales, E4m3Scales):
    return np.asarray(core.scales.values)
  found = np.asarray(dense(core.scales))
  return found.view(np.uint8) if found.dtype == jnp.float8_e8m0fnu else found


def scale_dtype(w: Matrix, around: np.dtype) -> np.dtype:
  """What scales are written in, where other parameters have the dtype `around`.

  That is their own, but float32 in a model of float32: readers widen in the dtype of the scales.
  """
  core, _ = _core(_inputs_of(w)[0])
  if isinstance(core.scales, E4m3Scales):
    return np.dtype(core.scales.values.dtype)
  if core.scales.dtype == jnp.float8_e8m0fnu:
    return np.dtype(np.uint8)
  own = np.dtype(core.scales.dtype)
  return np.dtype(np.float32) if around == np.float32 else own


def zeros(w: Matrix) -> np.ndarray:
  """The zero points [J, O] of an asymmetric weight, uint8."""
  return np.asarray(_core(_inputs_of(w)[0])[0].zeros)


def constants(w: Matrix) -> dict[str, np.ndarray]:
  """The numbers that belong to a whole matrix, by the name of their tensor: float32 [1]."""
  found = {}
  around = stored(w)
  if isinstance(around, ActivationQuantized) and around.scale is not None:
    found['input_scale'] = np.asarray(around.scale, np.float32).reshape(1)
  core, _ = _core(_inputs_of(w)[0])
  if isinstance(core.scales, E4m3Scales):
    found['weight_global_scale'] = reciprocal(np.asarray(core.scales.scale)).reshape(1)
  return found


def reciprocal(scale: np.ndarray) -> np.ndarray:
  """1 / scale in float32; of the neighbours of the quotient, the one whose own is the scale."""
  scale = np.float32(scale)
  first = np.float32(1) / scale
  for one in (first, *(np.nextafter(first, np.float32(to)) for to in (0, np.inf))):
    if np.float32(1) / one == scale:
      return one
  return first


def unsigned(codes_IO: np.ndarray, bits: int) -> np.ndarray:
  """Codes as they are packed: unsigned, with 2**(bits - 1) for the 0 of symmetric ones."""
  if codes_IO.dtype != np.int8:
    return codes_IO
  return (codes_IO.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)


def signed(codes_IO: np.ndarray, bits: int) -> np.ndarray:
  """Codes as int8, where asymmetric ones are stored as numbers."""
  if codes_IO.dtype != np.uint8:
    return codes_IO
  return (codes_IO.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
