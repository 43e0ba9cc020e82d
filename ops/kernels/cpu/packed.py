"""Weights laid out for the native products of the CPU, and those products.

A `PackedTensor` stands for the same numbers as the weight that `layout.pack` made it from. Its
`matmul` reads the packed bytes once, from the first to the last, and never widens them in memory;
on another platform, or without the library, it multiplies by `dense()`.

By default ('int16'), activations that meet low-bit integers are rounded to int16, with a scale for
each block of up to 128 inputs (`PackedTensor.block`); their products with the codes are summed in
int32 without error. A block's activations are off by at most 2^-14 of the largest one, which no
perplexity shows. int8 would need half the arithmetic, but outliers of trained models make it cost
up to 1 % of perplexity. 'float' keeps activations as they are.

Half-precision and fp8 weights always take float activations: bf16 weights are widened to float32
in registers, as exact as a float32 product, and multiplied by bf16 activations in pairs where the
CPU has AVX512-BF16.

The layout is described in types.h. In short: tiles of 32 outputs, within a tile steps of 4 inputs
(8 and 4 bits, 2:4), 2 (bf16) or 1 (f16, fp8), what is missing filled with zeros. Of a 2:4 matrix
the kept values alone are stored and read, with 4 bits for each four inputs that say which they are.
"""

import dataclasses
import functools
import itertools
import typing
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ops import grouped
from ops.formats import E2M1_CODEBOOK, NF4_CODEBOOK
from ops.kernels import cpu
from ops.linear import Weight, array, is_count, require, weight_type

Activations = Literal['int16', 'float']

TILE = 32  # outputs
FORMAT_NUMBERS = {
  'int8': 0,
  'int4': 1,
  'nf4': 2,
  'bfloat16': 3,
  'float16': 4,
  'fp8_e4m3': 5,
  'e2m1': 9,  # after those of 2:4
}
STEPS = {'int8': 4, 'int4': 4, 'nf4': 4, 'bfloat16': 2, 'float16': 1, 'fp8_e4m3': 1, 'e2m1': 4}
CODEBOOKS = {'nf4': NF4_CODEBOOK, 'e2m1': E2M1_CODEBOOK}
SPARSE_NUMBERS = {'int8': 6, 'int4': 7, 'bfloat16': 8}
SPARSE_STEP = 4
GROUP_MULTIPLE = 16  # activations are rounded in blocks of at least this many inputs
MOST_PRODUCTS = 8  # of one native call
NO_SCALES = np.zeros((0,), np.float32)
NO_BYTES = np.zeros((0,), np.uint8)


