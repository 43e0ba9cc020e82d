"""How weights are laid out for the native products of the CPU, once when a model is loaded.

`pack` turns a weight into a `PackedTensor` of the same numbers; the layout is that of types.h.
"""

import functools

import jax
import jax.numpy as jnp

from ops import experts
from ops.activations import ActivationQuantized
from ops.kernels import cpu
from ops.kernels.cpu.packed import (
  FORMAT_NUMBERS,
  GROUP_MULTIPLE,
  SPARSE_NUMBERS,
  STEPS,
  TILE,
  Activations,
  PackedTensor,
)
from ops.linear import Matrix, Weight, dense, map_inner
from ops.quantized import FORMATS, QuantizedTensor, wide_scales
from ops.sparse import SparseTensor

# Codes of 2 and 3 bits take 4 in memory, as they would have to be taken apart in every product.
LAYOUTS = {'int2': 'int4', 'int3': 'int4', 'mxfp4': 'e2m1', 'nvfp4': 'e2m1', 'mxfp8': 'fp8_e4m3'}


def pack(w: Matrix, activations: Activations = 'int16') -> Matrix:
  """Lays out a weight for the native products, or returns it as it is where there is none for it.

  There are products for half-precision arrays, for int8, int4, int3, int2, NF4, fp8, mxfp4, mxfp8
  and nvfp4 (groups of a multiple of 16 inputs, or whole columns; integer zero points), for 2:4
  matrices of bf16 and of symmetric integers, and for these inside weights that rotate or round
  their inputs or add a low-rank correction. Experts, a leading axis, are laid out one after the
  other. 2 and 3 bits become 4 in memory, scales of 8 bits 16
  (mxfp4, mxfp8) or 32 (nvfp4, double quantization).
  """
  if not cpu.available():
    return w
  # Inputs that the weight rounds itself are codes; rounding them again would change them.
  form = 'float' if _rounds_inputs(w) else activations
  return map_inner(lambda inner: _encode_any(inner, form) if can_pack(inner) else inner, w)


def pack_widened(w: Matrix) -> Matrix:
  """Lays out the half-precision matrix that a weight is multiplied as, for products of many rows.

  Those are bound by arithmetic, and are fastest by half-precision numbers, however few bits the
  weight is stored in. Returns the weight as it is where there is no such product: another dtype, no
  library; 8-bit codes, which half precision would round.
  """
  half = w.dtype in (jnp.bfloat16, jnp.float16) and len(w.shape) in (2, 3)
  return map_inner(_widen, w) if half and cpu.available() else w


def _widen(w: Matrix) -> Matrix:
  eight_bits = isinstance(w, QuantizedTensor) and FORMATS[w.format].bits == 8
  return w if eight_bits else _encode_widened(w)


def _rounds_inputs(w: Matrix) -> bool:
  while isinstance(w, Weight) and w.passes_to and not isinstance(w, ActivationQuantized):
    w = getattr(w, w.passes_to)
  return isinstance(w, ActivationQuantized)


def can_pack(w: Matrix) -> bool:
  """Whether there is a layout for this weight, or for each of the experts of a stack."""
  if len(w.shape) not in (2, 3):
    return False
  if isinstance(w, SparseTensor):
    return (w.n, w.m) == (2, 4) and _can_pack_kept(w.values)
  if isinstance(w, QuantizedTensor):
    known = _layout(w) in FORMAT_NUMBERS and (w.zeros is None or w.zeros.dtype == jnp.uint8)
    return known and (w.group_size == w.inputs or w.group_size % GROUP_MULTIPLE == 0)
  return not isinstance(w, Weight) and w.dtype in (jnp.bfloat16, jnp.float16)


def _can_pack_kept(w: Matrix) -> bool:
  if isinstance(w, QuantizedTensor):
    return can_pack(w) and _layout(w) in SPARSE_NUMBERS and w.zeros is None
  return not isinstance(w, Weight) and w.dtype == jnp.bfloat16


