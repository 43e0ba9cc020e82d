"""Choosing the next token of each row: greedy, or drawn from a distribution cut to its likely part.

Penalties, biases and masks change the logits first. The cuts apply in the order temperature, top-k,
top-p, min-p, each to the tokens that the one before has left, as in Hugging Face transformers.
Top-p (nucleus) after Holtzman et al. (2019), https://arxiv.org/abs/1904.09751; min-p after Nguyen
et al. (2024), https://arxiv.org/abs/2407.01082; the repetition penalty after Keskar et al. (2019),
"CTRL", https://arxiv.org/abs/1909.05858; those of presence and frequency as in OpenAI's API.

Settings, histories and keys are arrays with an entry per row, so rows of different settings share a
program, and the draw of a row depends on its own logits, settings, history and key alone. Settings
that no row of a batch uses are skipped at run time. Nothing sorts the vocabulary: the smallest
logit that stays is found bit by bit, in 32 passes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ops import axes

STRETCH = 256  # logits of a stretch, see `_top`
STRONGEST_PENALTY = 100.0  # of presence or frequency; OpenAI's API allows 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """How a token is chosen from logits; None switches a cut off."""

  temperature: float = 0.0  # 0: the most likely token, whatever the cuts say
  top_k: int | None = None  # the k most likely tokens, and those as likely as the last of them
  top_p: float | None = None  # the fewest tokens whose probability together reaches this
  min_p: float | None = None  # tokens at least this times as likely as the most likely one
  repetition_penalty: float = (
    1.0  # divides positive logits of tokens seen, multiplies negative ones
  )
  presence_penalty: float = 0.0  # subtracted from the logits of tokens that were generated
  frequency_penalty: float = 0.0  # the same, once for each time
  logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise ValueError(f'the temperature must be 0 or more, not {self.temperature}')
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f'top_k must be at least 1, not {self.top_k}; None switches it off')
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(f'top_p must be above 0 and at most 1, not {self.top_p}')
    if self.min_p is not None and not 0 <= self.min_p <= 1:
      raise ValueError(f'min_p must be between 0 and 1, not {self.min_p}')
    if not 0 < self.repetition_penalty < math.inf:
      raise ValueError(
        f'repetition_penalty must be above 0, not {self.repetition_penalty}; 1 switches it off'
      )
    for name in ('presence_penalty', 'frequency_penalty'):
      if not abs(getattr(self, name)) <= STRONGEST_PENALTY:
        raise ValueError(
          f'{name} must be within -{STRONGEST_PENALTY:g} and {STRONGEST_PENALTY:g}, not '
          f'{getattr(self, name)}'
        )
    tokens = [token for token, _ in self.logit_bias]
    if len(set(tokens)) < len(tokens) or any(token < 0 for token in tokens):
      raise ValueError('logit_bias names each token once, by an id of 0 or more')
    if not all(math.isfinite(bias) for _, bias in self.logit_bias):
      raise ValueError('logit_bias adds finite numbers; -100 forbids a token in practice')

  @property
  def remembers(self) -> bool:
    """Whether the choice depends on a `History`."""
    penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
    return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """The settings of a batch, an entry per row. In `GREEDY` all are None, and no row draws.

  A row of temperature 0 is greedy. The neutral entries are the largest int32 for top-k, 1 for top-p
  and the repetition penalty, 0 for the others.
  """

  temperature_B: jax.Array | None = None
  top_k_B: jax.Array | None = None
  top_p_B: jax.Array | None = None
  min_p_B: jax.Array | None = None
  repetition_B: jax.Array | None = None
  presence_B: jax.Array | None = None
  frequency_B: jax.Array | None = None


GREEDY = Sampling()
_ALL = np.iinfo(np.int32).max  # a top-k that keeps every token


def settings(configs: Sequence[SamplingConfig], array: Any = jnp.asarray) -> Sampling:
  """The settings of a batch from those of its rows, as arrays made by `array`."""

  def rows(name, neutral, dtype=np.float32):
    values = [getattr(config, name) for config in configs]
    return array([neutral if value is None else value for value in values], dtype)

  return Sampling(
    temperature_B=rows('temperature', 0.0),
    # No vocabulary has as many tokens as an int32 holds.
    top_k_B=array([min(config.top_k or _ALL, _ALL) for config in configs], np.int32),
    top_p_B=rows('top_p', 1.0),
    min_p_B=rows('min_p', 0.0),
    repetition_B=rows('repetition_penalty', 1.0),
    presence_B=rows('presence_penalty', 0.0),
    frequency_B=rows('frequency_penalty', 0.0),
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
  """The data of each row that penalties and biases read."""

  prompt_BV: jax.Array  # bool: whether the prompt has the token
  counts_BV: jax.Array  # int16: how often it was generated
  bias_BV: jax.Array  # float32: what is added to its logit

  @classmethod
  def empty(cls, batch: int, vocabulary: int) -> 'History':
    zeros = lambda dtype: jnp.zeros((batch, vocabulary), dtype)
    return cls(prompt_BV=zeros(bool), counts_BV=zeros(jnp.int16), bias_BV=zeros(jnp.float32))

  @classmethod
  def of(
    cls, config: SamplingConfig, prompt: Sequence[int], new: Sequence[int], vocabulary: int
  ) -> 'History':
    """The history of one row, in numpy."""
    prompt_V, counts_V = np.zeros(vocabulary, bool), np.zeros(vocabulary, np.int16)
    bias_V = np.zeros(vocabulary, np.float32)
    prompt_V[np.asarray(prompt, np.int64)] = True
    np.add.at(counts_V, np.asarray(new, np.int64), 1)
    for token, bias in config.logit_bias:
      bias_V[token] = bias
    return cls(prompt_BV=prompt_V[None], counts_BV=counts_V[None], bias_BV=bias_V[None])

  def counted(self, tokens_B: jax.Array, real_B: jax.Array | None = None) -> 'History':
    """Adds one more token to each row, or to these rows alone."""
    one_B = jnp.ones(len(tokens_B), jnp.int16) if real_B is None else real_B.astype(jnp.int16)
    at = jnp.arange(len(tokens_B)), tokens_B
    counts_BV = self.counts_BV.at[at].add(one_B, mode='promise_in_bounds')
    return dataclasses.replace(self, counts_BV=counts_BV)


def adjust(logits_BV: jax.Array, sampling: Sampling, history: History) -> jax.Array:
  """The logits after penalties and biases: float32 [B, V]."""
  axes.check('BV,BV,BV,BV', logits_BV, history.prompt_BV, history.counts_BV, history.bias_BV)
  logits_BV = logits_BV.astype(jnp.float32)
  repeats, presence = sampling.repetition_B[:, None], sampling.presence_B[:, None]
  frequency = sampling.frequency_B[:, None]

  def penalized(logits_BV):
    generated_BV = history.counts_BV > 0
    weaker_BV = jnp.where(logits_BV > 0, logits_BV / repeats, logits_BV * repeats)
    logits_BV = jnp.where(generated_BV | history.prompt_BV, weaker_BV, logits_BV)
    counted_BV = frequency * history.counts_BV.astype(jnp.float32)
    return logits_BV - counted_BV - jnp.where(generated_BV, presence, 0.0)

  any_penalty = ((repeats != 1) | (presence != 0) | (frequency != 0)).any()
  logits_BV = _if(any_penalty, penalized, logits_BV)
  # Not under a condition: it takes as long to find that all are zero as to add them.
  return logits_BV + history.bias_BV


def allow(logits_BV: jax.Array, words_B_: jax.Array) -> jax.Array:
  """Allows only tokens whose bit is set: bit v % 32 of word v // 32, uint32 [B, ceil(V / 32)]."""
  at_V = np.arange(logits_BV.shape[-1])
  bits_BV = jnp.take(words_B_, at_V // 32, axis=1) >> (at_V % 32).astype(np.uint32)[None]
  return _keep(logits_BV, (bits_BV & 1) == 1)


def sample(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array | None) -> jax.Array:
  """Chooses one token per row: [B] in int32. `keys_B` are random keys; greedy choice needs none."""
  axes.check('BV', logits_BV)
  greedy = lambda logits_BV: jax.lax.platform_dependent(logits_BV, cpu=_top, default=_argmax)
  if sampling.temperature_B is None:
    return greedy(logits_BV)
  if keys_B is None:
    raise ValueError('drawing at a temperature above 0 needs a random key per row')
  axes.check('BV,B', logits_BV, keys_B)

  def drawn(logits_BV):
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, cut(logits_BV, sampling))
    return jnp.where(sampling.temperature_B > 0, drawn_B.astype(jnp.int32), greedy(logits_BV))

  return jax.lax.cond((sampling.temperature_B > 0).any(), drawn, greedy, logits_BV)


