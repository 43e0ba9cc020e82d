"""Runs blocks of one kind in loops over their stacked parameters.

`hidden` computes what `Transformer.hidden` computes without a cache. Blocks are alike if they have
the same layer config and the same arrays (weight types, shapes, dtypes). Where a block, or a period
of several different ones (Gemma 2 alternates two), is repeated, the parameters of its repetitions
are stacked and `jax.lax.scan` runs them with one compiled body. A block that is like no neighbour
runs by itself. Decoding, which reads each weight once, stays with `Transformer.hidden`.

A model may be stacked once, by `stack`, and trained in that form, as `model.train` does: then the
program is the same for 30 layers as for 300, the optimizer's part included, and nothing is copied.
`hidden` also takes an ordinary model and stacks it on the way. That costs a second copy of the
parameters and of their gradients while the two passes run, and XLA:CPU compiles each layer's slices
of them.

An update of SmolLM2-135M (30 layers) with AdamW, 2 x 512 tokens, float32, on XLA:CPU:

                       compiling, CPU seconds   temporary arrays, MB (remat none, block)
  unrolled                       10                  2721    2532
  stacked on the way             20                  3905    1444
  stacked before                  4 (120 layers: 4)  3481    1081

The loop copies each layer's weights before it uses them. An update of 2 x 256 tokens took 4.3 CPU
seconds with it and 3.8 without, with `remat='block'` or 'none' alike.

Rematerialization trades time for memory (Chen et al., 2016, https://arxiv.org/abs/1604.06174). The
backward pass computes again what the forward pass did not keep:

  none   keeps all intermediate arrays
  dots   keeps each block's input and the results of its products with weights, not the attention
  block  keeps each block's input alone; a third more multiplications
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from model.layers import lending
from model.layers.block import Block
from model.layers.lending import Lenders
from model.transformer import Context, Transformer

Remat = Literal['none', 'block', 'dots']
REMATS = get_args(Remat)
Read = Callable[[Block, jax.Array], Any]


class Stack(nnx.Module):
  """A period of blocks that is repeated; their arrays have a leading axis of the repetitions."""

  def __init__(self, blocks: Sequence[Block], repeats: int):
    self.blocks, self.repeats = nnx.List(blocks), repeats

  @classmethod
  def of(cls, blocks: Sequence[Block], period: int, *, consume: bool = False) -> 'Stack':
    """Stacks the arrays of blocks, of which every `period`-th ones are alike."""
    joined = [_joined(blocks[i::period], consume) for i in range(period)]
    return cls(joined, len(blocks) // period)

  def unstacked(self) -> list[Block]:
    """The blocks one by one, in running order."""
    return [_taken(block, r) for r in range(self.repeats) for block in self.blocks]


@dataclasses.dataclass(frozen=True)
class Run:
  """Layers start, ..., start + period * repeats - 1, of which every `period`-th ones are alike."""

  start: int
  period: int
  repeats: int


def stack(
  model: Transformer, *, consume: bool = False, traits: Sequence[Hashable] | None = None
) -> Transformer:
  """Returns a model whose `layers` are stacks where blocks are alike.

  `traits` has a value for each layer: blocks that differ in it are not alike.

  Its parameters have paths such as 'layers.0.blocks.0.ffn.up.weight', with a leading axis. Of the
  model's own methods it has `embed` and `logits`; `hidden` below runs its blocks. A model that is
  stacked already is returned as it is.

  The model does not change, unless `consume` frees the arrays that were stacked, one kind after
  another. The two models are then never held together, and the old one cannot be used any more.
  """
  if has_stacks(model):
    return model
  blocks, parts = list(model.layers), []
  traits = [None] * len(blocks) if traits is None else traits
  kinds = [(kind(block), trait) for block, trait in zip(blocks, traits, strict=True)]
  for run in runs_of_layers(kinds, lending.pieces([block.layer for block in blocks])):
    own = blocks[run.start : run.start + run.period * run.repeats]
    parts += own if run.repeats == 1 else [Stack.of(own, run.period, consume=consume)]
  return _with_layers(model, parts)


def unstack(model: Transformer) -> Transformer:
  """Returns the ordinary model of a stacked one, which may be ordinary; the reverse of `stack`."""
  if not has_stacks(model):
    return model
  found = []
  for layer in model.layers:
    found += layer.unstacked() if isinstance(layer, Stack) else [layer]
  return _with_layers(model, found)


def has_stacks(model: Transformer) -> bool:
  """Whether `stack` has made it."""
  return any(isinstance(layer, Stack) for layer in model.layers)


def is_stacked(path: str) -> bool:
  """Whether the array of this path has a leading axis of repetitions."""
  return '.blocks.' in path


def ordinary_path(model: Transformer, path: str) -> str:
  """The path in the ordinary model of the first array that is stacked under `path`."""
  names = path.split('.')
  if names[0] != 'layers':
    return path
  place = int(names[1])
  layer, rest = sum(map(_depth, list(model.layers)[:place])), names[2:]
  if rest[0] == 'blocks':
    layer, rest = layer + int(rest[1]), rest[2:]
  return '.'.join(['layers', str(layer), *rest])


def hidden(
  model: Transformer, tokens_BT, *, positions_BT=None, segments_BT=None, remat: Remat = 'none'
) -> jax.Array:
  """Returns the normalized last hidden states x_BTD, as `Transformer.hidden` without a cache.

  The model may be stacked or not. Values and gradients are equal up to the order of float32 sums.
  `remat` says what the forward pass keeps for the backward pass. Raises ValueError if it is none of
  `REMATS`.
  """
  context = Context.of(model.config, tokens_BT, positions_BT, segments_BT)
  x_BTD = model.embed(tokens_BT, positions_BT)
  nothing = lambda block, z_BTD: None
  return hidden_and_read(stack(model), x_BTD, context, nothing, remat)[0]


def hidden_and_read(
  model: Transformer, x_BTD, context: Context, read: Read, remat: Remat = 'none'
) -> tuple[jax.Array, list[Any]]:
  """Runs the layers of a model, stacked or not, as they are, on embedded tokens.

  Returns the normalized last hidden states, and what `read(block, z_BTD)` returns of each layer,
  where z_BTD is what the block's feed-forward network has read. Layers of a stack have one entry
  for each block of the period, whose arrays have a leading axis of the repetitions.
  """
  if remat not in REMATS:
    raise ValueError(f'remat {remat!r} is not one of {", ".join(REMATS)}')
  found, lenders = [], Lenders(context.config.layers)
  for layer in model.layers:
    if isinstance(layer, Stack):
      x_BTD, own = _loop(layer, context, x_BTD, read, remat)
      found += own
    else:
      graphdef, state = nnx.split(layer)
      body = _body(graphdef, context, read, remat, in_loop=False)
      x_BTD, lent, one = body(state, x_BTD, lenders.given(layer.layer.mixer, None))
      lenders.taken(layer.layer.mixer, lent)
      found.append(one)
  return model.final_norm(x_BTD), found


def block_paths(model: Transformer) -> list[str]:
  """The paths of the blocks of a model, stacked or not, in the order of `hidden_and_read`."""
  paths = []
  for i, layer in enumerate(model.layers):
    inner = range(len(layer.blocks)) if isinstance(layer, Stack) else None
    paths += [f'layers.{i}'] if inner is None else [f'layers.{i}.blocks.{j}' for j in inner]
  return paths


def by_layer(model: Transformer, found: Sequence[Any]) -> list[Any]:
  """What `hidden_and_read` read of a stacked model, one entry for each layer in running order."""
  entries, rest = [], iter(found)
  for layer in model.layers:
    if isinstance(layer, Stack):
      own = [next(rest) for _ in layer.blocks]
      take = lambda r, tree: jax.tree.map(lambda array: array[r], tree)
      entries += [take(r, one) for r in range(layer.repeats) for one in own]
    else:
      entries.append(next(rest))
  return entries


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


def runs_of_layers(kinds: Sequence[Hashable], pieces: Sequence[int]) -> list[Run]:
  """`runs` of layers of which some read what others have lent: none begins or ends within a piece.

  `pieces` are the numbers of layers that belong together.
  """
  ends = list(itertools.accumulate(pieces, initial=0))
  found = runs([tuple(kinds[a:b]) for a, b in itertools.pairwise(ends)])
  layers = lambda run: ends[run.start + run.period] - ends[run.start]
  return [Run(ends[run.start], layers(run), run.repeats) for run in found]


def _repeats(ids, start, period):
  """How often the `period` layers from `start` on come in a row."""
  first, at = ids[start : start + period], start + period
  while ids[at : at + period] == first:
    at += period
  return (at - start) // period


def _loop(layer: Stack, context: Context, x_BTD, read: Read, remat: Remat):
  graphdefs, states = zip(*map(nnx.split, layer.blocks))
  bodies = [_body(graphdef, context, read, remat, in_loop=True) for graphdef in graphdefs]
  mixers = [block.layer.mixer for block in layer.blocks]

  def period(x_BTD, states):
    found, lenders = [], Lenders(context.config.layers)
    for body, state, mixer in zip(bodies, states, mixers):
      x_BTD, lent, one = body(state, x_BTD, lenders.given(mixer, None))
      lenders.taken(mixer, lent)
      found.append(one)
    return x_BTD, found

  return jax.lax.scan(period, x_BTD, states)


def _depth(layer: nnx.Module) -> int:
  """How many blocks an entry of `layers` stands for."""
  return len(layer.blocks) * layer.repeats if isinstance(layer, Stack) else 1


def _joined(blocks: Sequence[Block], consume: bool) -> Block:
  """One block with the arrays of several alike ones, stacked."""

  def join(*leaves):
    joined = jnp.stack(leaves)
    places = getattr(leaves[0], 'sharding', None)
    if isinstance(places, NamedSharding) and not isinstance(joined, jax.core.Tracer):
      joined = jax.device_put(joined, NamedSharding(places.mesh, PartitionSpec(None, *places.spec)))
    for leaf in leaves if consume else ():
      leaf.delete()
    return joined

  graphdefs, states = zip(*map(nnx.split, blocks))
  return nnx.merge(graphdefs[0], jax.tree.map(join, *states))


def _taken(block: Block, r: int) -> Block:
  graphdef, state = nnx.split(block)
  return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[r], state))


def _with_layers(model: Transformer, layers: Sequence[nnx.Module]) -> Transformer:
  model = nnx.merge(*nnx.split(model))
  model.layers = nnx.List(layers)
  return model


def _body(
  graphdef: nnx.GraphDef, context: Context, read: Read, remat: Remat, in_loop: bool
) -> Callable:
  def apply(state, x_BTD, given):
    block = nnx.merge(graphdef, state)
    x_BTD, lent, z_BTD = context.run_and_read(block, x_BTD, given)
    return x_BTD, lent, read(block, z_BTD)

  if remat == 'none':
    return apply
  policies = jax.checkpoint_policies
  policy = policies.dots_with_no_batch_dims_saveable if remat == 'dots' else None
  # In a loop, the two passes are two loops, so nothing can be merged back into the forward pass.
  return jax.checkpoint(apply, policy=policy, prevent_cse=not in_loop)
