"""Computes losses without storing all logits, and the Kullback-Leibler divergence.

With a vocabulary of 100,000 the logits of a batch take more memory than anything else in training.
`over_tokens` therefore takes hidden states and a function that maps them to losses by way of
logits, processes the positions in chunks, and recomputes the logits of a chunk in the backward
pass. It saves B T V numbers of memory and costs one more product with the head. After Wijmans et
al. (2024), https://arxiv.org/abs/2411.09009. Their kernel also keeps the logits of a chunk in fast
memory; here XLA decides that.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ops import axes, divergences


def over_tokens(fn: Callable[..., Any], *arrays_BT: jax.Array, chunk: int = 1024) -> Any:
  """Applies `fn` to chunks of the positions of arrays [B, T, ...], and joins its results.

  Nothing that `fn` computes inside a chunk is kept for the backward pass.

  Args:
    fn: maps arrays [B, columns, ...] to a pytree of arrays [B, columns, ...], position by position.
      It may close over parameters; they get gradients.
    arrays_BT: the arrays that are cut into chunks, a pytree each.
    chunk: the maximum number of tokens, over all rows, that `fn` sees at a time. A chunk has at
      least one position of each row.

  Returns:
    The pytree of `fn` with arrays [B, T, ...].
  """
  if chunk < 1:
    raise ValueError(f'chunk must be at least 1 token, not {chunk}')
  batch, length = jax.tree.leaves(arrays_BT)[0].shape[:2]
  # Chunks split T and not B, and the positions of a chunk lie at equal distances, so that each
  # chunk has tokens of all devices among which rows or positions are divided.
  columns = min(max(1, chunk // batch), length)
  chunks = jax.tree.map(lambda a: _chunked(a, columns), arrays_BT)
  found = jax.lax.map(jax.checkpoint(lambda parts: fn(*parts)), chunks)
  return jax.tree.map(lambda a: _joined(a, length), found)


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
    labels_BT: the token to predict at each position; a negative label is ignored and gives 0.
    unembed: maps x[..., D] to logits [..., V]. It may close over parameters; they get gradients.
    chunk: the maximum number of tokens, over all rows, whose logits are stored at a time. A chunk
      has at least one position of each row.

  Returns:
    [B, T] in float32. The caller divides by the number of labels that are not negative.
  """
  axes.check('BTD,BT', x_BTD, labels_BT)
  nll = lambda x_BTD, labels_BT: label_nll(unembed(x_BTD), labels_BT)
  return over_tokens(nll, x_BTD, labels_BT, chunk=chunk)


def kl_divergence(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
  """Computes KL(p || q) in nats between the softmax of two logits[..., V]: [...] in float32.

  The result is accurate even where p and q almost agree, as those of a model and its compressed
  form do: a divergence of 1e-8 has a relative error of at most 1 %. A token with a p-logit of -inf
  adds nothing. A token whose q-logit is -inf but whose p-logit is not makes it infinite.
  """
  axes.check('...V,...V', p_logits, q_logits)
  if p_logits.shape != q_logits.shape:
    raise ValueError(f'the logits have the shapes {p_logits.shape} and {q_logits.shape}')
  log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (p_logits, q_logits))
  return divergences.kl(log_p, log_q)


def _chunked(array, columns):
  """Splits [B, T, ...] into [chunks, B, columns, ...]; T is padded to a multiple of `columns`.

  Chunk i has the positions i, i + chunks, i + 2 chunks, ...
  """
  batch, length, *rest = array.shape
  widths = [(0, 0), (0, -length % columns)] + [(0, 0)] * len(rest)
  chunks = -(-length // columns)
  return jnp.moveaxis(jnp.pad(array, widths).reshape(batch, columns, chunks, *rest), 2, 0)


def _joined(chunks, length):
  """Joins [chunks, B, columns, ...] to [B, T, ...], without the padding."""
  count, batch, columns, *rest = chunks.shape
  return jnp.moveaxis(chunks, 0, 2).reshape(batch, columns * count, *rest)[:, :length]


def label_nll(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
  """-log softmax(logits)[label] in nats, float32 [B, T]; 0 where the label is negative."""
  logits_BTV = logits_BTV.astype(jnp.float32)
  labels = jnp.maximum(labels_BT, 0)[:, :, None]
  picked_BT = jnp.take_along_axis(logits_BTV, labels, axis=-1)[:, :, 0]
  nll_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT
  return jnp.where(labels_BT >= 0, nll_BT, 0.0)