@functools.partial(jax.jit, static_argnums=1)
def _encode_any(w: Matrix, activations: Activations) -> PackedTensor:
  own = functools.partial(encode, activations=activations)
  return own(w) if experts.count(w) is None else experts.each(own, w)


@functools.partial(jax.jit, static_argnums=1, static_argnames='activations')
def encode(w: Matrix, activations: Activations = 'int16') -> PackedTensor:
  """The packed form of a weight that `can_pack` accepts, whether or not there is a library."""
  inputs, outputs = w.shape
  if isinstance(w, SparseTensor):
    return _encode_sparse(w, activations)
  if not isinstance(w, QuantizedTensor):
    name = str(w.dtype)
    values = _to_tiles(w, STEPS[name])
    return PackedTensor(values, None, None, None, name, inputs, outputs, 'float', w.dtype)
  signed, layout = w.zeros is None, _layout(w)
  codes_IO, zeros = w.values, w.zeros
  if layout == 'int8':
    codes_IO = _offset(codes_IO) if signed else codes_IO.astype(jnp.uint8)
  four_bits = FORMATS[w.format].bits <= 4
  if four_bits:
    codes_IO = _nibbles(w)
  values = _to_tiles(codes_IO, STEPS[layout])
  if four_bits:
    values = _join_halves(values)
  scales = _to_groups(wide_scales(w))
  zeros = None if signed else _to_groups(zeros)
  form = activations if four_bits or layout == 'int8' else 'float'
  return PackedTensor(values, None, scales, zeros, layout, inputs, outputs, form, w.dtype)


@jax.jit
def _encode_widened(w: Matrix) -> PackedTensor:
  widen = lambda own: encode(dense(own))
  return widen(w) if experts.count(w) is None else experts.each(widen, w)


def _encode_sparse(w: SparseTensor, activations) -> PackedTensor:
  inputs, outputs = w.shape
  places, kept = _to_places(w), w.values
  if not isinstance(kept, QuantizedTensor):
    values = _to_tiles(kept, w.n)
    return PackedTensor(
      values, places, None, None, 'bfloat16', inputs, outputs, 'float', kept.dtype
    )
  if kept.format == 'int8':
    values = _to_tiles(jax.lax.bitcast_convert_type(kept.values, jnp.uint8), w.n)
  else:
    values = _join_halves(_to_tiles(_nibbles(kept) ^ 8, w.n))
  scales = _to_groups(dense(kept.scales))
  return PackedTensor(
    values, places, scales, None, _layout(kept), inputs, outputs, activations, kept.dtype
  )


def _offset(codes_IO):
  return jax.lax.bitcast_convert_type(codes_IO, jnp.uint8) ^ 0x80


def _layout(w: QuantizedTensor) -> str:
  return LAYOUTS.get(w.format, w.format)


def _nibbles(w: QuantizedTensor):
  missing = 8 - 2 ** (FORMATS[w.format].bits - 1)  # of what was added to a signed code
  return w.stored_codes() + jnp.uint8(missing if w.zeros is None else 0)


def _to_tiles(a_IO, step: int):
  inputs, outputs = a_IO.shape
  filled = jnp.pad(a_IO, ((0, -inputs % step), (0, -outputs % TILE)))
  return filled.reshape(-1, step, filled.shape[1] // TILE, TILE).transpose(2, 0, 3, 1)


def _join_halves(tiles):
  return tiles[:, :, : TILE // 2] | tiles[:, :, TILE // 2 :] << 4


def _to_places(w: SparseTensor):
  bits_IO = jnp.uint8(1) << w.positions()
  four_IO = bits_IO.reshape(-1, w.n, bits_IO.shape[1]).sum(1, dtype=jnp.uint8)
  return _join_halves(_to_tiles(four_IO, 1))[..., 0]


def _to_groups(a_JO):
  filled = jnp.pad(a_JO, ((0, 0), (0, -a_JO.shape[1] % TILE)))
  return filled.reshape(a_JO.shape[0], -1, TILE).transpose(1, 0, 2)
