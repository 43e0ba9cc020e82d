"""Builds AdamW with warm-up, cosine decay and gradient clipping, as in Llama-like pretraining.

Loshchilov and Hutter (2019), https://arxiv.org/abs/1711.05101. Weight decay applies only to arrays
of rank 2 and more, not to norms and biases.
"""

import dataclasses

import jax
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """The learning rate rises for `warmup_steps`, then falls to `floor` times its peak at `steps`."""

  steps: int
  learning_rate: float
  warmup_steps: int = 0
  floor: float = 0.1  # of the peak learning rate
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float | None = 1.0  # of the joint gradient of all parameters

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f'steps must be at least 1, not {self.steps}')
    if not 0 <= self.warmup_steps < self.steps:
      raise ValueError(
        f'warmup_steps must be between 0 and steps - 1 = {self.steps - 1}, not {self.warmup_steps}'
      )
    if not self.learning_rate > 0:
      raise ValueError(f'learning_rate must be positive, not {self.learning_rate}')
    if not 0 <= self.floor <= 1:
      raise ValueError(f'floor is a fraction of the peak, between 0 and 1, not {self.floor}')
    if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
      raise ValueError(f'b1 and b2 must be at least 0 and below 1, not {self.b1} and {self.b2}')
    if self.weight_decay < 0 or not self.eps > 0:
      raise ValueError(
        f'weight_decay must not be negative and eps positive, not {self.weight_decay}, {self.eps}'
      )
    if self.clip_norm is not None and not self.clip_norm > 0:
      raise ValueError(f'clip_norm must be positive, or None for no clipping, not {self.clip_norm}')


def schedule(config: OptimizerConfig) -> optax.Schedule:
  """Returns the learning rate as a function of the number of completed updates, from 0 on."""
  # The warm-up starts above zero, because an update with a rate of zero would be wasted.
  warmup = config.warmup_steps
  rise = lambda n: config.learning_rate * (n + 1) / (warmup + 1)
  fall = optax.cosine_decay_schedule(config.learning_rate, config.steps - warmup, config.floor)
  return optax.join_schedules([rise, fall], [warmup])


def make(config: OptimizerConfig) -> optax.GradientTransformation:
  """Builds the optimizer; its state holds two arrays per parameter, with its shape and sharding."""
  clip = optax.identity()
  if config.clip_norm is not None:
    clip = optax.clip_by_global_norm(config.clip_norm)
  adamw = optax.adamw(
    schedule(config),
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
  )
  return optax.chain(clip, adamw)
