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
Tokens outside `mask_T` (padding) do not count. `usage` has what of a part of a batch adds up, and
from the sum over the parts follow the losses and the statistics of the batch.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ops import axes
from ops.moe import Routing, Score

FEW = 0.1  # an expert with less than this part of its even share is called dead
TINY = 1e-20  # keeps means of nothing at zero


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
  axes.check('TE,E,T', probabilities_TE, load_E, mask_T)
  return unevenness(_mean(probabilities_TE, mask_T), load_E)


def unevenness(mean_E: jax.Array, load_E: jax.Array) -> jax.Array:
  """The balance loss by the mean probabilities of the experts; leading axes are kept."""
  sizes = axes.check('...E,...E', mean_E, load_E)
  return sizes['E'] * jnp.sum(jax.lax.stop_gradient(parts(load_E)) * mean_E, axis=-1)


def parts(load_E: jax.Array) -> jax.Array:
  """The load of each expert as a part of all choices; leading axes are kept."""
  return load_E / jnp.maximum(jnp.sum(load_E, axis=-1, keepdims=True), TINY)


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
  sizes = axes.check('...E,...E', bias_E, load_E)
  # Loads are whole numbers, of which no rounding makes an even one uneven.
  below_E = jnp.sign(jnp.sum(load_E, axis=-1, keepdims=True) - sizes['E'] * load_E)
  moved_E = bias_E + rate * below_E
  return moved_E - jnp.mean(moved_E, axis=-1, keepdims=True)


def max_violation(load_E: jax.Array) -> jax.Array:
  """How far the fullest expert is above the mean load, as a part of it; 0 if all are even.

  Leading axes are kept.
  """
  return jnp.max(load_E, axis=-1) / jnp.maximum(jnp.mean(load_E, axis=-1), TINY) - 1


def usage(
  logits_TE: jax.Array,
  routing: Routing,
  score: Score,
  mask_T: jax.Array | None = None,
  kept_TX: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """How experts are used, as float32 sums over tokens, of which those of parts add up.

  tokens: how many there are.  load: choices per expert, [E].  probability: of each expert, [E].
  token_entropy, top_weight, square_z: see `statistics`.  dropped: choices outside `kept_TX`.
  """
  sizes = axes.check('TE,TX,T,TX', logits_TE, routing.experts_TX, mask_T, kept_TX)
  ones_T, p_TE = _mask(mask_T, sizes['T']), probabilities(logits_TE, score)
  total = lambda values: jnp.tensordot(ones_T, values.astype(jnp.float32), 1)
  z_T = jax.nn.logsumexp(logits_TE.astype(jnp.float32), axis=-1)
  gone_TX = jnp.zeros(routing.experts_TX.shape) if kept_TX is None else ~kept_TX
  return {
    'tokens': jnp.sum(ones_T),
    'load': load(routing.experts_TX, sizes['E'], mask_T),
    'probability': total(p_TE),
    'token_entropy': total(_entropy(p_TE)),
    'top_weight': total(routing.weights_TX[:, 0]),
    'square_z': total(jnp.square(z_T)),
    'dropped': jnp.sum(total(gone_TX)),
  }


def losses(used: Mapping[str, jax.Array], load_E: jax.Array | None = None) -> dict[str, jax.Array]:
  """The balance loss and the z-loss by the `usage` of tokens; leading axes of it are kept.

  `load_E` is the load of the whole batch, where the tokens are a part of it.
  """
  tokens = jnp.maximum(used['tokens'], TINY)
  own_E = used['load'] if load_E is None else load_E
  return {
    'balance_loss': unevenness(used['probability'] / tokens[..., None], own_E),
    'z_loss': used['square_z'] / tokens,
  }


def statistics(used: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """What shows how a router works, by name, from the `usage` of tokens; leading axes are kept.

  max_violation: see there.  dead: experts with less than a tenth of an even share.
  token_entropy: of the probabilities of a token, in nats, the mean over tokens.
  mean_entropy: of the mean probabilities; above the former by what experts specialize.
  top_weight: the mean weight of the first choice.  z: the root of the z-loss.
  dropped: the part of all choices that found no room.
  """
  tokens, load_E = jnp.maximum(used['tokens'], TINY), used['load']
  few_E = load_E < FEW * jnp.mean(load_E, axis=-1, keepdims=True)
  return {
    'max_violation': max_violation(load_E),
    'dead': jnp.sum(few_E, axis=-1).astype(jnp.float32),
    'token_entropy': used['token_entropy'] / tokens,
    'mean_entropy': _entropy(used['probability'] / tokens[..., None]),
    'top_weight': used['top_weight'] / tokens,
    'z': jnp.sqrt(used['square_z'] / tokens),
    'dropped': used['dropped'] / jnp.maximum(jnp.sum(load_E, axis=-1), TINY),
  }


def _entropy(p):
  return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)


def _mask(mask_T, tokens):
  return jnp.ones(tokens, jnp.float32) if mask_T is None else mask_T.astype(jnp.float32)


def _mean(values, mask_T):
  """The mean over tokens, the first axis, of those that count."""
  weights_T = _mask(mask_T, len(values))
  return jnp.tensordot(weights_T, values, 1) / jnp.maximum(jnp.sum(weights_T), 1)
