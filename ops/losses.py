"""Cross entropy that never holds all logits, and the Kullback-Leibler divergence.

With a vocabulary of 100,000 the logits of a batch outweigh everything else in training. Cross
entropy here takes hidden states and the function that makes logits of them, works through the
positions in chunks, and makes the logits of a chunk again in the backward pass: one more product
with the head buys B T V numbers of memory. After the observation in Wijmans et al. (2024),
https://arxiv.org/abs/2411.09009; their kernel keeps even a chunk's logits in fast memory, this
leaves that to XLA.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ops import axes


def cross_entropy(
  x_BTD: jax.Array,
  labels_BT: jax.Array,
  unembed: Callable[[jax.Array], jax.Array],
  *,
  chunk: int = 1024,
) -> jax.Array:
  """Computes -log softmax(unembed(x))[label] for each token, in nats.

  Args:
    x_BTD: hidden states after the final norm.
    labels_BT: the token to predict at each position; negative ones are ignored and give 0.
    unembed: makes logits [..., V] of x[..., D]. It may close over parameters; gradients flow there.
    chunk: the most tokens, over all rows, whose logits exist at a time (but always at least one
      position of each row).

  Returns:
    [B, T] in float32. The caller divides by the number of labels that count.
  """
  sizes = axes.check('BTD,BT', x_BTD, labels_BT)
  if chunk < 1:
    raise ValueError(f'a chunk holds at least one token, not {chunk}')
  # Chunks cut T and keep B whole, so that a batch spread over devices stays where it is.
  columns = min(max(1, chunk // sizes['B']), sizes['T'])
  chunks = (_chunked(x_BTD, columns, 0), _chunked(labels_BT, columns, -1))
  nll = jax.lax.map(jax.checkpoint(lambda args: _nll(unembed(args[0]), args[1])), chunks)
  return jnp.moveaxis(nll, 0, 1).reshape(sizes['B'], -1)[:, : sizes['T']]


def kl_divergence(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
  """Computes KL(p || q) in nats between the softmax of two logits[..., V]: [...] in float32.

  Accurate even where the two almost agree, as a model and its compressed twin do: a divergence of
  1e-8 is still right to a hundredth. A token that p rules out (-inf) counts nothing; one that only
  q rules out makes the divergence infinite.
  """
  axes.check('...V,...V', p_logits, q_logits)
  if p_logits.shape != q_logits.shape:
    raise ValueError(f'the logits have the shapes {p_logits.shape} and {q_logits.shape}')
  log_p = jax.nn.log_softmax(p_logits.astype(jnp.float32))
  log_q = jax.nn.log_softmax(q_logits.astype(jnp.float32))
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  ratio = jnp.where(p > 0, log_q - log_p, 0.0)
  # sum(q - p) is zero, and q - p - p log(q/p) is never negative: in this sum the rounding of the
  # logarithms has only second-order effects, while in the usual one it drowns a KL below 1e-6.
  near = (p > 0) & (ratio < 1)
  gap = jnp.where(near, p * jnp.expm1(jnp.minimum(ratio, 1.0)), q - p)
  return jnp.sum(gap - p * ratio, axis=-1)


def _chunked(array, columns, fill):
  """[B, T, ...] to [chunks, B, columns, ...], with T filled up to a whole number of chunks."""
  batch, length, *rest = array.shape
  missing = -length % columns
  widths = [(0, 0), (0, missing)] + [(0, 0)] * len(rest)
  padded = jnp.pad(array, widths, constant_values=fill)
  return jnp.moveaxis(padded.reshape(batch, -1, columns, *rest), 1, 0)


def _nll(logits_BTV, labels_BT):
  logits_BTV = logits_BTV.astype(jnp.float32)
  labels = jnp.maximum(labels_BT, 0)[:, :, None]
  picked_BT = jnp.take_along_axis(logits_BTV, labels, axis=-1)[:, :, 0]
  nll_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT
  return jnp.where(labels_BT >= 0, nll_BT, 0.0)
