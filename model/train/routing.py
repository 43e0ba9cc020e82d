"""The objective of models with experts: cross entropy, and losses that keep the experts in use.

Without them a router sends nearly all tokens to a few experts. The losses are those of
`ops.balance`, one for each layer, added up over the layers. They count the tokens with a label. The
load is that of a micro-batch, on all devices together: fewer micro-batches demand less of a part of
a batch (see there).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from model.layers.block import Block
from model.layers.routed import Routed, RoutedConfig
from model.train.objectives import Objective
from ops import balance, losses, moe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balanced(Objective):
  """Cross entropy plus `balance` times the balance losses and `z` times the z-losses.

  It reports the cross entropy as 'cross_entropy', and means over the routed layers: the two losses
  and the greatest violation of even use.
  """

  balance: float = 0.01
  z: float = 0.001

  def __post_init__(self):
    for name in ('balance', 'z'):
      value = getattr(self, name)
      if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f'{name} must be a number of at least 0, not {value}')

  def check(self, student, references):
    del references
    if not any(isinstance(layer.ffn, RoutedConfig) for layer in student.layers):
      raise ValueError('no layer of the model has experts, so there is nothing to balance')

  def __call__(self, models, batch):
    student, mask_T = models.student, (batch.labels_BT >= 0).reshape(-1)
    read = lambda block, z_BTD: _of_layer(block, z_BTD, mask_T)
    x_BTD, found = student.hidden_and_read(batch, read)
    nll = lambda x_BTD, labels_BT: losses.label_nll(student.logits(x_BTD), labels_BT)
    total = jnp.sum(student.over_tokens(nll, x_BTD, batch.labels_BT))
    layers = [jax.tree.map(jnp.atleast_1d, one) for one in found if one is not None]
    each = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *layers)
    extra = self.balance * jnp.sum(each['balance_loss']) + self.z * jnp.sum(each['z_loss'])
    tokens = jnp.sum(mask_T).astype(jnp.float32)
    means = {name: tokens * jnp.mean(values) for name, values in each.items()}
    return {'loss': total + tokens * extra, 'cross_entropy': total, **means}


def _of_layer(block: Block, z_BTD: jax.Array, mask_T: jax.Array) -> dict[str, jax.Array] | None:
  """The losses of one layer, whose feed-forward network has read z_BTD; None without experts."""
  if not isinstance(block.ffn, Routed):
    return None
  router = block.ffn.config.router
  logits_TE = block.ffn.scores(z_BTD.reshape(-1, z_BTD.shape[-1]))
  load_E = balance.load(moe.route(logits_TE, router).experts_TX, logits_TE.shape[-1], mask_T)
  p_TE = balance.probabilities(logits_TE, router.score)
  return {
    'balance_loss': balance.balance_loss(p_TE, load_E, mask_T),
    'z_loss': balance.z_loss(logits_TE, mask_T),
    'max_violation': balance.max_violation(load_E),
  }