def cut(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """Returns the logits that `sample` draws from: scaled, float32, -inf where cut away.

  A row of temperature 0 is not scaled.
  """
  if sampling.temperature_B is None:
    raise ValueError('at the temperature 0 nothing is drawn: take the argmax')
  top_k_B, top_p_B, min_p_B = sampling.top_k_B, sampling.top_p_B, sampling.min_p_B
  axes.check('BV,B,B,B,B', logits_BV, sampling.temperature_B, top_k_B, top_p_B, min_p_B)
  scale_B = jnp.where(sampling.temperature_B > 0, sampling.temperature_B, 1.0)
  logits_BV = logits_BV.astype(jnp.float32) / scale_B[:, None]
  among = lambda chosen: lambda logits_BV: _keep(logits_BV, chosen(logits_BV))
  logits_BV = _if(
    (top_k_B < logits_BV.shape[-1]).any(), among(lambda x: _among_top_k(x, top_k_B)), logits_BV
  )
  logits_BV = _if((top_p_B < 1).any(), among(lambda x: _among_top_p(x, top_p_B)), logits_BV)
  least_B = jnp.max(logits_BV, axis=-1) + jnp.log(min_p_B)
  return _keep(logits_BV, logits_BV >= least_B[:, None])


def _if(wanted, change, logits_BV):
  return jax.lax.cond(wanted, change, lambda logits_BV: logits_BV, logits_BV)


def _argmax(logits_BV):
  return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def _top(logits_BV):
  """The same token, the first of equals: the likeliest one of the stretch with the largest logit.

  XLA:CPU vectorizes a maximum, but no argmax.
  """
  logits_BV = jnp.pad(
    logits_BV, ((0, 0), (0, -logits_BV.shape[1] % STRETCH)), constant_values=-jnp.inf
  )
  logits_B__ = logits_BV.reshape(len(logits_BV), -1, STRETCH)
  best_B = jnp.argmax(logits_B__.max(2), axis=1)
  within_B_ = jnp.take_along_axis(logits_B__, best_B[:, None, None], axis=1)[:, 0]
  return (best_B * STRETCH + jnp.argmax(within_B_, axis=1)).astype(jnp.int32)


def _keep(logits_BV, kept_BV):
  return jnp.where(kept_BV, logits_BV, -jnp.inf)


def _among_top_k(logits_BV, k_B):
  order_BV = _ordered(logits_BV)
  k_B = jnp.minimum(k_B, logits_BV.shape[-1])
  least_B = _largest(lambda least_B: (order_BV >= least_B[:, None]).sum(-1) >= k_B, k_B)
  return order_BV >= least_B[:, None]


def _among_top_p(logits_BV, p_B):
  order_BV, probabilities_BV = _ordered(logits_BV), jax.nn.softmax(logits_BV, axis=-1)
  mass = lambda kept_BV: jnp.where(kept_BV, probabilities_BV, 0.0).sum(-1)
  least_B = _largest(lambda least_B: mass(order_BV >= least_B[:, None]) >= p_B, p_B)
  above_BV, equal_BV = order_BV > least_B[:, None], order_BV == least_B[:, None]
  # Of equally likely tokens, the first ones, as many as it takes; at least one.
  missing_B = (p_B - mass(above_BV)) / jnp.where(equal_BV, probabilities_BV, 0.0).max(-1)
  earlier_BV = jnp.cumsum(equal_BV, axis=-1) - equal_BV
  kept_BV = above_BV | (equal_BV & (earlier_BV < missing_B[:, None]))
  # A p of 1 keeps all, although rounding may bring the sum to 1 early.
  return kept_BV | (p_B >= 1)[:, None]


def _ordered(x: jax.Array) -> jax.Array:
  """Numbers in uint32 in the order of the floats."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds, like_B) -> jax.Array:
  """The largest uint32 of each row for which `holds`, which is so for all below: [B]."""

  def next_bit(i, found_B):
    more_B = found_B | (jnp.uint32(1 << 31) >> jnp.uint32(i))
    return jnp.where(holds(more_B), more_B, found_B)

  return jax.lax.fori_loop(0, 32, next_bit, jnp.zeros(like_B.shape, jnp.uint32))


def logprobs(
  logits_BV: jax.Array, tokens_B: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The logarithms of probabilities: (of the tokens [B], of the likeliest ones [B, count], ids)."""
  axes.check('BV,B', logits_BV, tokens_B)
  logs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
  own_B = jnp.take_along_axis(logs_BV, tokens_B[:, None], axis=-1)[:, 0]
  return own_B, *jax.lax.top_k(logs_BV, min(count, logits_BV.shape[-1]))
