"""How evenly experts are used: losses, the update of a bias, and statistics.

  balance_loss  Fedus et al. (2021), https://arxiv.org/abs/2101.03961, equation 4
  z_loss        Zoph et al. (2022), ST-MoE, https://arxiv.org/abs/2202.08906, equation 5
  updated_bias  Wang et al. (2024), balancing without a loss, https://arxiv.org/abs/2408.15664

All are of one layer, and a model adds them up. transformers pools the layers before it measures,
which calls a model balanced whose layers collapse on different experts. The balance loss is 1 if
the experts are used evenly and E / X if all tokens choose the same X of E; transformers' is X times
that, so its coefficients are divided by X.

The counts are an argument of the loss, so that they can be those of the whole batch where tokens
come in micro-batches or on several devices: balance within a small part of a batch is a stronger
demand, and keeps experts from specializing (Qiu et al. 2025, https://arxiv.org/abs/2501.11873).
Tokens outside `mask_T` (padding) do not count.
"""

import jax
import jax.numpy as jnp

from ops import axes
from ops.moe import Routing, Score

FEW = 0.1  # an expert with less than this part of its even share is called dead


def load(experts_TX: jax.Array, count: int, mask_T: jax.Array | None = None) -> jax.Array:
  """How many choices each of `count` experts gets: float32 [E]. Loads of parts add up."""
  sizes = axes.check('TX,T', experts_TX, mask_T)
  ones_T = _mask(mask_T, sizes['T'])
  each_M = jnp.repeat(ones_T, sizes['X'])
  return jnp.bincount(experts_TX.reshape(-1), weights=each_M, length=count)


def probabilities(logits_TE: jax.Array, score: Score) -> jax.Array:
  """The scores of all experts as parts of 1, float32 [T, E]."""
  logits_TE = logits_TE.astype(jnp.float32)
  if score == 'sigmoid':
    scores_TE = jax.nn.sigmoid(logits_TE)
    return scores_TE / jnp.sum(scores_TE, axis=-1, keepdims=True)
  return jax.nn.softmax(logits_TE, axis=-1)


def balance_loss(
  probabilities_TE: jax.Array, load_E: jax.Array, mask_T: jax.Array | None = None
) -> jax.Array:
  """E times the sum over experts of (part of all choices) times (mean probability): a scalar.

  The choices have no gradient; the probabilities have. Means over parts of a batch with as many
  tokens each average to the loss of the batch, if all get its load.
  """
  sizes = axes.check('TE,E,T', probabilities_TE, load_E, mask_T)
  part_E = jax.lax.stop_gradient(load_E / jnp.maximum(jnp.sum(load_E), 1))
  return sizes['E'] * jnp.dot(part_E, _mean(probabilities_TE, mask_T))


def z_loss(logits_TE: jax.Array, mask_T: jax.Array | None = None) -> jax.Array:
  """The mean square of log(sum(exp(logits))), which keeps the logits small: a scalar."""
  axes.check('TE,T', logits_TE, mask_T)
  z_T = jax.nn.logsumexp(logits_TE.astype(jnp.float32), axis=-1)
  return _mean(jnp.square(z_T), mask_T)


def updated_bias(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
  """The bias of the choice after an update: experts with less than the mean load rise.

  It moves by `rate` (DeepSeek-V3: 0.001) whatever the distance from the mean. The paper lets the
  mean of the biases drift; here it is kept at zero, which changes no choice.
  """
  axes.check('E,E', bias_E, load_E)
  moved_E = bias_E + rate * jnp.sign(jnp.mean(load_E) - load_E)
  return moved_E - jnp.mean(moved_E)


def max_violation(load_E: jax.Array) -> jax.Array:
  """How far the fullest expert is above the mean load, as a part of it; 0 if all are even."""
  return jnp.max(load_E) / jnp.maximum(jnp.mean(load_E), jnp.finfo(load_E.dtype).tiny) - 1


def statistics(
  logits_TE: jax.Array, routing: Routing, score: Score, mask_T: jax.Array | None = None
) -> dict[str, jax.Array]:
  """What shows how a router works, as float32 scalars by name.

  max_violation: see there.  dead: experts with less than a tenth of an even share.
  token_entropy: of the probabilities of a token, in nats, the mean over tokens.
  mean_entropy: of the mean probabilities; above the former by what experts specialize.
  top_weight: the mean weight of the first choice.  z: the root of the z-loss.
  """
  count = logits_TE.shape[-1]
  load_E = load(routing.experts_TX, count, mask_T)
  p_TE = probabilities(logits_TE, score)
  return {
    'max_violation': max_violation(load_E),
    'dead': jnp.sum(load_E < FEW * jnp.mean(load_E)).astype(jnp.float32),
    'token_entropy': _mean(_entropy(p_TE), mask_T),
    'mean_entropy': _entropy(_mean(p_TE, mask_T)),
    'top_weight': _mean(routing.weights_TX[:, 0], mask_T),
    'z': jnp.sqrt(z_loss(logits_TE, mask_T)),
  }


def _entropy(p):
  return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)


def _mask(mask_T, tokens):
  return jnp.ones(tokens, jnp.float32) if mask_T is None else mask_T.astype(jnp.float32)


def _mean(values, mask_T):
  """The mean over tokens, the first axis, of those that count."""
  weights_T = _mask(mask_T, len(values))
  return jnp.tensordot(weights_T, values, 1) / jnp.maximum(jnp.sum(weights_T), 1)
