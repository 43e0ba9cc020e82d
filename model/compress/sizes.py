"""Finds how many units may stay under a target: a share removed, parameters, bytes or a latency.

All layers keep equally many, so that the result has a plain config. Arrays are cut along one axis
for each kind of unit, so the parameters of a model fall in proportion to the units removed, and the
number that stays follows without a search.

A latency is measured, on the device at hand: the first layer runs a prefill of 128 tokens at eight
widths, in interleaved rounds, and the widest is taken whose median time is within the target.
Embedding and head are not part of it. The widths that were tried are in the ledger with their
times.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import rounds, units
from model.compress import calibrate
from model.config import ModelConfig
from model.layers.block import Block
from model.transformer import Transformer, parameters
from model.units import Unit

LATENCY_TOKENS, CANDIDATES, LATENCY_ROUNDS = 128, 8, 15
DEFAULT_RATIO = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeSpec:
  """How much is removed; exactly one of the first four, by default a ratio of 0.25.

  ratio: least share of the units to remove.  parameters: share of the model's parameters that may
  stay, at most.  megabytes: of all parameters as they are stored, at most (10^6 bytes).  latency:
  time of a layer as a share of its time now, at most, measured here.
  multiple: the number of units that stay is a multiple of it.
  """

  ratio: float | None = None
  parameters: float | None = None
  megabytes: float | None = None
  latency: float | None = None
  multiple: int = 16

  def __post_init__(self):
    names = ('ratio', 'parameters', 'megabytes', 'latency')
    given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
    if len(given) > 1:
      raise ValueError(f'give one of {", ".join(names)}, not {" and ".join(given)}')
    for name in ('ratio', 'parameters', 'latency'):
      if name in given and not 0 < given[name] < 1:
        raise ValueError(f'{name} is a share between 0 and 1, not {given[name]}')
    if self.megabytes is not None and not self.megabytes > 0:
      raise ValueError(f'megabytes must be above 0, not {self.megabytes}')
    if self.multiple < 1:
      raise ValueError(f'multiple must be at least 1, not {self.multiple}')


def uniform(model: Transformer, spec: SizeSpec, unit: Unit, base: Transformer | None = None) -> int:
  """Returns how many units 'F', 'K' or 'D' stay, in each layer; the model may be abstract.

  A target of parameters is a share of those of `base`, which is the model itself by default.

  Raises ValueError if not even `multiple` units may stay, or the layers have different numbers.
  """
  now = each(model.config, unit)
  if spec.parameters is not None:
    most = _allowed(
      model, unit, spec.parameters * total(model if base is None else base), itemsize=False
    )
  elif spec.megabytes is not None:
    most = _allowed(model, unit, spec.megabytes * 1e6, itemsize=True)
  else:
    most = (1 - (DEFAULT_RATIO if spec.ratio is None else spec.ratio)) * now
  return _rounded(min(most, now), spec, unit)


def dropped_layers(model: Transformer, spec: SizeSpec) -> int:
  """Returns how many layers go, which suffices whichever they are; the model may be abstract."""
  count = len(model.config.layers)
  if spec.parameters is None and spec.megabytes is None:
    ratio = DEFAULT_RATIO if spec.ratio is None else spec.ratio
    gone = math.ceil(ratio * count - 1e-6)
  else:
    itemsize = spec.megabytes is not None
    limit = spec.megabytes * 1e6 if itemsize else spec.parameters * total(model)
    excess = total(model, itemsize=itemsize) - limit
    costs = sorted(total(model, l, itemsize=itemsize) for l in range(count))
    gone = int(np.searchsorted(np.cumsum(costs), excess - 1e-6) + 1) if excess > 0 else 0
  if gone >= count:
    raise ValueError(f'all {count} layers would have to go; ask for less')
  return gone


def total(model: Transformer, layer: int | None = None, *, itemsize: bool = False) -> int:
  """Counts the parameters, or their bytes, of a model or of one of its layers."""
  return sum(
    math.prod(value.shape) * (value.dtype.itemsize if itemsize else 1)
    for path, value in _values(model).items()
    if layer is None or units.layer_of(path) == layer
  )


def _values(model):
  return {path: param.get_value() for path, param in parameters(model).items()}


def _allowed(model, unit, limit: float, itemsize: bool) -> float:
  """How many units of each layer fit into a limit of parameters or bytes."""
  values, cost = _values(model), 0
  for cut in units.cuts(model, unit):
    value = values[cut.path]
    size = value.dtype.itemsize if itemsize else 1
    cost += size * math.prod(value.shape) // value.shape[cut.axis] * cut.run
  now = each(model.config, unit)
  return now - (total(model, itemsize=itemsize) - limit) / cost


def each(config: ModelConfig, unit: Unit) -> int:
  """Returns how many units each layer has. Raises ValueError if the layers differ."""
  counts = set(units.sizes(config, unit))
  if len(counts) > 1:
    raise ValueError(f'the layers have different numbers of {units.NAMES[unit]}: {sorted(counts)}')
  return counts.pop()


def _rounded(most: float, spec: SizeSpec, unit: Unit) -> int:
  count = math.floor(most / spec.multiple + 1e-6) * spec.multiple
  if count < 1:
    raise ValueError(
      f'{most:.1f} {units.NAMES[unit]} may stay, below the multiple of {spec.multiple}; ask for '
      'less, or choose a smaller multiple'
    )
  return count


def within_latency(model: Transformer, spec: SizeSpec, unit: Unit) -> tuple[int, dict[str, int]]:
  """Returns the most units with which a layer is fast enough, and events with the times measured.

  Raises ValueError if none of the widths that are tried is.
  """
  now = each(model.config, unit)
  steps = [now * (i + 1) / CANDIDATES for i in range(CANDIDATES - 1)]
  counts = sorted({math.floor(step / spec.multiple) * spec.multiple for step in steps} - {0})
  calls = {n: _layer_call(model, unit, n) for n in (*counts, now)}
  samples = rounds.sample(calls, warmup=rounds.MIN_WARMUP, rounds=LATENCY_ROUNDS)
  ratio = {n: float(np.median(samples[n] / samples[now])) for n in counts}
  fast = [n for n in counts if ratio[n] <= spec.latency]
  if not fast:
    tried = ', '.join(f'{n}: {r:.2f}' for n, r in ratio.items())
    raise ValueError(f'no width runs in {spec.latency} of the time of {now}; measured {tried}')
  times = {n: round(1e6 * float(np.median(samples[n]))) for n in (*counts, now)}
  return max(fast), {
    f'microseconds of a layer with {n} {units.NAMES[unit]}': times[n] for n in times
  }


def _layer_call(model, unit, count: int) -> Callable[[], jax.Array]:
  """A prefill of a layer that has `count` units, with random weights."""
  one = model.config.replace(layers=model.config.layers[:1])
  config = units.resized(one, units.keep(unit, [np.arange(count)]))
  dtype = model.embedding.table.get_value().dtype
  block = Block(config.stream, config.layers[0], rngs=nnx.Rngs(0), dtype=dtype)
  length = min(LATENCY_TOKENS, config.max_positions)
  tokens_BT = jnp.zeros((1, length), jnp.int32)
  x_BTD = jax.random.normal(jax.random.key(0), (1, length, config.width), model.dtype)
  return functools.partial(calibrate.program(config, block), tokens_BT, x_BTD)
