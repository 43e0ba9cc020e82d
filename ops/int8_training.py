"""Training with int8 products: float weights whose products are those of 8-bit integers.

Forward, inputs are rounded by token and weights by column, the integers are multiplied and summed
in int32, and the sum is scaled. Backward, the product that gives the gradient of the inputs may be
one of integers too, and that of the weights: both operands are rounded anew along the axis that is
summed over, the gradient stochastically. Hardware with int8 units multiplies twice as fast; XLA:CPU
does not, so there this shows what the rounding costs and nothing else.

This is the scheme of AQT (https://github.com/google/aqt), which MaxText trains with: `engine='aqt'`
calls it, `engine='own'` is its twin in this file, equal to the bit but for the random numbers. AQT
rounds to 127.5 steps on either side of zero, of which the outermost half is cut off.

Rounding a gradient to nearest loses entries below half a step, always to zero; rounding up with a
probability equal to the remainder is right on average (Gupta et al. 2015,
https://arxiv.org/abs/1502.02551). The random numbers follow from the bits of the gradient, so that
an update that is computed again gives the same result.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from ops import axes
from ops.linear import Weight, array, require, weight_type

Backward = Literal['float', 'inputs', 'all']
Engine = Literal['own', 'aqt']
STEPS = 127.5  # on either side of zero
TOP = 127
TINY = 1e-30  # the scale of a row that is all zeros
MATRIX = (((1,), (0,)), ((), ()))


@weight_type
@dataclasses.dataclass(frozen=True)
class Int8Products(Weight):
  """A matrix (I, O) of floating values that are rounded to int8 in every product of training.

  backward: which gradients are products of integers: none ('float'), that of the inputs, or all.
  engine: what multiplies.
  """

  values: jax.Array = array('IO')
  backward: Backward = 'inputs'
  engine: Engine = 'own'

  def check_fields(self):
    floating = jnp.issubdtype(self.values.dtype, jnp.floating)
    require(floating, f'values that are trained are floating, not {self.values.dtype}')
    for value, known in ((self.backward, Backward), (self.engine, Engine)):
      require(value in get_args(known), f'{value!r} is not one of {", ".join(get_args(known))}')

  @property
  def shape(self):
    return self.values.shape

  @property
  def dtype(self):
    return self.values.dtype

  def dense(self):
    codes, scale = to_codes(self.values, 0)
    return (codes.astype(jnp.float32) * scale).astype(self.dtype)

  def round_inputs(self, x):
    codes, scale = to_codes(x, -1)
    return codes.astype(jnp.float32) * scale

  def stored(self):
    return self.values

  def matmul(self, x):
    rows_TI = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    product = _aqt if self.engine == 'aqt' else _own
    y_TO = product(rows_TI, self.values.astype(jnp.float32), self.backward)
    return y_TO.reshape(*x.shape[:-1], y_TO.shape[-1]).astype(x.dtype)

  def map_values(self, fn):
    return dataclasses.replace(self, values=fn(self.values))


def to_codes(
  x: jax.Array, axis: int, *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Rounds to int8 codes that share a scale along `axis`: (codes, scale with a 1 there).

  To nearest, or stochastically with a `key`.
  """
  x = x.astype(jnp.float32)
  scale = jnp.maximum(jnp.abs(x).max(axis, keepdims=True), TINY) / STEPS
  steps = x / scale
  if key is None:
    whole = jnp.round(steps)
  else:
    whole = jnp.floor(steps + jax.random.uniform(key, x.shape))
  return jnp.clip(whole, -TOP, TOP).astype(jnp.int8), scale


def int8_matmul(a_TI: jax.Array, b_IO: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
  """A @ b through integers, float32 [T, O]; with a `key`, a is rounded stochastically."""
  axes.check('TI,IO', a_TI, b_IO)
  (codes_TI, rows), (codes_IO, columns) = to_codes(a_TI, 1, key=key), to_codes(b_IO, 0)
  sums_TO = jax.lax.dot_general(codes_TI, codes_IO, MATRIX, preferred_element_type=jnp.int32)
  return sums_TO.astype(jnp.float32) * rows * columns


def _own(x_TI, w_IO, backward: Backward):
  return _with_backward[backward](x_TI, w_IO)


def _gradients(backward: Backward, x_TI, w_IO, y_bar_TO):
  inputs, weights = jax.random.split(_key_of(y_bar_TO))
  if backward == 'float':
    x_bar_TI = y_bar_TO @ w_IO.T
  else:
    x_bar_TI = int8_matmul(y_bar_TO, w_IO.T, key=inputs)
  if backward != 'all':
    return x_bar_TI, x_TI.T @ y_bar_TO
  return x_bar_TI, int8_matmul(y_bar_TO.T, x_TI, key=weights).T


def _make(backward: Backward):
  product = jax.custom_vjp(int8_matmul)
  product.defvjp(
    lambda x_TI, w_IO: (int8_matmul(x_TI, w_IO), (x_TI, w_IO)),
    lambda saved, y_bar_TO: _gradients(backward, *saved, y_bar_TO),
  )
  return product


_with_backward = {backward: _make(backward) for backward in get_args(Backward)}


def _aqt(x_TI, w_IO, backward: Backward):
  from aqt.jax.v2 import config as aqt_config  # a second to import, and few need it

  bits = {'float': (None, None), 'inputs': (8, None), 'all': (8, 8)}[backward]
  sums = [None if b is None else jnp.int32 for b in bits]
  config = aqt_config.config_v3(
    fwd_bits=8,
    dlhs_bits=bits[0],
    drhs_bits=bits[1],
    dlhs_accumulator_dtype=sums[0],
    drhs_accumulator_dtype=sums[1],
  )
  key = _key_of(jax.lax.stop_gradient(x_TI))
  return aqt_config.set_context(config, key, None)(x_TI, w_IO, MATRIX)


def _key_of(x: jax.Array) -> jax.Array:
  """A random key that follows from the bits of an array."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  return jax.random.fold_in(jax.random.key(0), jnp.sum(bits, dtype=jnp.uint32))
