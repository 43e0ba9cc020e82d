"""How close a student's next-token distributions are to its teacher's, and to the truth.

All are means over the predicted tokens: the cross entropy of the text, the student's entropy, the
KL divergence in both directions, and the calibration error. The expected calibration error (Guo et
al. 2017, https://arxiv.org/abs/1706.04599) puts the tokens into 15 bins by the probability of the
most likely one, and averages how far this confidence is from the share that is right. On texts that
the student has written itself, only its entropy and the divergences have a meaning.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.transformer import Transformer
from ops import axes, divergences, losses

BINS = 15
CHUNK = 512  # tokens whose logits exist at once
ROWS = 32  # rows that are read at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Closeness:
  """Means over `tokens` predicted tokens, in nats; the calibration error is a probability."""

  cross_entropy: float
  entropy: float
  forward_kl: float  # KL(teacher || student)
  reverse_kl: float  # KL(student || teacher)
  calibration_error: float
  tokens: int


def measure(
  student: Transformer,
  teacher: Transformer,
  tokens_BT: np.ndarray,
  counted_BT: np.ndarray | None = None,
) -> Closeness:
  """Compares two models of one vocabulary on rows of tokens.

  Each token but the first of a row is predicted; `counted_BT` [B, T] says which of them count.
  Raises ValueError if none does.
  """
  axes.check('BT,BT', tokens_BT, counted_BT)
  counted_BT = np.ones(tokens_BT.shape, bool) if counted_BT is None else counted_BT
  counted_BT = counted_BT & (np.arange(tokens_BT.shape[1]) > 0)
  if not counted_BT.any():
    raise ValueError('there is no token to predict')
  sums, bins = np.zeros(4), np.zeros((BINS, 3))
  graphs, states = zip(*(nnx.split(model) for model in (student, teacher)))
  for first in range(0, len(tokens_BT), ROWS):
    rows = slice(first, first + ROWS)
    found = _sums(graphs, states, tokens_BT[rows], counted_BT[rows])
    sums, bins = sums + np.float64(found[0]), bins + np.float64(found[1])
  tokens = int(counted_BT.sum())
  cross_entropy, entropy, forward_kl, reverse_kl = sums / tokens
  # A bin's |right - confidence| is weighted by its share of the tokens.
  error = np.abs(bins[:, 1] - bins[:, 2]).sum() / tokens
  return Closeness(
    cross_entropy=float(cross_entropy),
    entropy=float(entropy),
    forward_kl=float(forward_kl),
    reverse_kl=float(reverse_kl),
    calibration_error=float(error),
    tokens=tokens,
  )


@functools.partial(jax.jit, static_argnums=0)
def _sums(graphs, states, tokens_BT, counted_BT):
  """Sums of four numbers a token, and of (tokens, confidence, right) in each bin."""
  student, teacher = (nnx.merge(graph, state) for graph, state in zip(graphs, states))
  hidden = [model.hidden(tokens_BT)[0][:, :-1] for model in (student, teacher)]

  def of_chunk(x_BTD, y_BTD, labels_BT):
    log_q, log_p = (
      jax.nn.log_softmax(model.logits(x)) for model, x in ((student, x_BTD), (teacher, y_BTD))
    )
    confidence_BT = jnp.exp(jnp.max(log_q, axis=-1))
    right_BT = (jnp.argmax(log_q, axis=-1) == labels_BT).astype(jnp.float32)
    return jnp.stack(
      [
        losses.label_nll(log_q, labels_BT),
        -jnp.sum(jnp.exp(log_q) * log_q, axis=-1),
        divergences.kl(log_p, log_q),
        divergences.kl(log_q, log_p),
        confidence_BT,
        right_BT,
      ],
      axis=-1,
    )

  labels_BT = tokens_BT[:, 1:]
  values_BT_ = losses.over_tokens(of_chunk, *hidden, labels_BT, chunk=CHUNK)
  real_BT1 = counted_BT[:, 1:, None].astype(jnp.float32)
  values_BT_ = values_BT_ * real_BT1
  confidence = values_BT_[..., 4]
  index = jnp.minimum((confidence * BINS).astype(jnp.int32), BINS - 1)
  in_bin = jax.nn.one_hot(index, BINS)
  of_bins = jnp.concatenate([real_BT1, values_BT_[..., 4:]], axis=-1)
  flat = lambda array: array.reshape(-1, array.shape[-1])
  return jnp.sum(values_BT_[..., :4], axis=(0, 1)), flat(in_bin).T @ flat(of_bins)
