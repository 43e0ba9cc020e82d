"""Defines one decoder-only transformer for all model families, configured layer by layer.

  model(tokens_BT) -> logits_BTV

A compressed model is an instance of the same class with other weight types in its parameters. Hot
paths split the model once and jit the pure function: `graphdef, state = nnx.split(model)`.
"""

import dataclasses
import fnmatch
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.layers.basic import Linear, Norm, Table
from model.layers.block import Block
from model.layers.cache import Cache
from model.layers.lending import Lenders
from ops import axes, rope
from ops.linear import Matrix
from ops.masks import AttentionMask
from ops.rope import RopeConfig

Caches = tuple[Cache, ...]  # one of each layer


class Transformer(nnx.Module):
  """Token and position embeddings, blocks, a final norm and a head.

  `dtype` is the dtype of activations and of newly initialised parameters. Parameters keep the dtype
  in which they are stored and are cast where they are used.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
    self.config, self.dtype = config, jnp.dtype(dtype)
    make = {'rngs': rngs, 'dtype': dtype}
    self.embedding = Table(config.vocab_size, config.width, axes=('V', 'D'), **make)
    learned = config.rope is None
    self.positions = (
      Table(config.max_positions, config.width, axes=('_', 'D'), **make) if learned else None
    )
    self.layers = nnx.List([Block(config.stream, layer, **make) for layer in config.layers])
    self.final_norm = Norm(config.width, config.stream, dtype=dtype)
    shape = (config.width, config.vocab_size)
    self.head = (
      None if config.tied else Linear(shape, axes=('D', 'V'), bias=config.head_bias, **make)
    )

  def __call__(self, tokens_BT, *, positions_BT=None, segments_BT=None) -> jax.Array:
    """Predicts the next token at every position: logits_BTV in float32.

    `segments_BT` separates packed documents: a token attends only to its own segment.
    """
    x_BTD, _ = self.hidden(tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT)
    return self.logits(x_BTD)

  def hidden(
    self, tokens_BT, *, positions_BT=None, segments_BT=None, cache: Caches | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Returns the normalized last hidden states x_BTD, and the cache with these tokens added.

    A cache requires `positions_BT`: row b is written from slot positions_BT[b, 0] on, a token sees
    every cached token at or before its position, and padding repeats the last position.
    """
    x_BTD = self.embed(tokens_BT, positions_BT)
    context = Context.of(self.config, tokens_BT, positions_BT, segments_BT, cache)
    lenders, caches = Lenders(self.config.layers), []
    for i, block in enumerate(self.layers):
      mixer = block.layer.mixer
      x_BTD, found = context.run(block, x_BTD, lenders.given(mixer, cache and cache[i]))
      caches.append(lenders.taken(mixer, found))
    return self.final_norm(x_BTD), cache and tuple(caches)

  def embed(self, tokens_BT, positions_BT=None) -> jax.Array:
    """Looks up the token embeddings, plus learned position embeddings: x_BTD in `dtype`."""
    sizes = axes.check('BT,BT', tokens_BT, positions_BT)
    x_BTD = self.embedding(tokens_BT).astype(self.dtype)
    if self.config.embedding_scale != 1.0:
      x_BTD = x_BTD * jnp.asarray(self.config.embedding_scale, self.dtype)
    if self.positions is not None:
      if positions_BT is None:
        positions_BT = _arange(sizes['B'], sizes['T'])
      x_BTD = x_BTD + self.positions(positions_BT).astype(self.dtype)
    return x_BTD

  def logits(self, x: jax.Array) -> jax.Array:
    """Maps normalized hidden states [..., D] to float32 logits [..., V]."""
    y = self.embedding.project(x) if self.head is None else self.head(x)
    y = y.astype(jnp.float32)
    if self.config.logit_divisor != 1.0:
      y = y / self.config.logit_divisor
    cap = self.config.logit_softcap
    return y if cap is None else cap * jnp.tanh(y / cap)


