"""Builds optimizers by name, each with one schedule, clipping, weight decay and rates by path.

  adamw      Loshchilov and Hutter (2019), https://arxiv.org/abs/1711.05101
  adam8bit   the same with 8-bit moments: Dettmers et al. (2022), https://arxiv.org/abs/2110.02861
  adafactor  Shazeer and Stern (2018), https://arxiv.org/abs/1804.04235, second moments factored
             into a row and a column; updates are relative to the parameter's root mean square
  lion       Chen et al. (2023), https://arxiv.org/abs/2302.06675; wants a third to a tenth of
             AdamW's learning rate, and as many times its weight decay
  muon       Jordan et al. (2024), https://kellerjordan.github.io/posts/muon: the momentum of a
             matrix, made orthogonal. Scaled to the size of AdamW's updates as Liu et al. (2025),
             https://arxiv.org/abs/2502.16982, do, so that AdamW's learning rates apply. Tables, the
             head and arrays of other ranks than 2 have AdamW
  sgd        momentum `b1`, or none if it is 0

An update is -rate * multiplier * (direction + weight_decay * parameter), where weight decay applies
only to matrices and tables, not to norms and biases. The axes along which layers are stacked
(`model.stacked`), or experts, are none of an array's own: each expert is a matrix by itself. A row
of `OPTIMIZERS` gives the direction; everything else is common to all.
"""

import dataclasses
import fnmatch
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from model.stacked import is_stacked
from model.train.adam8bit import scale_by_adam8bit

Decay = Literal['cosine', 'constant']
MUON_MOMENTUM = 0.95
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 5
MUON_RMS = 0.2  # of an update's elements, as AdamW's typically have
VECTORS = ('bias', 'magnitude_O')  # names of arrays that have one axis of their own
NOT_HIDDEN = ('embedding.*', 'positions.*', 'head.*')  # matrices that Muon leaves to AdamW


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """The learning rate rises for `warmup_steps`, then falls to `floor` times its peak at `steps`.

  With `decay='constant'` it stays at its peak. `rates` are pairs of a pattern of parameter paths
  and a multiplier of their learning rate; the first pattern that matches counts. LoRA+ (Hayou et
  al., 2024, https://arxiv.org/abs/2402.12354) is `rates=(('*.b_RO', 16.0),)`.
  """

  steps: int
  learning_rate: float
  name: str = 'adamw'
  decay: Decay = 'cosine'
  warmup_steps: int = 0
  floor: float = 0.1  # of the peak learning rate
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float | None = 1.0  # of the joint gradient of all parameters
  rates: tuple[tuple[str, float], ...] = ()

  def __post_init__(self):
    _check_choice('the optimizer', self.name, tuple(OPTIMIZERS))
    _check_choice('decay', self.decay, get_args(Decay))
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
    for pattern, multiplier in self.rates:
      if not multiplier >= 0:
        raise ValueError(f'the rate of {pattern!r} must not be negative, not {multiplier}')


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """A row of the table.

  direction: builds the transformation from gradients to updates of length about 1.
  state_bytes: bytes of state per parameter of a large matrix.
  """

  direction: Callable[[OptimizerConfig], optax.GradientTransformation]
  state_bytes: float


def schedule(config: OptimizerConfig) -> optax.Schedule:
  """Returns the learning rate as a function of the number of completed updates, from 0 on."""
  # The warm-up starts above zero, because an update with a rate of zero would be wasted.
  warmup = config.warmup_steps
  rise = lambda n: config.learning_rate * (n + 1) / (warmup + 1)
  if config.decay == 'constant':
    after = optax.constant_schedule(config.learning_rate)
  else:
    after = optax.cosine_decay_schedule(config.learning_rate, config.steps - warmup, config.floor)
  return optax.join_schedules([rise, after], [warmup])


def make(config: OptimizerConfig) -> optax.GradientTransformation:
  """Builds the optimizer. Its `init` raises ValueError if a pattern of `rates` matches nothing."""
  clip = optax.identity()
  if config.clip_norm is not None:
    clip = optax.clip_by_global_norm(config.clip_norm)
  return optax.chain(
    clip,
    OPTIMIZERS[config.name].direction(config),
    optax.add_decayed_weights(
      config.weight_decay,
      mask=lambda params: jax.tree.map(lambda path, p: _rank(path, p) >= 2, paths(params), params),
    ),
    _scale_by_path(config.rates),
    optax.scale_by_learning_rate(schedule(config)),
  )


