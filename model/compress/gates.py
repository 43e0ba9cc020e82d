"""Differentiates the loss by a gate on each unit: the first-order cost of removing the unit.

A gate is a factor of 1 on the output of a unit. The loss changes by about -d loss / d gate if the
unit is removed. This is the first-order Taylor importance with gates of Molchanov et al. (2019),
Importance Estimation for Neural Network Pruning, https://arxiv.org/abs/1906.10771. The gate of a
feed-forward channel multiplies its row of the down projection, that of a key/value head the rows of
its query heads in the output projection, and that of a dimension of the residual stream the rows of
all matrices that read it, the head included. By the chain rule, d loss / d gate is the sum of
w * (d loss / d w) over these rows; the gradients of the weights themselves are never held.

The paper squares the slope of a batch before it averages; here the magnitude of the slope of each
calibration row is averaged.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import units
from model.compress.programs import compiled
from model.config import ModelConfig
from model.transformer import Transformer, linears, parameters
from ops import losses
from ops.linear import Matrix

Gates = dict[str, list[jax.Array]]  # unit -> gates of each layer ('F', 'K'), or one array ('D')


def ones(config: ModelConfig) -> Gates:
  """Returns the gates of all units, open: float32."""
  one = functools.partial(jnp.ones, dtype=jnp.float32)
  return {unit: [one(n) for n in units.sizes(config, unit)] for unit in ('D', 'F', 'K')}


@dataclasses.dataclass(frozen=True)
class GatedLoss:
  """The loss of a model without its parameters, hashable: (parameters, gates, tokens_BT) -> nats.

  It is the mean cross entropy per predicted token. `readers` has the letter of the inputs of each
  matrix of the layers by its path.
  """

  graphdef: nnx.GraphDef
  config: ModelConfig
  readers: tuple[tuple[str, str], ...]

  @classmethod
  def of(cls, model: Transformer) -> 'GatedLoss':
    found = {f'{path}.weight': linear.axes[-2] for path, linear in linears(model).items()}
    found = {
      path: letter for path, letter in found.items() if _is_gated(model.config, path, letter)
    }
    return cls(nnx.split(model)[0], model.config, tuple(found.items()))

  def __call__(self, values: Mapping[str, Matrix], gates: Gates, tokens_BT) -> jax.Array:
    gated = dict(values)
    for path, letter in self.readers:
      w_IO = values[path]
      gate_I = self._gate(gates, path, letter, w_IO.shape[-2])
      gate = jnp.broadcast_to(gate_I[:, None], w_IO.shape)  # the same one for every expert
      gated[path] = (w_IO.astype(jnp.float32) * gate).astype(w_IO.dtype)
    model = nnx.merge(self.graphdef, nnx.from_flat_state(_flat(gated)))
    x_BTD, _ = model.hidden(tokens_BT)
    x_BTD = x_BTD * gates['D'][0].astype(x_BTD.dtype)[None, None]  # what the head reads
    return losses.cross_entropy(x_BTD[:, :-1], tokens_BT[:, 1:], model.logits).mean()

  def _gate(self, gates, path, letter, inputs: int) -> jax.Array:
    """The gate of each input of a matrix."""
    l = units.layer_of(path)
    unit = units.unit_of(self.config.layers[l], letter)
    gate = gates[unit][0 if unit == 'D' else l]
    return jnp.repeat(gate, inputs // len(gate))


def _is_gated(config: ModelConfig, path: str, letter: str) -> bool:
  """Whether the inputs of a matrix are units: those of the head, or of shared experts, are not."""
  l = units.layer_of(path)
  return l is not None and units.unit_of(config.layers[l], letter) in ('D', 'F', 'K')


def _flat(values):
  number = lambda name: int(name) if name.isdigit() else name
  return [(tuple(map(number, p.split('.'))), nnx.Param(value)) for p, value in values.items()]


def values_of(model: Transformer) -> dict[str, Matrix]:
  """Returns the parameters of a model by path, as `GatedLoss` takes them."""
  return {path: param.get_value() for path, param in parameters(model).items()}


def slopes(model: Transformer, tokens_BT: np.ndarray) -> Gates:
  """Returns the mean over rows of |d loss / d gate|, for tokens [rows, length]."""
  loss, gates = GatedLoss.of(model), ones(model.config)
  values = values_of(model)
  total = jax.tree.map(jnp.zeros_like, gates)
  for row in range(len(tokens_BT)):
    total = _add(loss, total, values, gates, tokens_BT[row : row + 1])
  return jax.tree.map(lambda a: a / len(tokens_BT), total)


@functools.partial(compiled, static_argnums=0, donate_argnums=1)
def _add(loss, total, values, gates, tokens_BT):
  slope = jax.grad(loss, argnums=1)(values, gates, tokens_BT)
  return jax.tree.map(lambda a, b: a + jnp.abs(b), total, slope)
