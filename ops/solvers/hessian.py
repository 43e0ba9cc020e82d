"""The Hessian of a linear layer's squared output error, factored for a walk along its inputs.

Optimal brain surgery (Hassibi & Stork 1992,
https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html)
fixes one weight at a time and lets those that are still free make up for it, which takes the
inverse of the Hessian over the free ones. In an order that all outputs share, one triangle holds
every such inverse: GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) uses the upper U
with H⁻¹ = UᵀU. Here R = U⁻¹ takes its place, the upper R with H = R Rᵀ, because it comes from H by
one Cholesky factorization with both axes reversed, I³/6 multiplications. Inverting and factoring
again takes four times that and loses digits twice. The walk needs two things from R:

  the best weight i, if those before it went from w to q:   w_i + sum_{l<i} (w_l - q_l) R_li / R_ii
  the cost of a change of weight i, once those after it have made up for it:   (change * R_ii)²

(the form in which Chee et al. 2023, QuIP, https://arxiv.org/abs/2307.13304, write the same walk).

A second factorization only tells whether the Hessian is of deficient rank, for the report.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ops.kernels import cpu
from ops.kernels.cpu import layout, packed

MOST_RAISES = 6
HALVED = 512  # inputs from which on a quarter of `gram` is left out


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('feedback_II', 'stiffness_I', 'raised', 'singular', 'starved', 'deficient'),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Factor:
  """R as the walk reads it, and what went wrong on the way, each a count in int32.

  feedback_II: R_li / R_ii at [i, l] below the diagonal, else 0; so lies Rᵀ as LAPACK writes it, and
  so it is read.  stiffness_I: R_ii, for the Hessian divided by its mean diagonal.  raised: how
  often damping was multiplied by ten.  singular: 1 if that did not help.  starved: 1 if the Hessian
  is zero.  deficient: 1 if its rank is, in float32, so that only damping makes it invertible.

  Of a singular or starved Hessian nothing is used: no feedback, and all inputs equally stiff.
  """

  feedback_II: jax.Array
  stiffness_I: jax.Array
  raised: jax.Array
  singular: jax.Array
  starved: jax.Array
  deficient: jax.Array


def factor(covariance_II: jax.Array, damping: float, order_I: jax.Array | None = None) -> Factor:
  """Factors covariance + damping * mean(diagonal) * identity, with more damping if it must be.

  `order_I` is the order of the walk, None for that of the covariance; the factor is in that order.
  Beside the covariance about two matrices of its size are held at a time.
  """
  size = covariance_II.shape[0]
  order_I = jnp.arange(size) if order_I is None else order_I
  scale = mean_diagonal(covariance_II)
  starved = scale == 0
  scale = jnp.where(starved, 1, scale)
  damping = jnp.where(starved, 1, damping)
  damped = functools.partial(_damped, covariance_II, order_I[::-1], scale, damping)
  full_rank = _has_full_rank(covariance_II, scale)
  raised, lower_II = _raise(damped, covariance_II)
  root_II = lower_II.T[::-1, ::-1]  # Rᵀ
  singular = ~_is_finite(root_II)
  usable = ~(singular | starved)
  stiffness_I = jnp.where(usable, jnp.diagonal(root_II), 1)
  feedback_II = jnp.where(usable, jnp.tril(root_II / stiffness_I[:, None], -1), 0)
  flags = singular, starved, usable & ~full_rank
  return Factor(feedback_II, stiffness_I, raised, *(flag.astype(jnp.int32) for flag in flags))


def gram(x_TI: jax.Array) -> tuple[jax.Array, ...]:
  """Computes xᵀ x of some tokens' inputs, the Hessian's raw form: panels of columns, in float32.

  Many inputs give two panels, and what is below the first one is left out: it is the transpose of
  what is above the second. `whole` joins the panels, or sums of them.

  Sums are in float32. Products of bfloat16 inputs are exact in it, and float32 inputs are not
  rounded to fewer bits by a matrix unit, because the result is inverted.
  """
  inputs = x_TI.shape[1]
  # A multiple of the width of a tile of the native products. More panels cost more than they save.
  half = inputs // 2 // 32 * 32 if inputs >= HALVED else 0
  first = (_products(x_TI[:, :half], x_TI[:, :half]),) if half else ()
  return *first, _products(x_TI, x_TI[:, half:])


def whole(panels: tuple[jax.Array, ...]) -> jax.Array:
  """The symmetric matrix of the panels that `gram` returns, float32 [I, I]."""
  if len(panels) == 1:
    return panels[0]
  first, second = panels
  below = second[: len(first)].T
  return jnp.concatenate([jnp.concatenate([first, below]), second], axis=1)


def _products(x_TI, y_TO):
  """xᵀ y in float32."""
  if x_TI.dtype != jnp.bfloat16:
    x_TI, y_TO = x_TI.astype(jnp.float32), y_TO.astype(jnp.float32)
    return jnp.matmul(x_TI.T, y_TO, precision=jax.lax.Precision.HIGHEST)
  native = lambda x_TI, y_TO: packed.product(x_TI.T, layout.encode(y_TO), dtype=jnp.float32)
  through_xla = lambda x_TI, y_TO: jnp.matmul(x_TI.T, y_TO, preferred_element_type=jnp.float32)
  return jax.lax.platform_dependent(
    x_TI, y_TO, cpu=native if cpu.available() else through_xla, default=through_xla
  )


def mean_diagonal(covariance_II: jax.Array) -> jax.Array:
  """The mean of the diagonal, without overflow on the way."""
  diagonal_I = jnp.diagonal(covariance_II).astype(jnp.float32)
  largest = diagonal_I.max()
  return largest * (diagonal_I / jnp.where(largest == 0, 1, largest)).mean()


def _damped(covariance_II, order_I, scale, damping, raised):
  """The lower Cholesky factor of the Hessian in this order, with its damping raised so often."""
  # Without the barrier XLA takes what does not change out of the search, and holds a copy more.
  covariance_II, raised = jax.lax.optimization_barrier((covariance_II, raised))
  hessian_II = covariance_II[order_I][:, order_I] / scale
  rows = jnp.arange(len(order_I))
  return _cholesky(hessian_II.at[rows, rows].add(damping * jnp.float32(10) ** raised))


def _raise(damped, like_II):
  """Damps until there is a factor, or for the last time: how often that was raised, the factor."""

  def attempt(state):
    raised, _ = state
    return raised + 1, damped(raised + 1)

  going_on = lambda state: (state[0] < 0) | (state[0] < MOST_RAISES) & ~_is_finite(state[1])
  return jax.lax.while_loop(going_on, attempt, (jnp.int32(-1), jnp.zeros_like(like_II)))


def _has_full_rank(covariance_II, scale):
  """Whether the smallest eigenvalue of the correlations is above what float32 can tell from zero.

  Inputs that are always zero are left out; they are counted where the inputs are measured.
  """
  size = covariance_II.shape[0]
  deviation_I = jnp.sqrt(jnp.diagonal(covariance_II) / scale)
  used_I = deviation_I > 0
  inverse_I = jnp.where(used_I, 1 / jnp.where(used_I, deviation_I, 1), 0)
  correlation_II = covariance_II / scale * inverse_I[:, None] * inverse_I[None]
  diagonal_II = jnp.eye(size, dtype=bool)
  correlation_II = jnp.where(diagonal_II, 1 - size * jnp.finfo(jnp.float32).eps, correlation_II)
  return _is_finite(_cholesky(correlation_II))


def _cholesky(matrix_II):
  """The lower factor. Of the symmetric matrix it is given the transpose, as LAPACK has columns."""
  return jax.lax.linalg.cholesky(matrix_II.T, symmetrize_input=False)


def _is_finite(factor_II):
  """Whether a factor is: what is not finite in a row reaches its diagonal."""
  return jnp.isfinite(jnp.diagonal(factor_II)).all()