def paths(tree: Any) -> Any:
  """The dotted path of each leaf, in a tree of the same structure."""
  name = lambda path, _: jax.tree_util.keystr(path, simple=True, separator='.')
  return jax.tree_util.tree_map_with_path(name, tree)


def _rank(path: str, array: jax.Array) -> int:
  """The number of an array's own axes, without those of stacked layers and experts."""
  most = 1 if path.rpartition('.')[2] in VECTORS else 2
  return min(array.ndim - is_stacked(path), most)


def _over_own(fn: Callable, path: str, array: jax.Array) -> Callable:
  """Maps a function of matrices or vectors over the other axes of an array of this path."""
  for _ in range(array.ndim - _rank(path, array)):
    fn = jax.vmap(fn)
  return fn


def _each(one: optax.GradientTransformation) -> optax.GradientTransformation:
  """Applies a transformation to each matrix and vector by itself."""

  def init(params):
    state = lambda path, p: _over_own(one.init, path, p)(p)
    return jax.tree.map(state, paths(params), params)

  def update(updates, state, params=None):
    flat, structure = jax.tree.flatten(updates)
    rest = map(structure.flatten_up_to, (state, params, paths(updates)))
    new = [_over_own(one.update, path, u)(u, s, p) for u, s, p, path in zip(flat, *rest)]
    return tuple(structure.unflatten(column) for column in zip(*new))

  return optax.GradientTransformation(init, update)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
  return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
  del config  # it has no first moment, and the decay of the second follows the step
  return _each(
    optax.chain(
      optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
    )
  )


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
  def label(path, p):
    outside = _rank(path, p) != 2 or any(
      fnmatch.fnmatchcase(path, pattern) for pattern in NOT_HIDDEN
    )
    return 'adam' if outside else 'muon'

  def orthogonal(path, update):
    return _over_own(_orthogonal, path, update)(update)

  muon = optax.chain(
    optax.trace(decay=MUON_MOMENTUM, nesterov=True),
    optax.stateless(lambda updates, _: jax.tree.map(orthogonal, paths(updates), updates)),
  )
  labels = lambda params: jax.tree.map(label, paths(params), params)
  return optax.multi_transform({'muon': muon, 'adam': _adam(config)}, labels)


def _orthogonal(m_IO: jax.Array) -> jax.Array:
  """Moves all singular values of a matrix towards 1, and scales it to `MUON_RMS`.

  The steps are those of a Newton-Schulz iteration with Jordan's coefficients, which end within 0.7
  and 1.2 quickly and do not converge to 1.
  """
  transposed = m_IO.shape[0] > m_IO.shape[1]
  x = m_IO.T if transposed else m_IO
  x = x / (jnp.linalg.norm(x) + 1e-8)
  for _ in range(NEWTON_SCHULZ_STEPS):
    gram = x @ x.T
    a, b, c = NEWTON_SCHULZ
    x = a * x + (b * gram + c * gram @ gram) @ x
  return (x.T if transposed else x) * (MUON_RMS * max(m_IO.shape) ** 0.5)


def _sgd(config: OptimizerConfig) -> optax.GradientTransformation:
  return optax.trace(decay=config.b1) if config.b1 else optax.identity()


OPTIMIZERS = {
  'adamw': Optimizer(_adam, 8),
  'adam8bit': Optimizer(lambda c: scale_by_adam8bit(c.b1, c.b2, c.eps), 2 + 8 / 256),
  'adafactor': Optimizer(_adafactor, 0),
  'lion': Optimizer(lambda c: optax.scale_by_lion(b1=c.b1, b2=c.b2), 4),
  'muon': Optimizer(_muon, 4),
  'sgd': Optimizer(_sgd, 4),
}


def _scale_by_path(rates: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
  """Multiplies each update by the number of the first pattern that its path matches."""

  def multiplier(path):
    matches = (number for pattern, number in rates if fnmatch.fnmatchcase(path, pattern))
    return next(matches, 1.0)

  def init(params):
    names = jax.tree.leaves(paths(params))
    for pattern, _ in rates:
      if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
        raise ValueError(
          f'no trained parameter matches the pattern {pattern!r} of rates; there are '
          f'{", ".join(names[:5])}, ...'
        )
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params
    scaled = jax.tree.map(
      lambda u, path: u * jnp.float32(multiplier(path)), updates, paths(updates)
    )
    return scaled, state

  return optax.GradientTransformation(init, update) if rates else optax.identity()


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f'{what} {value!r} is not one of {", ".join(choices)}')
