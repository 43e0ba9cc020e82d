"""Makes the matrices of a model learn to be quantized, and stores the result in codes.

  model = learned.attach(model, QatConfig(format='int4', group_size=64))
  ...                                       # train with Selection(), or Selection(scale=('*',))
  quantized_model = learned.finish(model)   # multiplies bit for bit as the trained model did

ops/qat.py says how a weight learns. A matrix that is stored N:M or under a mask keeps its places,
and its values learn.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from model.transformer import Transformer, linears, matching_layers, parameters
from ops import activations, experts, masked, qat, quantized, sparse
from ops.formats import FormatName
from ops.int8_training import Backward, Engine, Int8Products
from ops.linear import Matrix, Weight, map_values, stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class QatConfig:
  """The format that weights learn, and how.

  targets: patterns of the paths of linear layers; by default all of the blocks.
  held: scales stay those of the start unless they are trained; otherwise they follow the values.
  activation_bits: the inputs are rounded too, a scale each token; None leaves them as they are.
  """

  format: FormatName = 'int4'
  group_size: int | None = None
  symmetric: bool = True
  held: bool = False
  activation_bits: activations.Bits | None = None
  targets: tuple[str, ...] = ('layers.*',)

  def __post_init__(self):
    quantized.check_options(self.format, 1, -1, self.symmetric)
    if self.activation_bits is not None:
      activations.check_bits(self.activation_bits)


def attach(model: Transformer, config: QatConfig) -> Transformer:
  """Returns a copy of a model whose matrices round their values in every product.

  Raises ValueError if a pattern matches no layer, or a matrix cannot be stored in the format.
  """
  model = nnx.clone(model)
  for layer in matching_layers(model, config.targets):
    param = linears(model)[layer].weight
    try:
      param.set_value(_learning(param.get_value(), config))
    except ValueError as error:
      raise ValueError(f'{layer}: {error}') from None
  return model


def shapes(model: Transformer, config: QatConfig) -> Transformer:
  """What `attach` and `finish` make of a model that has shapes in the place of arrays.

  Raises ValueError as `attach` does.
  """
  graphdef, state = nnx.split(model)
  model = nnx.merge(graphdef, state)
  for layer in matching_layers(model, config.targets):
    weight = linears(model)[layer].weight
    try:
      weight.set_value(jax.eval_shape(functools.partial(_becomes, config), weight.get_value()))
    except ValueError as error:
      raise ValueError(f'{layer}: {error}') from None
  return model


def with_int8_products(
  model: Transformer,
  backward: Backward = 'inputs',
  *,
  engine: Engine = 'own',
  targets: Sequence[str] = ('layers.*',),
) -> Transformer:
  """Returns a copy of a model that is trained with int8 products; `finish` takes them off again.

  Raises ValueError if a pattern matches no layer, or a matrix is no plain array.
  """
  model = nnx.clone(model)
  for layer in matching_layers(model, targets):
    param = linears(model)[layer].weight
    if isinstance(param.get_value(), Weight):
      raise ValueError(f'{layer} is stored as a {type(param.get_value()).__name__} already')
    param.set_value(Int8Products(param.get_value(), backward, engine))
  return model


def finish(model: Transformer) -> Transformer:
  """Returns a copy of a model whose weights are stored in the format that they learned."""
  model = nnx.clone(model)
  for param in parameters(model).values():
    param.set_value(_finished(param.get_value()))
  return model


def _becomes(config: QatConfig, w: Matrix) -> Matrix:
  return experts.mapped(lambda one: stored(_learning_one(one, config, pruned=False)), w)


@jax.jit
def _finished(w: Matrix) -> Matrix:
  return experts.mapped(stored, w) if isinstance(w, Weight) else w


def _learning(w: Matrix, config: QatConfig) -> Matrix:
  pruned = not isinstance(w, Weight) and sparse.looks_pruned(w)
  return experts.mapped(lambda one: _learning_one(one, config, pruned), w)


def _learning_one(w: Matrix, config: QatConfig, pruned: bool) -> Matrix:
  if pruned:
    w = masked.masked(w)

  def learn(values: jax.Array) -> qat.QatTensor:
    # Values are trained in float32; their type is that of the stored weight's dense form.
    return qat.learn(
      values.astype(jnp.float32),
      config.format,
      group_size=config.group_size,
      symmetric=config.symmetric,
      held=config.held,
    )

  w = map_values(learn, w)
  if config.activation_bits is None:
    return w
  return activations.quantize_activations(w, config.activation_bits)