class Context:
  """The positions, rotary angles and mask that all blocks of one forward pass share.

  `of` builds it once per pass. Layers with the same rope and rotary width share their angles, and
  each layer sets its own pattern in the mask.
  """

  def __init__(self, config: ModelConfig, mask: AttentionMask):
    self.config, self.mask = config, mask
    # All of them at once, because a block may run inside a loop, whose arrays cannot leave it.
    found = dict.fromkeys(filter(None, (self._rotation(layer) for layer in config.layers)))
    positions_BT = mask.q_positions_BT
    self.angles = {key: rope.cos_sin(positions_BT, *key) for key in found}
    # Those of queries for the first tokens, which are never met from beyond a reach.
    reaches = {(self._rotation(layer), layer.mixer.first_reach) for layer in config.layers}
    for key, reach in reaches:
      if key is not None and reach is not None:
        capped_BT = jnp.minimum(positions_BT, reach)
        self.angles[key, reach] = (*self.angles[key], *rope.cos_sin(capped_BT, *key))

  @classmethod
  def of(cls, config, tokens_BT, positions_BT=None, segments_BT=None, cache=None) -> 'Context':
    batch, length = tokens_BT.shape
    contiguous = positions_BT is None and segments_BT is None and cache is None
    if positions_BT is None:
      if cache is not None:
        raise ValueError('a forward pass with a cache needs positions_BT')
      positions_BT = _arange(batch, length)
    if cache is not None and segments_BT is not None:
      raise ValueError('a cache row holds one document; segments_BT cannot be cached')
    mask = AttentionMask(
      positions_BT,
      positions_BT,
      q_segments_BT=segments_BT,
      k_segments_BS=segments_BT,
      contiguous=contiguous,
    )
    return cls(config, mask)

  def run(self, block: Block, x_BTD, cache: Cache | None = None):
    """Applies one block: (x_BTD, cache); see `lending.Lenders` for layers that share caches."""
    return block(x_BTD, *self._own(block), cache)

  def run_and_read(self, block: Block, x_BTD, cache: Cache | None = None):
    """Does what `run` does, and returns the input of the feed-forward network as z_BTD too."""
    return block.run(x_BTD, *self._own(block), cache)

  def _own(self, block):
    key, reach = self._rotation(block.layer), block.layer.mixer.first_reach
    angles = self.angles.get(key if reach is None else (key, reach))
    return angles, dataclasses.replace(self.mask, pattern=block.layer.mixer.pattern)

  def _rotation(self, layer) -> tuple[RopeConfig, int] | None:
    """The rope of a layer and how much of a head it rotates, if it does."""
    own, width = self.config.rope_of(layer), layer.mixer.rotated
    return None if own is None or width is None else (own, width)


def _arange(batch: int, length: int) -> jax.Array:
  return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))


def abstract(config: ModelConfig, dtype=jnp.float32) -> Transformer:
  """Builds a model with `jax.ShapeDtypeStruct`s as parameters, to load arrays into."""
  return nnx.eval_shape(lambda: Transformer(config, rngs=_OneKey(), dtype=dtype))


class _OneKey:
  """Gives the same key for all parameters, whose values nobody computes.

  `nnx.Rngs` counts its keys, which takes most of the time where everything is abstract.
  """

  def __init__(self):
    self._key = jax.random.key(0)

  def params(self) -> jax.Array:
    return self._key


def modules(root: nnx.Module) -> list[tuple[tuple[str, ...], nnx.Module]]:
  """Every module with its path, inner ones first, as `nnx.iter_modules` gives them.

  That one looks at every array and setting too, and takes ten times as long.
  """
  found, seen = [], set()
  # The members of a list are named '0', '1', ..., '10'.
  order = lambda member: (int(member[0]) if member[0].isdigit() else 0, member[0])

  def visit(path, module):
    if id(module) not in seen:
      seen.add(id(module))
      members = [(n, v) for n, v in vars(module).items() if isinstance(v, nnx.Module)]
      for name, inner in sorted(members, key=order):
        visit((*path, name), inner)
      found.append((path, module))

  visit((), root)
  return found


def parameters(model: nnx.Module) -> dict[str, nnx.Param]:
  """Returns every parameter by its dotted path, such as 'layers.0.attention.query.weight'."""
  return {
    '.'.join((*path, name)): value
    for path, module in modules(model)
    for name, value in vars(module).items()
    if isinstance(value, nnx.Param)
  }


def linears(model: nnx.Module) -> dict[str, Linear]:
  """Returns every linear layer by its dotted path, such as 'layers.0.attention.query'."""
  found = modules(model)
  return {'.'.join(path): module for path, module in found if isinstance(module, Linear)}


def matching_layers(model: nnx.Module, patterns: Sequence[str]) -> list[str]:
  """The paths of the linear layers that match any of some patterns, such as 'layers.*.ffn.*'.

  Layers that decide (routers, gates of tokens) are left out. Raises ValueError if a pattern matches
  none.
  """
  layers = [path for path, linear in linears(model).items() if not linear.decides]
  for pattern in patterns:
    if not fnmatch.filter(layers, pattern):
      raise ValueError(f'no layer matches {pattern!r}; there are {", ".join(layers[:8])}, ...')
  return [layer for layer in layers if any(fnmatch.fnmatchcase(layer, p) for p in patterns)]


def matrices(model: nnx.Module) -> dict[str, Matrix]:
  """Returns the weight of every linear layer, including the head, by the layer's dotted path."""
  return {path: linear.weight.get_value() for path, linear in linears(model).items()}