@weight_type
@dataclasses.dataclass(frozen=True)
class PackedTensor(Weight):
  """A matrix (I, O) as the native products read it.

  values: [tiles, steps, ...]: uint8 [.., 32, 4] for 8-bit codes (signed ones with 128 added), uint8
    [.., 16, 4] for 4-bit codes (output o low, o + 16 high), bfloat16 [.., 32, 2], float16 or
    float8_e4m3fn [.., 32, 1]. Of a 2:4 matrix the kept values alone: int8 (nothing added) and
    bfloat16 [.., 32, 2], int4 (signed) [.., 16, 2].
  places: uint8 [tiles, steps, 16] for a 2:4 matrix: of an output's four bits, bit i says that input
    i of the step is kept (output o low, o + 16 high). Else None.
  scales: bfloat16, float16 or float32 [tiles, J, 32]; None for half precision.
  zeros: uint8 [tiles, J, 32] for an asymmetric format, whose codes are unsigned already, else None.
  """

  values: jax.Array = array('OI__', 'code')
  places: jax.Array | None = array('OI_', 'mask', optional=True)
  scales: jax.Array | None = array('_JO', 'scale', optional=True)
  zeros: jax.Array | None = array('_JO', 'scale', optional=True)
  format: str
  inputs: int
  outputs: int
  activations: Activations
  dtype: jnp.dtype

  def check_fields(self):
    known = FORMAT_NUMBERS if self.places is None else SPARSE_NUMBERS
    require(self.format in known, f'format {self.format!r} is not one of {", ".join(known)}')
    forms = typing.get_args(Activations)
    require(self.activations in forms, f'activations are {forms}, not {self.activations!r}')
    counts = is_count(self.inputs) and is_count(self.outputs)
    require(counts, f'{self.inputs!r} inputs and {self.outputs!r} outputs are no matrix')
    expected = -(-self.outputs // TILE), -(-self.inputs // self.step)
    found = self.values.shape[-4:-2]
    require(found == expected, f'the matrix has {expected} tiles and steps, not {found}')
    if self.places is not None:
      found = self.places.shape[-3:-1]
      require(found == expected, f'the matrix has {expected} tiles and steps, but places {found}')
    for name in ('scales', 'zeros'):
      groups = getattr(self, name)
      if groups is not None:
        shape = expected[0], self.groups, TILE
        found = groups.shape[-3:]
        require(found == shape, f'{name} have the shape {found}, not {shape}')
    require(self.inputs % self.groups == 0, f'{self.groups} groups of {self.inputs} inputs')

  @property
  def shape(self):
    return (*self.values.shape[:-4], self.inputs, self.outputs)

  @property
  def groups(self) -> int:
    return 1 if self.scales is None else self.scales.shape[-2]

  @property
  def step(self) -> int:
    return STEPS[self.format] if self.places is None else SPARSE_STEP

  def dense(self):
    values_IO = _from_tiles(self._codes(), self.outputs)
    if self.places is not None:
      values_IO = _spread_pairs(values_IO, self.places)
    values_IO = values_IO[: self.inputs]
    if self.scales is None:
      return values_IO.astype(self.dtype)
    values_IO = values_IO.astype(jnp.float32)
    if self.zeros is not None:
      values_IO = values_IO - self._spread(self.zeros)
    return (values_IO * self._spread(self.scales)).astype(self.dtype)

  def columns(self, index):
    """Reads the codes of the wanted columns alone, out of their tiles."""
    fewer = functools.partial(_some_outputs, index=index)
    halved = self.format == 'int4' or self.format in CODEBOOKS
    return dataclasses.replace(
      self,
      values=fewer(self.values, halved=halved),
      places=None if self.places is None else fewer(self.places, halved=True),
      scales=None if self.scales is None else fewer(self.scales),
      zeros=None if self.zeros is None else fewer(self.zeros),
      outputs=len(index),
    )

  def matmul(self, x):
    return product(x, self)

  def grouped_matmul(self, x_TI, group_sizes_E):
    return grouped_product(x_TI, self, group_sizes_E)

  @classmethod
  def matmuls(cls, x, weights):
    """One call for all weights that read the rows in the same form: each form is made once."""
    forms = {}
    for i, w in enumerate(weights):
      forms.setdefault(w.form, []).append(i)
    products = {}
    for places in forms.values():
      for at in range(0, len(places), MOST_PRODUCTS):
        some = places[at : at + MOST_PRODUCTS]
        products.update(zip(some, joint_product(x, [weights[i] for i in some])))
    return tuple(products[i] for i in range(len(weights)))

  @property
  def form(self) -> tuple[str, int, int]:
    """What decides how activations are laid out: rounded or not, filled up to what, by blocks."""
    return self.activations, self.step, self.block

  @property
  def block(self) -> int:
    """Inputs whose activations share a scale, where they are rounded."""
    size = 128 if self.groups == 1 else self.inputs // self.groups
    return next((block for block in (128, 64, 32) if size % block == 0), GROUP_MULTIPLE)

  def kernel(self, platform):
    if platform != 'cpu' or not cpu.available():
      return None
    sparse = '' if self.places is None else '2:4 '
    return f'native, {cpu.load().selected}, {sparse}{self.format} by {self.activations} activations'

  def map_values(self, fn):
    raise ValueError(
      'a matrix that is packed for the CPU cannot be pruned, cast or quantized; pack it last'
    )

  def _codes(self):
    """Values before scaling as [tiles, steps, 32, inputs a step]."""
    values = self.values
    if self.places is not None and self.format == 'int8':
      return jax.lax.bitcast_convert_type(values, jnp.int8)
    if self.format == 'int8':
      return values if self.zeros is not None else values.astype(jnp.int32) - 128
    if self.format != 'int4' and self.format not in CODEBOOKS:
      return values
    codes = jnp.concatenate([values & 15, values >> 4], axis=-2)
    if self.format in CODEBOOKS:
      return jnp.asarray(CODEBOOKS[self.format], jnp.float32)[codes]
    if self.places is not None:
      codes = codes ^ 8
    return codes if self.zeros is not None else codes.astype(jnp.int32) - 8

  def _spread(self, groups):
    groups_JO = groups.transpose(1, 0, 2).reshape(self.groups, -1)[:, : self.outputs]
    return jnp.repeat(groups_JO.astype(jnp.float32), self.inputs // self.groups, axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """How a product is run.

  dtype: of the result, float32 or bfloat16; None for that of x.  `instruction_set` and `threads`
  are for tests: None and 0 take the best set and all threads.
  """

  dtype: jnp.dtype | None = None
  instruction_set: str | None = None
  threads: int = 0


def product(x: jax.Array, w: PackedTensor, **options) -> jax.Array:
  """Multiplies x[..., I] by a packed weight: [..., O] in the dtype of x; see `joint_product`."""
  return joint_product(x, [w], **options)[0]


def joint_product(
  x: jax.Array, weights: Sequence[PackedTensor], **options
) -> tuple[jax.Array, ...]:
  """Multiplies x[..., I] by up to `MOST_PRODUCTS` packed weights of one `form`, in one call.

  Their rows are laid out once, and threads are woken once. Returns [..., O] in the dtype of x for
  each; for `options` see `Call`.

  Raises ValueError for an instruction set that is not usable on this machine.
  """
  call = Call(**options)
  cpu.number(call.instruction_set)
  return _products(call, x, tuple(weights))


def grouped_product(
  x_TI: jax.Array, w: PackedTensor, group_sizes_E: jax.Array, **options
) -> jax.Array:
  """Multiplies consecutive groups of rows, each by its own expert, as `linear.grouped_matmul`.

  One native call reads the experts that have rows, and no others. Each group gets what `product`
  gives it alone, bit for bit. For `options` see `Call`.
  """
  call = Call(**options)
  cpu.number(call.instruction_set)
  return _grouped(call, x_TI, w, group_sizes_E.astype(jnp.int32))


def _through_xla(call, x, weights):
  multiply = functools.partial(jnp.matmul, preferred_element_type=call.dtype)
  return tuple(multiply(x, w.dense().astype(x.dtype)) for w in weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(call, x, weights):
  if not cpu.available():
    return _through_xla(call, x, weights)
  native, through_xla = (functools.partial(f, call) for f in (_native, _through_xla))
  return jax.lax.platform_dependent(x, weights, cpu=native, default=through_xla)


def _forward(call, x, weights):
  return _products(call, x, weights), (weights, jnp.zeros((), x.dtype))


def _backward(call, saved, y_bars):
  weights, like_x = saved
  terms = [jnp.matmul(y_bar, w.dense().astype(y_bar.dtype).T) for y_bar, w in zip(y_bars, weights)]
  return functools.reduce(jnp.add, terms).astype(like_x.dtype), None


_products.defvjp(_forward, _backward)


def _in_blocks(call, x_TI, w, sizes_E):
  return grouped.product(functools.partial(_through_dense, call), x_TI, w, sizes_E)


def _through_dense(call, x, w):
  return _through_xla(call, x, (w,))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(call, x_TI, w, sizes_E):
  if not cpu.available():
    return _in_blocks(call, x_TI, w, sizes_E)
  native, in_blocks = (functools.partial(f, call) for f in (_native_groups, _in_blocks))
  return jax.lax.platform_dependent(x_TI, w, sizes_E, cpu=native, default=in_blocks)


def _grouped_backward(call, saved, y_bar):
  x_TI, w, sizes_E = saved
  own = lambda x: _in_blocks(call, x, w, sizes_E)
  return jax.vjp(own, x_TI)[1](y_bar)[0], None, None


_grouped.defvjp(
  lambda call, x, w, sizes: (_grouped(call, x, w, sizes), (x, w, sizes)), _grouped_backward
)


def _native(call, x, weights):
  rows_TI = x.reshape(-1, weights[0].inputs)
  found = _native_call(cpu.PRODUCT, call, rows_TI, (), weights)
  return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in found)


def _native_groups(call, x_TI, w, sizes_E):
  return _native_call(cpu.GROUPED_PRODUCT, call, x_TI, (sizes_E,), (w,))[0]


def _native_call(target, call, x_TI, more, weights):
  dtype = x_TI.dtype if x_TI.dtype in (jnp.float32, jnp.bfloat16) else jnp.dtype(jnp.float32)
  first, wanted = weights[0], call.dtype or x_TI.dtype
  results = [jax.ShapeDtypeStruct((len(x_TI), w.outputs), call.dtype or dtype) for w in weights]
  arrays = [
    (
      w.values,
      NO_BYTES if w.places is None else w.places,
      NO_SCALES if w.scales is None else w.scales,
      NO_BYTES if w.zeros is None else w.zeros,
    )
    for w in weights
  ]
  numbers = lambda of: np.asarray([of(w) for w in weights], np.int64)
  products = jax.ffi.ffi_call(target, results, vmap_method='sequential')(
    x_TI.astype(dtype),
    *more,
    *itertools.chain(*arrays),
    formats=numbers(lambda w: (FORMAT_NUMBERS if w.places is None else SPARSE_NUMBERS)[w.format]),
    groups=numbers(lambda w: w.groups),
    inputs=np.int64(first.inputs),
    instruction_set=cpu.number(call.instruction_set),
    outputs=numbers(lambda w: w.outputs),
    quantize=np.int64(first.activations == 'int16'),
    threads=np.int64(call.threads),
  )
  return tuple(y.astype(wanted) for y in products)


def _from_tiles(tiles, outputs: int):
  return tiles.transpose(1, 3, 0, 2).reshape(-1, tiles.shape[0] * TILE)[:, :outputs]


def _some_outputs(tiles, index, halved: bool = False):
  """Tiles [tiles, steps, 32, ...] of some outputs; `halved`: 16 bytes hold two outputs each."""
  lanes = tiles.shape[2]
  own = tiles[index // TILE, :, index % lanes]
  if halved:
    high = (index % TILE >= lanes).reshape(-1, *[1] * (own.ndim - 1))
    own = jnp.where(high, own >> 4, own & 15)
  filled = jnp.pad(own, ((0, -len(index) % TILE), *[(0, 0)] * (own.ndim - 1)))
  tiles = jnp.moveaxis(filled.reshape(-1, TILE, *own.shape[1:]), 1, 2)
  return tiles[:, :, :lanes] | tiles[:, :, lanes:] << 4 if halved else tiles


def _spread_pairs(kept_IO, places):
  outputs = kept_IO.shape[1]
  both = jnp.concatenate([places & 15, places >> 4], axis=-1)
  four_IO = both.transpose(1, 0, 2).reshape(both.shape[1], -1)[:, :outputs]
  kept = four_IO[:, None] >> jnp.arange(SPARSE_STEP, dtype=jnp.uint8)[None, :, None] & 1
  rank = jnp.cumsum(kept, axis=1) - kept
  pairs = kept_IO.reshape(-1, 2, outputs)
  value = jnp.where(rank == 0, pairs[:, :1], pairs[:, 1:])
  return jnp.where(kept == 1, value, 0).reshape(-1, outputs)
