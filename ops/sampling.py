"""Choosing the next token of each row: greedy, or drawn from a distribution cut to its likely part.

The cuts apply in the order temperature, top-k, top-p, min-p, each to what the one before has left,
as in Hugging Face transformers. Top-p (nucleus) after Holtzman et al. (2019),
https://arxiv.org/abs/1904.09751; min-p after Nguyen et al. (2024), https://arxiv.org/abs/2407.01082.

Settings and keys are arrays with an entry per row, so rows of different settings share a program,
and what a row draws depends on its own logits, settings and key alone. Top-p sorts the vocabulary
and is the only costly cut; a cut that no row asks for is not compiled.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """The settings of a batch, an entry per row. None: no row draws, or no row has such a cut.

  A row of temperature 0 is greedy. The neutral entries of the cuts are the size of the vocabulary
  or more for top-k, 1 for top-p, 0 for min-p. `most` is static: no smaller than any top-k that
  cuts.
  """

  temperature_B: jax.Array | None = None
  top_k_B: jax.Array | None = None
  top_p_B: jax.Array | None = None
  min_p_B: jax.Array | None = None
  most: int = dataclasses.field(default=0, metadata={'static': True})


GREEDY = Sampling()
_ALL = np.iinfo(np.int32).max  # a top-k that keeps every token


def settings(configs: Sequence[SamplingConfig]) -> Sampling:
  """The settings of a batch from those of its rows."""
  drawn = [config for config in configs if config.temperature > 0]
  if not drawn:
    return GREEDY

  def rows(name, neutral, dtype):
    values = [getattr(config, name) for config in configs]
    if not any(getattr(config, name) not in (None, neutral) for config in drawn):
      return None
    return jnp.asarray([neutral if value is None else value for value in values], dtype)

  top_k_B = rows('top_k', _ALL, jnp.int32)
  most = 0 if top_k_B is None else max(config.top_k or 0 for config in drawn)
  return Sampling(
    temperature_B=jnp.asarray([config.temperature for config in configs], jnp.float32),
    top_k_B=top_k_B,
    top_p_B=rows('top_p', 1.0, jnp.float32),
    min_p_B=rows('min_p', 0.0, jnp.float32),
    # A power of two, so that few programs are compiled.
    most=1 << (most - 1).bit_length() if most else 0,
  )


def sample(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array | None) -> jax.Array:
  """Chooses one token per row: [B] in int32. `keys_B` are random keys; greedy choice needs none."""
  axes.check('BV', logits_BV)
  greedy_B = jax.lax.platform_dependent(logits_BV, cpu=_top, default=_argmax)
  if sampling.temperature_B is None:
    return greedy_B
  if keys_B is None:
    raise ValueError('drawing at a temperature above 0 needs a random key per row')
  axes.check('BV,B', logits_BV, keys_B)
  drawn_B = jax.vmap(jax.random.categorical)(keys_B, cut(logits_BV, sampling))
  return jnp.where(sampling.temperature_B > 0, drawn_B.astype(jnp.int32), greedy_B)


def cut(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """Returns the logits that `sample` draws from: scaled, float32, -inf where cut away.

  A row of temperature 0 is not scaled.
  """
  axes.check('BV,B,B,B,B', logits_BV, *_arrays(sampling))
  if sampling.temperature_B is None:
    raise ValueError('at the temperature 0 nothing is drawn: take the argmax')
  scale_B = jnp.where(sampling.temperature_B > 0, sampling.temperature_B, 1.0)
  logits_BV = logits_BV.astype(jnp.float32) / scale_B[:, None]
  if sampling.top_k_B is not None:
    logits_BV = _keep(logits_BV, _among_top_k(logits_BV, sampling.top_k_B, sampling.most))
  if sampling.top_p_B is not None:
    logits_BV = _keep(logits_BV, _among_top_p(logits_BV, sampling.top_p_B))
  if sampling.min_p_B is not None:
    least_B = jnp.max(logits_BV, axis=-1) + jnp.log(sampling.min_p_B)
    logits_BV = _keep(logits_BV, logits_BV >= least_B[:, None])
  return logits_BV


def _arrays(sampling):
  return sampling.temperature_B, sampling.top_k_B, sampling.top_p_B, sampling.min_p_B


def _argmax(logits_BV):
  return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def _top(logits_BV):
  # The same token, the first of equals, in a quarter of the time: XLA:CPU's argmax is not
  # vectorized, and took 5 % of a decode step of a 4-bit model with a vocabulary of 49152.
  return jax.lax.top_k(logits_BV, 1)[1][:, 0]


def _keep(logits_BV, kept_BV):
  return jnp.where(kept_BV, logits_BV, -jnp.inf)


def _among_top_k(logits_BV, k_B, most):
  highest = jax.lax.top_k(logits_BV, min(most, logits_BV.shape[-1]))[0]
  last = jnp.minimum(k_B, highest.shape[-1]) - 1
  least_B = jnp.take_along_axis(highest, last[:, None], axis=-1)[:, 0]
  return (logits_BV >= least_B[:, None]) | (k_B > most)[:, None]


def _among_top_p(logits_BV, p_B):
  order_BV = jnp.argsort(logits_BV, axis=-1, descending=True)
  probabilities_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
  # A token stays if those before it do not reach p yet, so the first one always stays. A p of 1
  # keeps all, although rounding may bring the sum to 1 early.
  before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
  kept = ((before_BV < p_B[:, None]) | (p_B >= 1)[:, None]).at[:, 0].set(True)
  return jnp.put_along_axis(jnp.zeros_like(kept), order_BV, kept, axis=-1, inplace=False)
