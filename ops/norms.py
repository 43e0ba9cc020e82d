"""Normalizes the last axis of an array by RMS norm or by layer norm.

RMS norm after Zhang and Sennrich (2019), https://arxiv.org/abs/1910.07467; layer norm after Ba,
Kiros and Hinton (2016), https://arxiv.org/abs/1607.06450. Both are limited by memory bandwidth: XLA
fuses them into one read and one write of x.

The whole computation, including the scale, is in float32 and is rounded once, at the end. Hugging
Face's Llama rounds before it multiplies by the scale; for float32 models the two agree.
"""

import jax
import jax.numpy as jnp

from ops import axes


def rms_norm(x: jax.Array, scale_D: jax.Array, *, eps: float, offset: float = 0.0) -> jax.Array:
  """Divides x[..., D] by its root mean square and multiplies by `scale_D + offset`.

  `offset` is 1 for the families that store scale - 1 (Gemma), otherwise 0. Returns [..., D] in the
  dtype of x.
  """
  axes.check('...D,D', x, scale_D)
  x32 = x.astype(jnp.float32)
  normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return (normed * (_like(scale_D, x) + offset)).astype(x.dtype)


def layer_norm(
  x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, *, eps: float
) -> jax.Array:
  """Standardizes x[..., D], multiplies by `scale_D` and adds `bias_D` unless it is None.

  Returns [..., D] in the dtype of x.
  """
  axes.check('...D,D,D', x, scale_D, bias_D)
  x32 = x.astype(jnp.float32)
  # The variance uses the centred values: E[x²] - E[x]² loses digits where the mean is large.
  centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  normed = centred * jax.lax.rsqrt(variance + eps) * _like(scale_D, x)
  if bias_D is not None:
    normed = normed + _like(bias_D, x)
  return normed.astype(x.dtype)


def _like(vector_D, x):
  """Returns the vector in float32 with the rank of x, because ranks are never promoted silently."""
  return vector_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
