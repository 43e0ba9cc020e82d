"""Orthogonal matching pursuit: a vector as a sum of few of many given ones.

Pati, Rezaiifar and Krishnaprasad 1993, https://doi.org/10.1109/ACSSC.1993.342465. Each step takes
the atom whose direction has the largest product with what is left of the vector, and fits the
coefficients of all atoms taken so far by least squares. The taken atoms are kept as an orthonormal
basis, so a step costs a product with all atoms: k steps for one vector are 2 k _ D operations.

Letters: V vectors, D their width, R atoms taken for each; the atoms are [_, D].
"""

import functools

import jax
import jax.numpy as jnp

from ops import axes

TINY = 1e-6  # of an atom's length: less than this outside the basis counts as nothing


@functools.partial(jax.jit, static_argnames='count')
def pursue(targets_VD: jax.Array, atoms: jax.Array, *, count: int) -> tuple[jax.Array, jax.Array]:
  """Takes `count` atoms for each vector.

  Returns their indices, int32 [V, R], and their coefficients, float32 [V, R]. A coefficient is 0
  where a further atom is no new direction, as when nothing is left of the vector. An atom of zeros
  is never needed. Raises ValueError if there are fewer atoms, or fewer dimensions, than `count`.
  """
  sizes = axes.check('VD,_D', targets_VD, atoms)
  if not 1 <= count <= min(len(atoms), sizes['D']):
    raise ValueError(
      f'{count} atoms are to be taken of {len(atoms)} in {sizes["D"]} dimensions; take fewer'
    )
  with jax.default_matmul_precision('highest'):
    return _pursue(targets_VD.astype(jnp.float32), atoms.astype(jnp.float32), count)


def _pursue(targets_VD, atoms, count: int):
  lengths = jnp.linalg.norm(atoms, axis=1, keepdims=True)
  unit = jnp.where(lengths > 0, atoms / jnp.where(lengths > 0, lengths, 1), 0)
  tokens, width = targets_VD.shape
  rows_V = jnp.arange(tokens)

  def step(r, state):
    basis_VRD, taken_VR, left_VD, free = state
    scores = jnp.where(free, jnp.abs(left_VD @ unit.T), -1.0)
    taken_V = jnp.argmax(scores, axis=1)
    atom_VD = unit[taken_V]
    new_VD = atom_VD
    for _ in range(2):  # once more, for what rounding leaves
      new_VD -= jnp.einsum('VR,VRD->VD', jnp.einsum('VRD,VD->VR', basis_VRD, new_VD), basis_VRD)
    size_V = jnp.linalg.norm(new_VD, axis=1, keepdims=True)
    new_VD = jnp.where(size_V > TINY, new_VD / jnp.where(size_V > TINY, size_V, 1), 0)
    left_VD = left_VD - jnp.sum(left_VD * new_VD, 1, keepdims=True) * new_VD
    return (
      basis_VRD.at[:, r].set(new_VD),
      taken_VR.at[:, r].set(taken_V),
      left_VD,
      free.at[rows_V, taken_V].set(False),
    )

  start = (
    jnp.zeros((tokens, count, width), jnp.float32),
    jnp.zeros((tokens, count), jnp.int32),
    targets_VD,
    jnp.ones((tokens, len(atoms)), bool),
  )
  basis_VRD, taken_VR, _, _ = jax.lax.fori_loop(0, count, step, start)
  return taken_VR, _coefficients(basis_VRD, atoms[taken_VR], targets_VD)


def _coefficients(basis_VRD, atoms_VRD, targets_VD):
  """Solves the triangular systems of the taken atoms in their basis."""
  # Row: direction of the basis; column: atom.
  upper = basis_VRD @ atoms_VRD.transpose(0, 2, 1)
  is_new_VR = jnp.sum(basis_VRD * basis_VRD, -1) > 0.5
  # An atom that is no new direction has a row of zeros; its column becomes that of the identity.
  upper = jnp.where(is_new_VR[:, None, :], upper, jnp.eye(upper.shape[1])[None])
  parts_VR = jnp.einsum('VRD,VD->VR', basis_VRD, targets_VD)
  solved = jax.scipy.linalg.solve_triangular(upper, parts_VR[..., None], lower=False)[..., 0]
  return jnp.where(is_new_VR, solved, 0)
