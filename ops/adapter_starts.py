"""Initial values of low-rank adapters.

  zero    A is uniform in +-1/sqrt(I), B zero: the model starts as its base (Hu et al. 2021, LoRA,
          https://arxiv.org/abs/2106.09685, and the reference code)
  pissa   A and B hold the largest singular values, the base the rest (Meng et al. 2024,
          https://arxiv.org/abs/2404.02948)
  loftq   over a quantized base, A and B hold what quantization lost, found by turns with the codes
          (Li et al. 2023, https://arxiv.org/abs/2310.08659). The turns may lead away from the
          original, at 2 bits for one; unlike the paper, the nearest of them is kept.

The base comes as it is stored; what replaces it is stored in the same way.
"""

import functools

import jax
import jax.numpy as jnp

from ops import axes
from ops.linear import Matrix, dense, refit
from ops.lora import LoraTensor

LOFTQ_ITERATIONS = 5  # turns of codes and correction, as in the paper


def zero(w: Matrix, rank: int, *, scale: float, key: jax.Array) -> LoraTensor:
  """Adds a correction that is zero at first, with `a` drawn at random.

  Raises ValueError if the rank is below 1 or above the smaller side of the matrix; so do the
  others.
  """
  sizes = _check(w, rank)
  limit = sizes['I'] ** -0.5
  a_IR = jax.random.uniform(key, (sizes['I'], rank), jnp.float32, -limit, limit)
  return LoraTensor(w, a_IR, jnp.zeros((rank, sizes['O']), jnp.float32), scale)


def pissa(w: Matrix, rank: int, *, scale: float) -> LoraTensor:
  """Moves the part of the largest singular values from the base into the correction."""
  _check(w, rank)
  w_IO = dense(w).astype(jnp.float32)
  a_IR, b_RO = _factors(w_IO, rank, scale)
  return LoraTensor(refit(w, w_IO - scale * (a_IR @ b_RO)), a_IR, b_RO, scale)


def loftq(
  w: Matrix, original_IO: jax.Array, rank: int, *, scale: float, iterations: int = LOFTQ_ITERATIONS
) -> LoraTensor:
  """Chooses codes and correction so that together they are near the original matrix.

  `w` is the quantized base, of which only the way of storing counts.
  """
  _check(w, rank)
  axes.check('IO,IO', w, original_IO)
  target_IO = original_IO.astype(jnp.float32)
  error = lambda adapter: jnp.linalg.norm(target_IO - adapter.sum())
  best, delta_IO = None, 0.0
  for _ in range(iterations):
    base = refit(w, target_IO - delta_IO)
    lost_IO = target_IO - dense(base).astype(jnp.float32)
    found = LoraTensor(base, *_factors(lost_IO, rank, scale), scale)
    best = found if best is None else _where(error(found) < error(best), found, best)
    delta_IO = found.delta()
  return best


def _where(condition, a: LoraTensor, b: LoraTensor) -> LoraTensor:
  return jax.tree.map(functools.partial(jnp.where, condition), a, b)


def _factors(w_IO, rank, scale):
  """The best a [I, R] and b [R, O] with scale * a @ b near a matrix, of equal lengths."""
  u_IR, s_R, v_RO = jnp.linalg.svd(w_IO, full_matrices=False)
  root_R = jnp.sqrt(s_R[:rank] / scale)
  return u_IR[:, :rank] * root_R[None], root_R[:, None] * v_RO[:rank]


def _check(w: Matrix, rank: int) -> dict[str, int]:
  sizes = axes.check('IO', w)
  if not 1 <= rank <= min(sizes.values()):
    raise ValueError(f'a rank lies between 1 and {min(sizes.values())}, not {rank}')
  return sizes
