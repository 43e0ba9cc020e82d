"""Scores the units of a matrix for structured pruning, and selects those that stay.

The inputs I of a matrix w[I, O] are taken apart into units of `run` consecutive elements: a
feed-forward channel is one input of the down projection, a head is a run of inputs of the output
projection. If the inputs of one unit u are set to zero, the output of the matrix moves by x_u w_u.
Its squared norm over all tokens is trace(w_uᵀ (x_uᵀ x_u) w_u), which `removal_error` computes from
the covariance of the inputs alone. For a unit of one input it is the product of the norms of input
and row. That is the exact error of removing the unit alone; the errors of several units do not add
up.

`refit` makes the rows that stay take over what the removed ones did, by least squares: the
closed-form update of optimal brain surgery (Hassibi & Stork 1992,
https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html) for a
set of inputs at once, as Kurtic et al. (2023), ZipLM, https://arxiv.org/abs/2302.04089, use it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ops import axes


def energy(w: jax.Array, axis: int, run: int = 1) -> jax.Array:
  """Sums the squares of each unit of an array, cut along `axis`: float32 [units]."""
  squares = jnp.square(jnp.moveaxis(w, axis, 0).astype(jnp.float32))
  return squares.reshape(-1, run * squares.size // squares.shape[0]).sum(1)


def removal_error(covariance_II: jax.Array, w_IO: jax.Array, run: int = 1) -> jax.Array:
  """Computes the mean squared change of x @ w if the inputs of a unit are zero: float32 [units].

  `covariance_II` is the mean of x xᵀ over all tokens. The square is summed over the outputs.
  """
  sizes = axes.check('II,IO', covariance_II, w_IO)
  w_JIO = w_IO.astype(jnp.float32).reshape(-1, run, sizes['O'])
  units = jnp.arange(len(w_JIO))
  blocks_JIi = covariance_II.reshape(len(w_JIO), run, len(w_JIO), run)[units, :, units]
  return jnp.einsum('JIO,JIi,JiO->J', w_JIO, blocks_JIi, w_JIO)


def best(scores: np.ndarray, count: int) -> np.ndarray:
  """Selects the `count` highest scores: their indices in increasing order.

  Among equal scores, the earlier is selected. Raises ValueError if a score is not finite.
  """
  order = np.argsort(-_finite(scores), kind='stable')
  return np.sort(order[:count])


def allocate(scores: Sequence[np.ndarray], total: int, multiple: int) -> list[int]:
  """Divides `total` units among several lists of scores: how many of each list stay.

  Each list is taken in order of falling scores, in portions of `multiple` units. The portions of
  all lists compete by their mean score, and the first portion of each list always stays. `total` is
  a multiple of `multiple`, and so is every result.

  Raises ValueError if `total` does not reach for the first portions, a list has none, or a score is
  not finite.
  """
  portions = [np.sort(_finite(s))[::-1] for s in scores]
  portions = [s[: len(s) // multiple * multiple].reshape(-1, multiple).mean(1) for s in portions]
  counts = [1] * len(portions)
  if total < multiple * len(portions) or not all(map(len, portions)):
    raise ValueError(
      f'{total} units are too few for {len(portions)} layers that keep at least {multiple} each'
    )
  rest = [(-score, i, j) for i, s in enumerate(portions) for j, score in enumerate(s) if j]
  for _, i, _ in sorted(rest)[: total // multiple - len(portions)]:
    counts[i] += 1
  return [count * multiple for count in counts]


def _finite(scores) -> np.ndarray:
  scores = np.asarray(scores, np.float64)
  if not np.isfinite(scores).all():
    raise ValueError('scores of units are NaN or infinite; check the weights')
  return scores


def distance(x: jax.Array, y: jax.Array) -> jax.Array:
  """Computes 1 - cos(x, y) over the last axis of x and y [..., D]: float32 [...].

  A vector of zeros has the distance 1 from every other.
  """
  axes.check('...D,...D', x, y)
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
  return 1 - (x * y).sum(-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


def refit(covariance_II: jax.Array, w_IO: jax.Array, kept: jax.Array, damping: float) -> jax.Array:
  """Fits the rows of the kept inputs so that x[kept] @ result is nearest to x @ w: [kept, O].

  `damping`, as a multiple of the mean diagonal of the covariance, keeps the rows near those of w.
  """
  axes.check('II,IO', covariance_II, w_IO)
  w32_IO, rows_II = w_IO.astype(jnp.float32), covariance_II[kept]
  damped = damping * jnp.diagonal(covariance_II).mean()
  system_II = rows_II[:, kept] + damped * jnp.eye(len(kept), dtype=jnp.float32)
  # Solved for the change of the kept rows, so that damping leaves them as they were.
  change_IO = jax.scipy.linalg.solve(system_II, rows_II @ w32_IO.at[kept].set(0), assume_a='pos')
  return (w32_IO[kept] + change_IO).astype(w_IO.dtype)


def principal_axes(covariance_DD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the eigenvectors of a covariance as columns, by falling eigenvalue, and these values.

  In float64; the sign of a column makes its largest element positive.
  """
  values_D, axes_DD = np.linalg.eigh(np.asarray(covariance_DD, np.float64))
  values_D, axes_DD = values_D[::-1], axes_DD[:, ::-1]
  largest_D = np.abs(axes_DD).argmax(0)
  signs_D = np.sign(axes_DD[largest_D, np.arange(len(values_D))])
  return axes_DD * signs_D, values_D
