"""Runs alike blocks of a model in loops over their stacked parameters.

`hidden` computes what `Transformer.hidden` computes without a cache. Blocks are alike if they have
the same layer config and the same arrays (weight types, shapes, dtypes). Where a block, or a period
of several different ones (Gemma 2 alternates two), is repeated, the parameters of its repetitions
are stacked and `jax.lax.scan` runs them with one compiled body. A block that is like no neighbour
runs by itself.

The program then has as many products for 300 layers as for 30. It still has a concatenation of each
layer's arrays, and slices of the gradients of those that are trained. XLA:CPU compiles equal
kernels once, so there a loop compiles more slowly than unrolled layers do (SmolLM2-135M's 30
layers with AdamW in float32: 25 s against 10 s on two cores). The loop bounds the memory instead:
with `remat='block'`, temporary arrays took 1.4 GB against 2.7 GB for a batch of 1024 tokens. The
stacked parameters are a second copy that lives as long as the two passes. Decoding, which reads
each weight once, stays with `Transformer.hidden`.

Rematerialization trades time for memory (Chen et al., 2016, https://arxiv.org/abs/1604.06174). The
backward pass computes again what the forward pass did not keep:

  none   keeps all intermediate arrays
  dots   keeps each block's input and the results of its products with weights, not the attention
  block  keeps each block's input alone; a third more multiplications
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from model.layers import Block
from model.transformer import Context, Transformer

Remat = Literal['none', 'block', 'dots']
REMATS = get_args(Remat)


@dataclasses.dataclass(frozen=True)
class Run:
  """Layers start, ..., start + period * repeats - 1, of which every `period`-th ones are alike."""

  start: int
  period: int
  repeats: int


def hidden(
  model: Transformer, tokens_BT, *, positions_BT=None, segments_BT=None, remat: Remat = 'none'
) -> jax.Array:
  """Returns the normalized last hidden states x_BTD, as `Transformer.hidden` without a cache.

  Values and gradients are equal up to the order of float32 sums. `remat` says what the forward pass
  keeps for the backward pass. Raises ValueError if it is none of `REMATS`.
  """
  if remat not in REMATS:
    raise ValueError(f'remat {remat!r} is not one of {", ".join(REMATS)}')
  x_BTD = model.embed(tokens_BT, positions_BT)
  context = Context.of(model.config, tokens_BT, positions_BT, segments_BT)
  for run in runs([kind(block) for block in model.layers]):
    blocks = model.layers[run.start : run.start + run.period * run.repeats]
    x_BTD = _run(blocks, run.period, context, x_BTD, remat)
  return model.final_norm(x_BTD)


def kind(block: Block) -> Hashable:
  """What two blocks must have in common to share one compiled body."""
  graphdef, state = nnx.split(block)
  leaves, structure = jax.tree.flatten(state)
  return graphdef, structure, tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves)


def runs(kinds: Sequence[Hashable]) -> list[Run]:
  """Divides layers into runs such that the fewest blocks are compiled, and then the fewest runs.

  A run of period p compiles p blocks, whatever the number of its repeats.
  """
  numbers = {}
  ids = [numbers.setdefault(kind, len(numbers)) for kind in kinds]
  depth = len(ids)
  best: list[tuple[int, int, Run | None]] = [(0, 0, None)] * (depth + 1)
  for start in reversed(range(depth)):
    options = []
    for period in range(1, depth - start + 1):
      for repeats in range(1, _repeats(ids, start, period) + 1):
        blocks, count, _ = best[start + period * repeats]
        options.append((blocks + period, count + 1, Run(start, period, repeats)))
    best[start] = min(options, key=lambda option: option[:2])
  found, at = [], 0
  while at < depth:
    run = best[at][2]
    found.append(run)
    at += run.period * run.repeats
  return found


def _repeats(ids, start, period):
  """How often the `period` layers from `start` on come in a row."""
  first, at = ids[start : start + period], start + period
  while ids[at : at + period] == first:
    at += period
  return (at - start) // period


def _run(blocks: Sequence[Block], period: int, context: Context, x_BTD, remat: Remat):
  """Applies the blocks in order; every `period`-th ones are alike."""
  bodies, stacks = [], []
  for i in range(period):
    graphdefs, states = zip(*map(nnx.split, blocks[i::period]))
    bodies.append(_body(graphdefs[0], context, remat, in_loop=len(states) > 1))
    stacks.append(states[0] if len(states) == 1 else _stack(states))

  def apply(x_BTD, states):
    for body, state in zip(bodies, states):
      x_BTD = body(state, x_BTD)
    return x_BTD, None

  scan = len(blocks) > period
  return jax.lax.scan(apply, x_BTD, stacks)[0] if scan else apply(x_BTD, stacks)[0]


def _stack(states: Sequence[nnx.State]) -> nnx.State:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _body(graphdef: nnx.GraphDef, context: Context, remat: Remat, in_loop: bool) -> Callable:
  apply = lambda state, x_BTD: context.run(nnx.merge(graphdef, state), x_BTD)[0]
  if remat == 'none':
    return apply
  policies = jax.checkpoint_policies
  policy = policies.dots_with_no_batch_dims_saveable if remat == 'dots' else None
  # In a loop, the two passes are two loops, so nothing can be merged back into the forward pass.
  return jax.checkpoint(apply, policy=policy, prevent_cse=not in_loop)
