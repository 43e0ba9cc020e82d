"""Attaches low-rank adapters to a model, by patterns of its layers, and merges them.

  config = AdapterConfig(rank=16, alpha=32)
  model = adapters.attach(model, config, key=jax.random.key(0))
  ...                                       # train with Selection(value=())
  merged = adapters.merge(model)

ops/lora.py says what an adapter is, ops/adapter_starts.py how it begins. Over a quantized model
this is QLoRA. Over a pruned one, the zeros stay.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from model.transformer import Transformer, linears, matching_layers, matrices
from ops import adapter_starts, experts, lora, masked, sparse
from ops.linear import Matrix, Weight, roles

Start = Literal['zero', 'pissa', 'loftq']


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
  """Which layers get an adapter, and of what kind; the names are those of PEFT where it has them.

  targets: patterns of the paths of linear layers; by default all of the blocks.
  ranks, alphas: pattern -> rank or alpha of the layers that match; the last match counts.
  rslora: the correction is scaled by alpha / sqrt(rank), not by alpha / rank.
  dora: the columns are scaled to trained lengths.
  start: the initial values; see ops/adapter_starts.py.
  """

  rank: int = 16
  alpha: float = 32.0
  targets: tuple[str, ...] = ('layers.*',)
  ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
  alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
  rslora: bool = False
  dora: bool = False
  start: Start = 'zero'

  def __post_init__(self):
    for rank in (self.rank, *self.ranks.values()):
      if not isinstance(rank, int) or rank < 1:
        raise ValueError(f'a rank is a whole number of at least 1, not {rank!r}')
    for alpha in (self.alpha, *self.alphas.values()):
      if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f'alpha is a positive number, not {alpha!r}')
    if self.start not in get_args(Start):
      raise ValueError(f'start {self.start!r} is not one of {", ".join(get_args(Start))}')

  def rank_of(self, layer: str) -> int:
    """The rank of a layer's adapter."""
    return _last_match(self.ranks, layer, self.rank)

  def scale_of(self, layer: str) -> float:
    """The factor of the product of the two sides in a layer."""
    rank, alpha = self.rank_of(layer), _last_match(self.alphas, layer, self.alpha)
    return alpha / (math.sqrt(rank) if self.rslora else rank)


def attach(
  model: Transformer,
  config: AdapterConfig,
  *,
  key: jax.Array,
  originals: Mapping[str, jax.Array] | None = None,
) -> Transformer:
  """Returns a copy of a model with adapters over the layers that match.

  `originals` has the matrices before quantization by layer, which LoftQ needs.

  Raises:
    ValueError: a pattern matches no layer; a rank is above the smaller side of a matrix; a layer
      has an adapter already; the kind of adapter does not suit the weight.
  """
  model = nnx.clone(model)
  found = targets(model, config)
  for layer, own in zip(found, jax.random.split(key, len(found))):
    param = linears(model)[layer].weight
    try:
      w = _with_mask(param.get_value())
      w = _adapted(w, layer, config, key=own, originals=originals)
    except ValueError as error:
      raise ValueError(f'{layer}: {error}') from None
    param.set_value(w)
  return model


def targets(model: Transformer, config: AdapterConfig) -> list[str]:
  """The layers that get an adapter. Raises ValueError if a pattern matches none."""
  matching_layers(model, (*config.ranks, *config.alphas))  # that each means something
  return matching_layers(model, config.targets)


def merge(model: Transformer, into: lora.Into = 'dense') -> Transformer:
  """Returns a copy of a model whose adapters are folded into its weights; see `lora.merge`."""
  model = nnx.clone(model)
  for linear in linears(model).values():
    w = linear.weight.get_value()
    if 'adapter' in roles(w):
      linear.weight.set_value(_merged(w, into))
  return model


@functools.partial(jax.jit, static_argnums=1)
def _merged(w: Matrix, into: lora.Into) -> Matrix:
  return lora.merge(w, into)


