"""Puts several adapters over one model, so that each row of a batch can use its own."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from model.infer.lora_bank import LoraBank
from model.layers.routed import RoutedConfig
from model.transformer import Transformer, linears, matrices, parameters
from ops.linear import Matrix
from ops.lora import LoraTensor


def attach(model: Transformer, adapters: Mapping[str, Transformer]) -> Transformer:
  """Returns the model with banks of the corrections of several adapted models, in their order.

  The adapted models are this model with adapters, as `model.peft.load` returns them. All banks
  share one array of choices.

  Raises:
    ValueError: an adapter that is more than a low-rank correction of this model's matrices.
  """
  if any(isinstance(layer.ffn, RoutedConfig) for layer in model.config.layers):
    raise ValueError('a model with experts serves no adapters: its layers mix the rows of a batch')
  others = {name: _corrections(name, model, other) for name, other in adapters.items()}
  copy, choice = nnx.clone(model), jnp.zeros(1, jnp.int32)
  for path, linear in linears(copy).items():
    own = [found.get(path) for found in others.values()]
    if any(one is not None for one in own):
      linear.weight.set_value(LoraBank.of(linear.weight.get_value(), own, choice))
  return copy


def places_of_choice(model: Transformer, leaves: Sequence[jax.Array]) -> list[int]:
  """Which of a model's leaves are the choices of its banks."""
  choices = {id(w.choice) for w in matrices(model).values() if isinstance(w, LoraBank)}
  return [i for i, leaf in enumerate(leaves) if id(leaf) in choices]


def _corrections(name: str, model: Transformer, other: Transformer) -> dict[str, LoraTensor]:
  if other.config != model.config:
    raise ValueError(f'the adapter {name!r} belongs to a model of another shape')
  found, own = {}, parameters(model)
  for path, parameter in parameters(other).items():
    w: Matrix = parameter.get_value()
    base = own[path].get_value() if path in own else None
    if isinstance(w, LoraTensor) and _same(w.base, base):
      found[path.removesuffix('.weight')] = w
    elif not _same(w, base):
      raise ValueError(
        f'{name!r} has a {type(w).__name__} of its own in {path}; only LoRA over the matrices of '
        'the model can be served beside others, so merge it and serve it alone'
      )
  if not found:
    raise ValueError(f'the adapter {name!r} corrects no matrix; leave it out')
  return found


def _same(a: Matrix, b: Matrix) -> bool:
  """Whether two weights have the same numbers, stored in the same way."""
  if jax.tree.structure(a) != jax.tree.structure(b):
    return False
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
  return all(x is y or (x.dtype == y.dtype and jnp.array_equal(x, y)) for x, y in pairs)
