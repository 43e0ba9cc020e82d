"""Choosing the next token: greedy, or drawn from a distribution that is cut to its likely part.

The cuts apply in the order temperature, top-k, top-p, min-p, each to what the one before has left,
as in Hugging Face transformers. Top-p (nucleus) after Holtzman et al. (2019),
https://arxiv.org/abs/1904.09751; min-p after Nguyen et al. (2024), https://arxiv.org/abs/2407.01082.
Top-p sorts the vocabulary and is the only costly one.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ops import axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """How a token is chosen from logits; None switches a cut off."""

  temperature: float = 0.0  # 0: the most likely token, whatever the cuts say
  top_k: int | None = None  # the k most likely tokens, and those as likely as the last of them
  top_p: float | None = None  # the fewest tokens whose probability together reaches this
  min_p: float | None = None  # tokens at least this times as likely as the most likely one

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise ValueError(f'the temperature must be 0 or more, not {self.temperature}')
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f'top_k must be at least 1, not {self.top_k}; None switches it off')
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(f'top_p must be above 0 and at most 1, not {self.top_p}')
    if self.min_p is not None and not 0 <= self.min_p <= 1:
      raise ValueError(f'min_p must be between 0 and 1, not {self.min_p}')


def sample(logits_BV: jax.Array, config: SamplingConfig, *, key: jax.Array | None) -> jax.Array:
  """Chooses one token a row: [B] in int32. Greedy choice needs no key."""
  axes.check('BV', logits_BV)
  if config.temperature == 0:
    return jax.lax.platform_dependent(logits_BV, cpu=_top, default=_argmax)
  if key is None:
    raise ValueError(f'drawing at the temperature {config.temperature} needs a random key')
  return jax.random.categorical(key, cut(logits_BV, config), axis=-1).astype(jnp.int32)


def cut(logits_BV: jax.Array, config: SamplingConfig) -> jax.Array:
  """Returns the logits that `sample` draws from: scaled, float32, -inf where cut away.

  The temperature must not be 0.
  """
  axes.check('BV', logits_BV)
  if config.temperature == 0:
    raise ValueError('at the temperature 0 nothing is drawn: take the argmax')
  logits_BV = logits_BV.astype(jnp.float32) / config.temperature
  if config.top_k is not None and config.top_k < logits_BV.shape[-1]:
    logits_BV = _keep(logits_BV, _among_top_k(logits_BV, config.top_k))
  if config.top_p is not None and config.top_p < 1:
    logits_BV = _keep(logits_BV, _among_top_p(logits_BV, config.top_p))
  if config.min_p:
    peak_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = _keep(logits_BV, logits_BV >= peak_B1 + math.log(config.min_p))
  return logits_BV


def _argmax(logits_BV):
  return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def _top(logits_BV):
  # The same token, the first of equals, in a quarter of the time: XLA:CPU's argmax is not
  # vectorized, and took 5 % of a decode step of a 4-bit model with a vocabulary of 49152.
  return jax.lax.top_k(logits_BV, 1)[1][:, 0]


def _keep(logits_BV, kept_BV):
  return jnp.where(kept_BV, logits_BV, -jnp.inf)


def _among_top_k(logits_BV, k):
  return logits_BV >= jax.lax.top_k(logits_BV, k)[0][:, -1:]


def _among_top_p(logits_BV, p):
  order_BV = jnp.argsort(logits_BV, axis=-1, descending=True)
  probabilities_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
  # A token stays if those before it do not reach p yet; so the first one always stays.
  before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
  kept = (before_BV < p).at[:, 0].set(True)
  return jnp.put_along_axis(jnp.zeros_like(kept), order_BV, kept, axis=-1, inplace=False)
