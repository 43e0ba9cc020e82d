"""Weights that learn to be quantized: float values, multiplied as they will be stored.

Quantization-aware training (Jacob et al. 2017, https://arxiv.org/abs/1712.05877) rounds the weights
in every product and lets gradients pass straight through the rounding (Bengio et al. 2013,
https://arxiv.org/abs/1308.3432). The forward product here is that of the stored weight itself, so
that a model multiplies the same, bit for bit, once `stored` has turned its values into codes.

The scales are found anew from the values in each product, or they are held: then values beyond the
grid get no gradient, and the scales get that of LSQ (Esser et al. 2020,
https://arxiv.org/abs/1902.08153) if they are trained, without its factor, which an optimizer like
Adam cancels. They are trained in float32 and rounded to their stored precision in the product.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ops import axes, formats, quantized
from ops.formats import FORMATS, FormatName
from ops.linear import Weight, array, dense, is_count, matmul, require, weight_type
from ops.quantized import QuantizedTensor

FAR = 1e30  # a weight beyond every grid


@weight_type
@dataclasses.dataclass(frozen=True)
class QatTensor(Weight):
  """A matrix [I, O] of floating values that are rounded to a format wherever they are multiplied.

  scales: float32 [J, O] that are held or trained, or None: those that `quantized.fit` finds.
  zeros: uint8 [J, O] of held scales of an asymmetric format, or None.
  """

  values: jax.Array = array('IO')
  scales: jax.Array | None = array('JO', 'scale', optional=True)
  zeros: jax.Array | None = array('JO', 'scale', optional=True)
  format: FormatName
  group_size: int
  symmetric: bool

  def check_fields(self):
    require(self.format in tuple(FORMATS), f'format {self.format!r} is none of {list(FORMATS)}')
    floating = jnp.issubdtype(self.values.dtype, jnp.floating)
    require(floating, f'values that learn are floating, not {self.values.dtype}')
    inputs, outputs = self.values.shape[-2:]
    divides = is_count(self.group_size) and inputs % self.group_size == 0
    require(divides, f'{inputs} inputs do not divide into groups of {self.group_size!r}')
    expected = (inputs // self.group_size, outputs)
    for held in (self.scales, self.zeros):
      fits = held is None or held.shape[-2:] == expected
      require(
        fits, f'scales and zeros have the shape {expected}, not {getattr(held, "shape", None)}'
      )
    needs = self.symmetric or (self.scales is None) == (self.zeros is None)
    require(needs, 'held scales of an asymmetric format come with zeros')

  @property
  def shape(self):
    return self.values.shape

  @property
  def dtype(self):
    return self.values.dtype

  def stored(self) -> QuantizedTensor:
    """The weight that is stored: codes and scales."""
    if self.scales is None:
      return quantized.quantize(
        self.values, self.format, group_size=self.group_size, symmetric=self.symmetric
      )
    groups = len(self.scales)
    scales_JO = formats.stored(self.scales, quantized.scale_dtype(self.format, groups))
    return quantized.encode(self.values, scales_JO, self.zeros, self.format)

  def dense(self):
    return _rounded(self)

  def columns(self, index):
    return self.dense()[..., index]  # scales may depend on all columns

  def matmul(self, x):
    return _product(x, self)

  def map_values(self, fn):
    return dataclasses.replace(self, values=fn(self.values))


def learn(
  w_IO: jax.Array,
  format: FormatName,
  *,
  group_size: int | None = None,
  symmetric: bool = True,
  held: bool = False,
) -> QatTensor:
  """Has a matrix learn to be quantized.

  `held` keeps the scales that are found now; otherwise they follow the values, as those of the
  microscaling formats always do. Raises ValueError as `quantized.quantize` does.
  """
  axes.check('IO', w_IO)
  quantized.check_options(format, w_IO.shape[0], group_size, symmetric)
  size = quantized.resolve_group(format, w_IO.shape[0], group_size)
  if held and FORMATS[format].block is not None:
    raise ValueError(f'{format} defines its scales by the values, so that none are held')
  scales_JO = zeros_JO = None
  if held:
    scales_JO, zeros_JO = quantized.fit(w_IO, format, group_size=size, symmetric=symmetric)
    scales_JO = scales_JO.astype(jnp.float32)
  return QatTensor(w_IO, scales_JO, zeros_JO, format, size, symmetric)


@jax.custom_vjp
def _product(x, w):
  # The barrier keeps the compiler from computing the codes in another way than by themselves.
  return matmul(x, jax.lax.optimization_barrier(w.stored()))


def _product_forward(x, w):
  return _product(x, w), (x, w)


def _product_backward(saved, y_bar):
  x, w = saved
  x_bar, w_bar_IO = jax.vjp(matmul, x, w.stored().dense())[1](y_bar)
  return x_bar, _straight_through(w, w_bar_IO)


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _rounded(w):
  return w.stored().dense()


_rounded.defvjp(lambda w: (_rounded(w), w), lambda w, w_bar_IO: (_straight_through(w, w_bar_IO),))


def _straight_through(w: QatTensor, w_bar_IO: jax.Array) -> QatTensor:
  """The gradient of the fields of a weight, from that of the rounded matrix."""
  if w.scales is None:
    return dataclasses.replace(w, values=w_bar_IO.astype(w.values.dtype))
  stored = w.stored()
  scale_J1O = dense(stored.scales).astype(jnp.float32)[:, None]
  grouped = lambda a_IO: a_IO.astype(jnp.float32).reshape(len(w.scales), w.group_size, -1)
  values_JgO, bar_JgO = grouped(w.values), grouped(w_bar_IO)
  nearest = lambda far: formats.nearest(
    jnp.full_like(values_JgO, far), scale_J1O[:, 0], w.zeros, w.format
  )
  ends = nearest(-FAR), nearest(FAR)  # the other way round where a scale is negative
  inside_JgO = (values_JgO >= jnp.minimum(*ends)) & (values_JgO <= jnp.maximum(*ends))
  levels_JgO = grouped(stored.dense()) / scale_J1O
  slope_JgO = levels_JgO - jnp.where(inside_JgO, values_JgO / scale_J1O, 0)
  zeros_bar = None if w.zeros is None else np.zeros(w.zeros.shape, jax.dtypes.float0)
  return dataclasses.replace(
    w,
    values=jnp.where(inside_JgO, bar_JgO, 0).reshape(w.shape).astype(w.values.dtype),
    scales=(bar_JgO * slope_JgO).sum(1),
    zeros=zeros_bar,
  )
