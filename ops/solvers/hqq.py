"""Half-quadratic quantization: zero points that are not integers, found without any data.

After Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
https://mobiusml.github.io/hqq_blog/. With the scales fixed, the zero point z of a group minimizes
the sum of |w - q|**p, p = 0.7: a norm that forgives a few large errors and prefers many small ones.
Splitting off the errors' sparse part e turns that into two steps with closed forms, repeated while
the coupling beta grows by the factor kappa:

  e = sign(r) * max(|r| - |r|**(p - 1) / beta, 0),  r = w - q
  z = mean(codes - (w - e))

It costs `iterations` roundings of the matrix, in float32.

Differences from the paper and its code: weights are measured in scales, so the result does not
depend on their unit (in the unit of typical weights the soft threshold would be above every error,
and e zero). The range includes 0, as that of `quantized.fit`, whose zero points are the first
iterate; of all, each group keeps the one of the least error, so none loses to rounding to nearest.
Zero points are rounded to float16 as they are stored before the codes are computed.
"""

import jax
import jax.numpy as jnp

from ops import quantized

NORM, BETA, KAPPA = 0.7, 10.0, 1.01
ITERATIONS = 20


def fit(
  w_IO: jax.Array,
  format: quantized.FormatName,
  *,
  group_size: int | None = None,
  iterations: int = ITERATIONS,
) -> tuple[jax.Array, jax.Array]:
  """Finds scales [J, O] and zero points in float16, for `quantized.encode`.

  Raises ValueError for a format that is no integer, and as `quantized.fit`.
  """
  scales_JO, first_JO = quantized.fit(w_IO, format, group_size=group_size, symmetric=False)
  unit_JO = scales_JO.astype(jnp.float32)
  groups, outputs = scales_JO.shape
  w_IO = w_IO.astype(jnp.float32)

  def step(i, state):
    zeros_JO, best_JO, least_JO = state
    moved_IO = w_IO - quantized.project(w_IO, scales_JO, zeros_JO, format)
    moved_JgO = moved_IO.reshape(groups, -1, outputs) / unit_JO[:, None]
    error_JO = lp_error(moved_JgO)
    better_JO = error_JO < least_JO
    best_JO = jnp.where(better_JO, zeros_JO, best_JO)
    least_JO = jnp.minimum(error_JO, least_JO)
    # codes - (w - e) is z - r + e.
    change_JO = (shrink(moved_JgO, BETA * KAPPA**i) - moved_JgO).mean(1)
    return (zeros_JO + change_JO).astype(jnp.float16), best_JO, least_JO

  first_JO = first_JO.astype(jnp.float16)
  start = (first_JO, first_JO, jnp.full(first_JO.shape, jnp.inf, jnp.float32))
  return scales_JO, jax.lax.fori_loop(0, iterations + 1, step, start)[1]


def lp_error(moved_JgO: jax.Array) -> jax.Array:
  """The sum of |r|**0.7 over each group, [J, O]."""
  return (jnp.abs(moved_JgO) ** NORM).sum(1)


def shrink(x: jax.Array, beta: jax.Array) -> jax.Array:
  """The generalized soft threshold of the norm: what of each error is left as an outlier."""
  size = jnp.abs(x)
  threshold = jnp.where(size > 0, size, 1) ** (NORM - 1) / beta  # 0 ** -0.3 would be infinite
  return jnp.sign(x) * jnp.maximum(size - threshold, 0)
