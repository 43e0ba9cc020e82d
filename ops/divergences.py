"""Divergences between the next-token distributions of a teacher p and a student q.

  forward KL              KL(p || q)                       covers all that the teacher may say
  reverse KL              KL(q || p)                       keeps to what the teacher would say
  JSD(beta)               beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
  normalized JSD(beta)    JSD(beta) / (beta (1 - beta))
  skewed KL(alpha)        KL(p || alpha p + (1 - alpha) q)
  skewed reverse KL(alpha)  KL(q || alpha q + (1 - alpha) p)

JSD is the generalized Jensen-Shannon divergence of GKD (Agarwal et al. 2024,
https://arxiv.org/abs/2306.13649). It vanishes at both ends: JSD(beta) / beta tends to the forward
KL as beta falls to 0, and JSD(beta) / (1 - beta) to the reverse KL as beta rises to 1. Its gradient
thus shrinks with beta, and a learning rate holds for one beta only. The normalized form is
continuous: it is the forward KL at 0 and the reverse KL at 1. The skewed divergences are those of
DistiLLM (Ko et al. 2024, https://arxiv.org/abs/2402.03898), whose log ratios are bounded by
-log alpha. The temperature and its factor are after Hinton et al. (2015),
https://arxiv.org/abs/1503.02531.

All are built from one function, the skewed KL of two arrays of log-probabilities. Its terms are
never negative, so that it is accurate even where p and q almost agree: the rounding of the
logarithms has a second-order effect on them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from ops import axes

Kind = Literal[
  'forward_kl', 'reverse_kl', 'jsd', 'normalized_jsd', 'skewed_kl', 'skewed_reverse_kl'
]
SMALL = 0.1  # of a log ratio; below it, the series of exp(s) - 1 - s is exact in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
  """A divergence from the teacher's logits to the student's, at a temperature.

  mix: beta of a JSD, alpha of a skewed divergence; the other kinds have none.
  temperature: divides the logits of both. The value is multiplied by its square, so that the
    gradient has the same scale at every temperature: for a high one, it tends to the difference of
    the centered logits divided by V.
  """

  kind: Kind = 'forward_kl'
  mix: float | None = None
  temperature: float = 1.0

  def __post_init__(self):
    if self.kind not in get_args(Kind):
      raise ValueError(f'kind {self.kind!r} is not one of {", ".join(get_args(Kind))}')
    if not (self.temperature > 0 and math.isfinite(self.temperature)):
      raise ValueError(f'the temperature must be a positive number, not {self.temperature}')
    if self.kind not in RANGES:
      if self.mix is not None:
        raise ValueError(f'{self.kind} has no mix, but {self.mix} was given')
    elif self.mix is None or not RANGES[self.kind].holds(self.mix):
      raise ValueError(f'mix of {self.kind} must be {RANGES[self.kind].words}, not {self.mix}')

  def __call__(
    self, teacher_logits: jax.Array, student_logits: jax.Array, vocabulary: int | None = None
  ) -> jax.Array:
    """Computes the divergence of logits[..., V] in nats: [...] in float32.

    `vocabulary` is the number of tokens of the tokenizer; logits beyond it are cut off before the
    softmax. Without it, both must have the same width.
    """
    cut = lambda logits: logits[..., :vocabulary].astype(jnp.float32) / self.temperature
    log_p, log_q = (jax.nn.log_softmax(cut(x)) for x in (teacher_logits, student_logits))
    return self.temperature**2 * self.of_log_probabilities(log_p, log_q)

  def of_log_probabilities(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Computes the divergence of log-probabilities[..., V], without the temperature: [...]."""
    return FUNCTIONS[self.kind](log_p, log_q, self.mix)


def kl(log_p: jax.Array, log_q: jax.Array, alpha: float = 0.0) -> jax.Array:
  """Computes KL(p || alpha p + (1 - alpha) q) of log-probabilities[..., V]: [...] in float32.

  A token that p cannot say adds no more than its share of the mixture, which the sum over all
  tokens cancels. With alpha = 0, a token that p can say and q cannot makes the result infinite.
  """
  axes.check('...V,...V', log_p, log_q)
  if log_p.shape != log_q.shape:
    raise ValueError(f'the distributions have the shapes {log_p.shape} and {log_q.shape}')
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  ratio = _log_mixture(jnp.where(p > 0, log_q - log_p, 0.0), alpha)
  # With the mixture m, sum(m - p) is zero, so KL = sum(m - p - p log(m/p)), whose terms are never
  # negative. The usual sum has the rounding errors of the logarithms in first order.
  near = (p > 0) & (ratio < 1)
  gap = p * _exp_minus_line(jnp.where(near, ratio, 0.0))
  return jnp.sum(jnp.where(near, gap, (1 - alpha) * (q - p) - p * ratio), axis=-1)


def _log_mixture(r: jax.Array, alpha: float) -> jax.Array:
  """log(alpha + (1 - alpha) exp(r)), accurate relative to itself near r = 0."""
  if alpha == 0:
    return r
  near = jnp.abs(r) < 1
  close = jnp.log1p((1 - alpha) * jnp.expm1(jnp.where(near, r, 0.0)))
  return jnp.where(near, close, jnp.logaddexp(math.log(alpha), math.log1p(-alpha) + r))


def _exp_minus_line(s: jax.Array) -> jax.Array:
  """exp(s) - 1 - s, accurate relative to itself near s = 0."""
  t = jnp.where(jnp.abs(s) < SMALL, s, 0.0)
  series = t * t * (1 / 2 + t * (1 / 6 + t * (1 / 24 + t * (1 / 120 + t * (1 / 720)))))
  return jnp.where(jnp.abs(s) < SMALL, series, jnp.expm1(s) - s)


def _jsd(log_p, log_q, beta):
  return beta * kl(log_p, log_q, beta) + (1 - beta) * kl(log_q, log_p, 1 - beta)


def _normalized_jsd(log_p, log_q, beta):
  if beta in (0, 1):  # the limits
    return kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
  return kl(log_p, log_q, beta) / (1 - beta) + kl(log_q, log_p, 1 - beta) / beta


FUNCTIONS: dict[str, Callable[[jax.Array, jax.Array, float | None], jax.Array]] = {
  'forward_kl': lambda log_p, log_q, _: kl(log_p, log_q),
  'reverse_kl': lambda log_p, log_q, _: kl(log_q, log_p),
  'jsd': _jsd,
  'normalized_jsd': _normalized_jsd,
  'skewed_kl': lambda log_p, log_q, alpha: kl(log_p, log_q, alpha),
  'skewed_reverse_kl': lambda log_p, log_q, alpha: kl(log_q, log_p, alpha),
}


@dataclasses.dataclass(frozen=True)
class _Range:
  holds: Callable[[float], bool]
  words: str


RANGES = {
  'jsd': _Range(lambda x: 0 < x < 1, 'above 0 and below 1 (its ends vanish; see normalized_jsd)'),
  'normalized_jsd': _Range(lambda x: 0 <= x <= 1, 'between 0 and 1'),
  'skewed_kl': _Range(lambda x: 0 <= x < 1, 'at least 0 and below 1'),
  'skewed_reverse_kl': _Range(lambda x: 0 <= x < 1, 'at least 0 and below 1'),
}
