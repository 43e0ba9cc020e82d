"""Reads and writes a range of each row of a batch; each row has its own start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ops.kernels import cpu

# A vmapped slice update becomes a scatter, which XLA:CPU runs row by row with bounds checks.
# Unrolled updates are copies in place, but each of them has to be compiled.
UNROLLED_ROWS = 8


def write(rows: jax.Array, new: jax.Array, starts_B: jax.Array) -> jax.Array:
  """Writes new[b] into rows[b] from index starts_B[b] on, along the second axis; it must fit."""
  new = new.astype(rows.dtype)
  on_cpu = _natively if cpu.available() else functools.partial(_as_integers, write=_through_xla)
  return jax.lax.platform_dependent(rows, new, starts_B, cpu=on_cpu, default=_through_xla)


def _natively(rows, new, starts_B):
  call = jax.ffi.ffi_call(
    cpu.WRITE_ROWS,
    jax.ShapeDtypeStruct(rows.shape, rows.dtype),
    vmap_method='sequential',
    input_output_aliases={0: 0},
  )
  return call(rows, new, starts_B.astype(jnp.int32))


def _as_integers(rows, new, starts, write):
  """Writes 16-bit floats as integers, because XLA:CPU would widen all of them for each row."""
  if rows.dtype not in (jnp.bfloat16, jnp.float16):
    return write(rows, new, starts)
  bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint16)
  return jax.lax.bitcast_convert_type(write(bits(rows), bits(new), starts), rows.dtype)


def _through_xla(rows, new, starts_B):
  rest = (0,) * (rows.ndim - 2)
  if len(rows) > UNROLLED_ROWS:
    write_row = lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (start, *rest))
    return jax.vmap(write_row)(rows, new, starts_B)
  for b in range(len(rows)):
    rows = jax.lax.dynamic_update_slice(rows, new[b : b + 1], (b, starts_B[b], *rest))
  return rows


def take(rows: jax.Array, order: jax.Array) -> jax.Array:
  """Returns the rows of these indices, which must be within range."""
  bits = rows
  if rows.dtype in (jnp.bfloat16, jnp.float16):
    bits = jax.lax.bitcast_convert_type(rows, jnp.uint16)
  taken = bits.at[order].get(mode='promise_in_bounds')
  return jax.lax.bitcast_convert_type(taken, rows.dtype)


def put_rows(rows: jax.Array, new: jax.Array, order: jax.Array) -> jax.Array:
  """Writes new[p] in place of rows[order[p]]; nothing where that is past the last row."""

  def through_xla(rows, new, order):
    return rows.at[order].set(new, mode='drop')

  return _as_integers(rows, new.astype(rows.dtype), order, through_xla)


def put(rows: jax.Array, new: jax.Array, at_BK: jax.Array) -> jax.Array:
  """Writes new[b, k] into rows[b, k] at index at_BK[b, k], along the third axis."""
  b, k = np.arange(len(at_BK))[:, None], np.arange(at_BK.shape[1])[None]

  def through_xla(rows, new, at_BK):
    return rows.at[b, k, at_BK].set(new, mode='promise_in_bounds', unique_indices=True)

  return _as_integers(rows, new.astype(rows.dtype), at_BK, through_xla)


def read(rows: jax.Array, starts_B: jax.Array, length: int) -> jax.Array:
  """Returns `length` entries of each row from index starts_B[b] on, along the second axis."""
  read_row = lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, length)
  return jax.vmap(read_row)(rows, starts_B)


def check(new_BTKH: jax.Array, capacity: int) -> None:
  """Raises ValueError if there are more new tokens than slots."""
  if new_BTKH.shape[1] > capacity:
    raise ValueError(f'{new_BTKH.shape[1]} tokens do not fit into a cache of {capacity}')
