"""Products of consecutive groups of rows, each with its own expert, in blocks of rows.

A loop goes over blocks, each of at most `block_rows` rows of one expert: it takes the rows, takes
the expert's weight out of the stack [E, ...], multiplies, and writes the rows of the result where
those of x were. A block may reach over the end of its group; those rows are zero until the next
block writes over them. So nothing is padded, sorted or gathered, and of a weight that is stored in
few bits one expert at a time is decoded.

With M rows there are at most `most_blocks` blocks; the loop has that length, and blocks that the
group sizes leave empty are skipped. At most M + E * block_rows rows are multiplied, and of M rows
for M different experts (decoding) no other expert's weight is read. `jax.lax.ragged_dot`, where XLA
expands it, multiplies E * M rows and holds an array [E, M, I]. The idea of blocks with one expert
each is that of Gale et al. (2022), MegaBlocks, https://arxiv.org/abs/2211.15841.

A GPU starts several kernels at each step of a loop, and waits for the host where one is skipped.
`at_once` multiplies all blocks in one batch instead, of larger blocks, and holds the weight of
each.

The backward pass of the loop goes over the same blocks. It adds the gradient of each expert up in
float32 in its place of [E, I, O], and computes what the product needs of a decoded weight anew.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST_ROWS, FEWEST_ROWS = 128, 8  # of a block
MOST_ROWS_AT_ONCE = 4096
Multiply = Callable[[jax.Array, Any], jax.Array]


def block_rows(rows: int, experts: int, most: int = MOST_ROWS) -> int:
  """The rows of a block: a power of two near the rows that an expert gets on average."""
  average = -(-rows // experts)
  return min(max(1 << (average - 1).bit_length(), FEWEST_ROWS), most)


def most_blocks(rows: int, experts: int, size: int) -> int:
  """The most blocks of `size` rows that groups with so many rows in total can have."""
  return min(rows, (rows + experts * (size - 1)) // size)


def product(
  multiply: Multiply, x_MI: jax.Array, w: Any, group_sizes_E: jax.Array, size: int | None = None
) -> jax.Array:
  """Multiplies each group of rows by its expert: [M, O], with zeros past the last group.

  `multiply(x, w)` is the product of some rows with the weight of one expert, which is `w` without
  the leading axis of its arrays. `size` is that of the blocks (None: `block_rows`).
  """
  size = size or block_rows(len(x_MI), len(group_sizes_E))
  return _product(multiply, size, x_MI, w, group_sizes_E.astype(jnp.int32))


def at_once(
  multiply: Multiply, x_MI: jax.Array, w: Any, group_sizes_E: jax.Array, size: int | None = None
) -> jax.Array:
  """Computes `product` with all blocks in one batch.

  It holds the weights of at most `most_blocks` blocks: less than twice those of all experts, where
  each has its share of the rows.
  """
  rows = len(x_MI)
  size = size or block_rows(rows, len(group_sizes_E), MOST_ROWS_AT_ONCE)
  found = blocks(group_sizes_E.astype(jnp.int32), rows, size)
  # The two axes without a letter are the blocks and the rows of a block.
  row___ = found.start[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
  # Rows of no group get a place of their own past the end, so that no two places are the same.
  outside___ = rows + jnp.arange(row___.size, dtype=jnp.int32).reshape(row___.shape)
  row___ = jnp.where(row___ < found.end[:, None], row___, outside___)
  x___I = x_MI.at[row___].get(mode='fill', fill_value=0, unique_indices=True)
  of_block = lambda a: a.at[found.expert].get(indices_are_sorted=True, mode='promise_in_bounds')
  y___O = jax.vmap(multiply)(x___I, jax.tree.map(of_block, w))
  nothing = jnp.zeros((rows, y___O.shape[-1]), y___O.dtype)
  return nothing.at[row___].set(y___O, mode='drop', unique_indices=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
  """Rows `start` to `end` of one expert; an empty one has none of them, and starts at the end."""

  expert: jax.Array
  start: jax.Array
  end: jax.Array


def blocks(sizes_E: jax.Array, rows: int, size: int) -> Block:
  """All blocks in order of their rows, as arrays with a leading axis; the empty ones come last."""
  counts_E = -(-sizes_E // size)
  until_E, ends_E = jnp.cumsum(counts_E), jnp.cumsum(sizes_E)
  number = jnp.arange(most_blocks(rows, len(sizes_E), size), dtype=jnp.int32)
  expert = jnp.searchsorted(until_E, number, side='right').astype(jnp.int32)
  expert = jnp.minimum(expert, len(sizes_E) - 1)
  within = number - (until_E - counts_E)[expert]
  start = (ends_E - sizes_E)[expert] + size * within
  used = number < until_E[-1]
  end = jnp.where(used, jnp.minimum(start + size, ends_E[expert]), rows)
  return Block(expert, jnp.where(used, start, rows), end)


def _rows(filled: jax.Array, block: Block, size: int) -> jax.Array:
  """The rows of a block, with zeros in place of those of the next group."""
  part = jax.lax.dynamic_slice_in_dim(filled, block.start, size)
  return _within(part, block)


def _within(part: jax.Array, block: Block) -> jax.Array:
  mine = jnp.arange(len(part), dtype=jnp.int32)[:, None] < block.end - block.start
  return jnp.where(mine, part, jnp.zeros_like(part))


def _filled(a_MI: jax.Array, size: int) -> jax.Array:
  return jnp.pad(a_MI, ((0, size), (0, 0)))


def _take(w: Any, expert: jax.Array) -> Any:
  take = lambda a: jax.lax.dynamic_index_in_dim(a, expert, keepdims=False)
  return jax.tree.map(take, w)


def _unless_empty(fn: Callable, block: Block, *operands):
  """Calls fn, or gives zeros of the same shapes for a block without rows."""
  shapes = jax.eval_shape(fn, *operands)
  nothing = lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.cond(block.end > block.start, fn, nothing, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(multiply: Multiply, size: int, x_MI, w, sizes_E):
  rows, filled = len(x_MI), _filled(x_MI, size)

  def step(y, block):
    fn = lambda: _within(multiply(_rows(filled, block, size), _take(w, block.expert)), block)
    return jax.lax.dynamic_update_slice_in_dim(y, _unless_empty(fn, block), block.start, 0), None

  part = jax.eval_shape(lambda: multiply(filled[:size], _take(w, jnp.int32(0))))
  nothing = jnp.zeros((rows + size, part.shape[1]), part.dtype)
  return jax.lax.scan(step, nothing, blocks(sizes_E, rows, size))[0][:rows]


def _forward(multiply, size, x_MI, w, sizes_E):
  return _product(multiply, size, x_MI, w, sizes_E), (x_MI, w, sizes_E)


def _backward(multiply, size, saved, y_bar):
  x_MI, w, sizes_E = saved
  rows, filled, bars = len(x_MI), _filled(x_MI, size), _filled(y_bar, size)
  floats, join = _floats(w)

  def step(sums, block):
    def pull():
      one = _take(w, block.expert)
      own, join_one = _floats(one)
      fn = lambda x, own: multiply(x, join_one(own))
      return jax.vjp(fn, _rows(filled, block, size), own)[1](_rows(bars, block, size))

    x_bar, w_bar = _unless_empty(pull, block)
    x_sum = jax.lax.dynamic_update_slice_in_dim(sums[0], x_bar, block.start, 0)
    add = lambda sum_, a: sum_.at[block.expert].add(a.astype(sum_.dtype))
    return (x_sum, jax.tree.map(add, sums[1], w_bar)), None

  wide = lambda a: a.dtype if a.dtype.itemsize >= 4 else jnp.float32
  sums = [jnp.zeros(a.shape, wide(a)) for a in floats]
  nothing = jnp.zeros_like(filled), sums
  (x_bar, sums), _ = jax.lax.scan(step, nothing, blocks(sizes_E, rows, size))
  w_bar = join([sum_.astype(a.dtype) for sum_, a in zip(sums, floats)], _no_gradient)
  return x_bar[:rows], w_bar, _no_gradient(sizes_E)


_product.defvjp(_forward, _backward)


def _floats(w: Any) -> tuple[list[jax.Array], Callable]:
  """The floating arrays of a pytree, and a function that puts others in their place.

  That one leaves the rest as it is, or maps it by its second argument.
  """
  leaves, form = jax.tree.flatten(w)
  floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

  def join(new, other=lambda leaf: leaf):
    new = iter(new)
    return form.unflatten(next(new) if f else other(leaf) for f, leaf in zip(floating, leaves))

  return [leaf for f, leaf in zip(floating, leaves) if f], join


def _no_gradient(a: jax.Array) -> np.ndarray:
  return np.zeros(a.shape, jax.dtypes.float0)