def shapes(model: Transformer, config: AdapterConfig, into: lora.Into | None) -> Transformer:
  """The result of `attach` and then `merge` on a model that has shapes in the place of arrays.

  `into` None leaves the adapters where they are. Raises ValueError as both do.
  """
  graphdef, state = nnx.split(model)
  model = nnx.merge(graphdef, state)

  def adapted(key, w, layer):
    adapter = _adapted(w, layer, config, key=key, originals=None)
    return adapter if into is None else lora.merge(adapter, into)

  for layer in targets(model, config):
    weight = linears(model)[layer].weight
    try:
      one = functools.partial(adapted, layer=layer)
      weight.set_value(jax.eval_shape(one, jax.random.key(0), weight.get_value()))
    except ValueError as error:
      raise ValueError(f'{layer}: {error}') from None
  return model


def narrowed(model: Transformer) -> Transformer:
  """Returns a copy of a model whose adapters have the dtype of the weights' dense form."""
  model = nnx.clone(model)
  for layer, w in adapted(model).items():
    arrays, structure = jax.tree.flatten(w)
    found = zip(arrays, roles(w), strict=True)
    arrays = [a.astype(w.dtype) if role == 'adapter' else a for a, role in found]
    linears(model)[layer].weight.set_value(jax.tree.unflatten(structure, arrays))
  return model


def for_original(model: Transformer, start: Transformer, original: Transformer) -> Transformer:
  """Expresses trained adapters that changed their base at the start as ones of the original.

  `start` is the model before training, `original` before its adapters. If the base holds
  W - s A0 B0, then W - s A0 B0 + s A B is W with an adapter of twice the rank: A and A0 side by
  side, B above -B0. Raises ValueError for DoRA, whose columns this would not scale.
  """
  model, first, weights = nnx.clone(model), adapted(start), matrices(original)
  for layer, w in adapted(model).items():
    if not isinstance(w, lora.LoraTensor):
      raise ValueError(f'{layer} holds a {type(w).__name__}; merge it into the model instead')
    a_IR = jnp.concatenate([w.a_IR, first[layer].a_IR], axis=1)
    b_RO = jnp.concatenate([w.b_RO, -first[layer].b_RO], axis=0)
    linears(model)[layer].weight.set_value(lora.LoraTensor(weights[layer], a_IR, b_RO, w.scale))
  return model


def adapted(model: Transformer) -> dict[str, Matrix]:
  """The weights that hold an adapter, by layer."""
  return {layer: w for layer, w in matrices(model).items() if 'adapter' in roles(w)}


def _with_mask(w: Matrix) -> Matrix:
  if len(w.shape) == 2 and not isinstance(w, Weight) and sparse.looks_pruned(w):
    return masked.masked(w)
  return w


def _adapted(w, layer, config, *, key, originals):
  if experts.count(w) is not None:
    raise ValueError(
      "experts have no adapters; let targets name other layers, such as 'layers.*.attention.*'"
    )
  if 'adapter' in roles(w):
    raise ValueError('this layer has an adapter already; merge it first')
  pruned = isinstance(w, masked.MaskedTensor | sparse.SparseTensor)
  if pruned and (config.dora or config.start != 'zero'):
    raise ValueError('over a pruned weight an adapter is plain LoRA that starts at zero')
  adapter = _started(w, layer, config, key, originals)
  if config.dora:
    return lora.DoraTensor(adapter, lora.column_lengths(adapter))
  return lora.keep_zeros(adapter)


def _started(w, layer, config, key, originals):
  rank, scale = config.rank_of(layer), config.scale_of(layer)
  if config.start == 'pissa':
    return adapter_starts.pissa(w, rank, scale=scale)
  if config.start == 'loftq':
    if originals is None or layer not in originals or not isinstance(w, Weight):
      raise ValueError('LoftQ needs a quantized weight and the matrix before its quantization')
    return adapter_starts.loftq(w, originals[layer], rank, scale=scale)
  return adapter_starts.zero(w, rank, scale=scale, key=key)


def _last_match(values: Mapping, layer: str, default):
  found = [value for pattern, value in values.items() if fnmatch.fnmatchcase(layer, pattern)]
  return found[-1] if found else default
