"""The objective of models with experts: cross entropy, and what keeps the experts in use.

Without it a router sends nearly all tokens to a few experts. There are two ways (`ops.balance`):

  loss  balance losses, one for each routed layer, added up over the layers
  bias  after each update, the bias of a layer's choice rises for experts with little load, and
        falls for those with much; the weights of the experts do not contain it

Both see the load of the whole batch, on all devices and in all micro-batches together. For the
losses, the loads of the micro-batches are found first, by a forward pass of their own. Tokens with
a label count.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from model import stacked
from model.layers.block import Block
from model.layers.routed import Routed, RoutedConfig
from model.train.objectives import Objective
from ops import balance, losses

BIAS = '.choice_bias'
SHARED = ('balance_loss', 'z_loss', 'max_violation', 'dead', 'dropped')  # reported as means


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balanced(Objective):
  """Cross entropy plus `balance` times the balance losses and `z` times the z-losses.

  bias_rate: how far an update moves the biases of the choice (DeepSeek-V3: 0.001), if there are
    any.

  It reports the cross entropy as 'cross_entropy', the statistics of each routed layer in
  'experts', by the layer's path, with the load of each expert as a part of all, and the means of
  some over the layers.
  """

  balance: float = 0.01
  z: float = 0.001
  bias_rate: float = 0.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f'{field.name} must be a number of at least 0, not {value}')

  def check(self, student, references):
    del references
    routed = [layer.ffn for layer in student.layers if isinstance(layer.ffn, RoutedConfig)]
    if not routed:
      raise ValueError('no layer of the model has experts, so there is nothing to balance')
    if self.bias_rate and not all(ffn.choice_bias for ffn in routed):
      raise ValueError('bias_rate is set, but a routed layer has no choice_bias; set it there')

  def __call__(self, models, batch):
    student, mask_T = models.student, (batch.labels_BT >= 0).reshape(-1)
    x_BTD, used = _usage(student, batch)
    nll = lambda x_BTD, labels_BT: losses.label_nll(student.logits(x_BTD), labels_BT)
    total = jnp.sum(student.over_tokens(nll, x_BTD, batch.labels_BT))
    each = [balance.losses(one, models.whole.get(path)) for path, one in used.items()]
    of_all = lambda name: sum(jnp.sum(one[name]) for one in each)
    extra = self.balance * of_all('balance_loss') + self.z * of_all('z_loss')
    return {
      'loss': total + jnp.sum(mask_T).astype(jnp.float32) * extra,
      'cross_entropy': total,
      'experts': used,
    }

  def before(self, models, batch):
    if not self.balance:
      return {}
    return {path: one['load'] for path, one in _usage(models.student, batch)[1].items()}

  def report(self, means):
    used = means['experts']
    layers = {path: balance.losses(one) | balance.statistics(one) for path, one in used.items()}
    shared = {
      name: jnp.mean(jnp.concatenate([jnp.ravel(one[name]) for one in layers.values()]))
      for name in SHARED
    }
    for path, one in layers.items():
      one['load'] = balance.parts(used[path]['load'])
    return {**means, **shared, 'experts': layers}

  def updated(self, buffers, sums):
    used = sums['experts']
    move = lambda path, bias: balance.updated_bias(
      bias, used[path.removesuffix(BIAS)]['load'], self.bias_rate
    )
    moves = lambda path: self.bias_rate and path.endswith(BIAS)
    return {path: move(path, array) if moves(path) else array for path, array in buffers.items()}


def _usage(student, batch):
  """The last hidden states, and the usage of experts by the path of each routed network."""
  mask_T = (batch.labels_BT >= 0).reshape(-1)
  x_BTD, found = student.hidden_and_read(
    batch, lambda block, z_BTD: _of_layer(block, z_BTD, mask_T)
  )
  paths = stacked.block_paths(student.model)
  pairs = zip(paths, found, strict=True)
  return x_BTD, {f'{path}.ffn': one for path, one in pairs if one is not None}


def _of_layer(block: Block, z_BTD: jax.Array, mask_T: jax.Array) -> dict[str, jax.Array] | None:
  """The usage of one layer, whose feed-forward network has read z_BTD; None without experts."""
  ffn = block.ffn
  if not isinstance(ffn, Routed):
    return None
  z_TD = z_BTD.reshape(-1, z_BTD.shape[-1])
  logits_TE, routing = ffn.scores(z_TD), ffn.route(z_TD)
  kept_TX = ffn.dispatcher.kept(routing.experts_TX, logits_TE.shape[-1])
  return balance.usage(logits_TE, routing, ffn.config.router.score, mask_T, kept_TX)
