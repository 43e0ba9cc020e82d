"""Adam whose two moments are stored as 8-bit codes: 2.03 bytes of state per parameter, not 8.

Dettmers et al. (2022), "8-bit Optimizers via Block-wise Quantization",
https://arxiv.org/abs/2110.02861. An update decodes the moments of one array, computes as Adam does
in float32, and rounds them again (`ops.blockwise`). The first moment has codes with signs, the
second without. Arrays of fewer than 4096 elements, stacked layers together, keep float32 moments.

XLA would decode the moments of all arrays before it rounds the first again, which takes more memory
than float32 moments do. So the update of an array waits for the one before it, and only about two
arrays are decoded at a time. A stack of layers (`model.stacked`) is one array.

It differs from bitsandbytes in two ways. Blocks of 256 run along the last axis, so that sharded
codes are those of one device. A second moment above zero never becomes zero, which would divide the
first moment by eps; bitsandbytes leaves embeddings in float32 instead.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ops import blockwise
from ops.blockwise import Blockwise

SMALLEST = 4096  # elements of an array that has codes
Moment = Blockwise | jax.Array


class Adam8bitState(NamedTuple):
  """The number of completed updates, and trees of the moments of each parameter."""

  count: jax.Array
  first: Any
  second: Any


def scale_by_adam8bit(
  b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Builds the counterpart of `optax.scale_by_adam` with 8-bit moments."""

  def init(params):
    zeros = lambda signed: jax.tree.map(
      lambda p: _encode(jnp.zeros_like(p, jnp.float32), signed), params
    )
    return Adam8bitState(jnp.zeros((), jnp.int32), zeros(True), zeros(False))

  def update(updates, state, params=None):
    del params
    gradients, structure = jax.tree.flatten(updates)
    moments = zip(*map(structure.flatten_up_to, (state.first, state.second)))
    count = state.count + 1
    corrections = [1 - jnp.float32(b) ** count for b in (b1, b2)]
    new, wait = [], jnp.float32(0)
    for g, pair in zip(gradients, moments):
      new.append(_update(g + wait, *pair, decays=(b1, b2), corrections=corrections, eps=eps))
      wait = _zero_after(new[-1][1], wait)
    updates, first, second = (structure.unflatten(column) for column in zip(*new))
    return updates, Adam8bitState(count, first, second)

  return optax.GradientTransformation(init, update)


def state_bytes(shape: tuple[int, ...]) -> int:
  """The bytes of both moments of a parameter of this shape."""
  size = math.prod(shape)
  if size < SMALLEST:
    return 2 * 4 * size
  scales = math.prod(shape[:-1]) * blockwise.blocks(shape[-1])
  return 2 * (size + 4 * scales)


def _update(g, first: Moment, second: Moment, *, decays, corrections, eps):
  """Returns the direction of one array's update, and its new moments."""
  g, (b1, b2) = g.astype(jnp.float32), decays
  m = b1 * _decode(first) + (1 - b1) * g
  v = b2 * _decode(second) + (1 - b2) * g * g
  m_hat, v_hat = m / corrections[0], v / corrections[1]
  return m_hat / (jnp.sqrt(v_hat) + eps), _encode(m, signed=True), _encode(v, signed=False)


def _zero_after(moment: Moment, wait: jax.Array) -> jax.Array:
  """Zero, which the compiler cannot know before it has the codes of a moment."""
  if not isinstance(moment, Blockwise):
    return wait
  first = moment.scales[(0,) * moment.scales.ndim]
  return jnp.where(first < 0, jnp.float32(1), jnp.float32(0))  # no scale is negative


def _encode(x: jax.Array, signed: bool) -> Moment:
  return x if x.size < SMALLEST else blockwise.quantize(x, signed=signed)


def _decode(moment: Moment) -> jax.Array:
  return moment.dense() if isinstance(moment, Blockwise) else moment
