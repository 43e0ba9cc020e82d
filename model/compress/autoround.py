"""AutoRound: learn which way each weight is rounded, and how far each group's range reaches.

After Cheng et al. (2023), https://arxiv.org/abs/2309.05516, whose optimizer is SignRound. An offset
between -1/2 and 1/2 of a quantization step is added to each weight before it is rounded, and both
ends of a group's range are multiplied by a number from 1/2 to 1. The offsets and multipliers of all
matrices of a block are learned together, starting from rounding to nearest, by signed gradient
descent on the mean squared error of the block's output. The step size falls linearly from 1 /
`steps` to zero, so that an offset can just reach 1/2. Rounding passes gradients straight through.

Each block costs `steps` forward and backward passes on `batch` rows, and one forward pass of the
block as it was on all rows, whose outputs are held on the host. Three float32 numbers a weight are
held while a block is learned.

Differences from the paper and its code: the original block gets the same inputs as the compressed
one, the outputs of the compressed blocks before it. The last iterate is kept, if it is better than
rounding to nearest on all calibration rows; the paper keeps the iterate with the smallest error on
the rows of its own step. Scales are those of ops/quantized.py, rounded while learning as they are
stored. Learning starts from a clipped range where `clip` asks for one. Zero weights stay zero.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from model.compress.calibrate import Descent
from model.compress.registry import Changes, technique
from model.compress.techniques import QuantizeSpec, other_group, round_to_nearest
from ops import experts, formats, quantized
from ops.formats import FORMATS
from ops.linear import Matrix, Weight, core, with_core
from ops.quantized import QuantizedTensor

FARTHEST_OFFSET, SMALLEST_RANGE = 0.5, 0.5
NOT_BETTER = 'rounded to nearest, because learning brought no gain'

Grid = tuple[jax.Array, jax.Array | None]  # scales and zero points of rounding to nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoRoundSpec:
  """An integer format as in `round_to_nearest`, and how its rounding is learned.

  Each of `steps` steps sees `batch` rows of calibration text, which `seed` draws.
  """

  format: quantized.FormatName = 'int4'
  group_size: int | None = None
  symmetric: bool = True
  clip: quantized.Clip = 'none'
  steps: int = 200
  batch: int = 8
  seed: int = 0

  def __post_init__(self):
    _ = self.rounding
    if not FORMATS[self.format].integer:
      known = ', '.join(name for name, one in FORMATS.items() if one.integer)
      raise ValueError(f'autoround learns the rounding of integers, {known}, not of {self.format}')
    if min(self.steps, self.batch) < 1:
      raise ValueError(
        f'at least one step on at least one row, not {self.steps} steps on {self.batch} rows'
      )

  @property
  def rounding(self) -> QuantizeSpec:
    """The options of rounding to nearest, which learning starts from."""
    return QuantizeSpec(
      format=self.format, group_size=self.group_size, symmetric=self.symmetric, clip=self.clip
    )


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('offset_IO', 'low_JO', 'high_JO'),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Learned:
  """The learned arrays of a matrix: offsets in quantization steps, multipliers of both range ends.

  A symmetric grid uses `high_JO` alone.
  """

  offset_IO: jax.Array
  low_JO: jax.Array
  high_JO: jax.Array


@dataclasses.dataclass(frozen=True)
class Rounding:
  """A candidate for `Site.errors` and `Site.descend`: matrices as they will be stored.

  The arrays are the learned ones and the grids of rounding to nearest, both by path.
  """

  format: quantized.FormatName

  def __call__(self, parameters, arrays, k) -> dict[str, Matrix]:
    del k
    learned, grids = arrays
    return {
      path: with_core(w := parameters[path], self.stored(core(w), one, grids[path]))
      for path, one in learned.items()
    }

  def stored(self, w: jax.Array, learned: Learned, grid: Grid) -> jax.Array:
    one = lambda own: rounded(*own, self.format)[0].astype(w.dtype)
    return _each(one, (w, learned, grid))


def _each(fn, own: tuple):
  """Applies fn(own) to a matrix with its arrays, or to each expert by itself."""
  return fn(own) if experts.count(own[0]) is None else experts.each(fn, own)


def becomes(w: Matrix, spec: AutoRoundSpec) -> Matrix:
  """The weight that a matrix becomes. Raises ValueError if it cannot."""
  if isinstance(core(w), Weight):
    raise ValueError(f'autoround rounds plain matrices, not a {type(core(w)).__name__}')
  return with_core(w, round_to_nearest(core(w), {}, spec.rounding).weight)


@technique(
  'autoround',
  spec=AutoRoundSpec,
  paper='Cheng et al. 2023, https://arxiv.org/abs/2309.05516',
  scope='block',
  becomes=becomes,
)
def autoround(site, spec):
  """Learn the rounding direction of each weight by signed gradient descent."""
  paths = [f'{layer}.weight' for layer in site.targets]
  plain = {path: core(site.parameters[path]) for path in paths}
  grids = _grids(plain, spec)
  start = lambda: {path: _start(plain[path], grids[path]) for path in paths}
  rounding = Rounding(spec.format)
  descent = Descent(
    candidate=rounding, update=follow, steps=spec.steps, batch=spec.batch, seed=spec.seed
  )
  learned = site.descend(descent, start(), grids)
  before, after = (site.errors(rounding, (one, grids), 1)[0] for one in (start(), learned))
  better = bool(after < before)  # not if it is NaN
  learned = learned if better else start()
  stored = _stored(plain, learned, grids, spec)
  return Changes(
    parameters={path: with_core(site.parameters[path], stored[path]) for path in paths},
    events={layer: _events(site, layer, spec, better) for layer in site.targets},
  )


@functools.partial(jax.jit, static_argnums=1)
def _grids(plain, spec) -> dict[str, Grid]:
  options = dataclasses.asdict(spec.rounding)
  del options['double']
  fit = lambda w_IO: quantized.fit(w_IO, **options)
  return {path: experts.mapped(fit, w) for path, w in plain.items()}


def _start(w_IO, grid) -> Learned:
  ones_JO = functools.partial(jnp.ones, grid[0].shape, jnp.float32)
  return Learned(jnp.zeros(w_IO.shape, jnp.float32), ones_JO(), ones_JO())


def follow(learned: Mapping[str, Learned], slopes: Mapping[str, Learned], rate: jax.Array):
  """Takes a step against the signs of the gradients, within bounds: a `Descent.update`."""
  return {path: _follow(one, slopes[path], rate) for path, one in learned.items()}


def _follow(one, slopes, rate):
  moved = jax.tree.map(lambda a, slope: a - rate * jnp.sign(slope), one, slopes)
  return Learned(
    jnp.clip(moved.offset_IO, -FARTHEST_OFFSET, FARTHEST_OFFSET),
    jnp.clip(moved.low_JO, SMALLEST_RANGE, 1),
    jnp.clip(moved.high_JO, SMALLEST_RANGE, 1),
  )


def rounded(
  w_IO: jax.Array, learned: Learned, grid: Grid, format: quantized.FormatName
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """The values on the learned grid, float32 [I, O], and its scales and zero points.

  Differentiable in the learned arrays. Without offsets and on whole ranges it rounds to nearest.
  """
  scales_JO, zeros_JO = _learned_grid(learned, grid, FORMATS[format].bits)
  shape_JgO = scales_JO.shape[0], -1, scales_JO.shape[1]
  steps_JgO = w_IO.astype(jnp.float32).reshape(shape_JgO) / scales_JO[:, None]
  codes_JgO = _whole(steps_JgO + learned.offset_IO.reshape(shape_JgO))
  half = 2 ** (FORMATS[format].bits - 1)
  if zeros_JO is None:
    codes_JgO = _limited(codes_JgO, -half, half - 1)
  else:
    zeros_J1O = zeros_JO[:, None]
    codes_JgO = _limited(codes_JgO + zeros_J1O, 0, 2 * half - 1) - zeros_J1O
  return (codes_JgO * scales_JO[:, None]).reshape(w_IO.shape), scales_JO, zeros_JO


def _learned_grid(learned, grid, bits):
  scales_JO, zeros_JO = grid[0].astype(jnp.float32), grid[1]
  top = 2**bits - 1
  dtype = grid[0].dtype
  if zeros_JO is None:
    return _as_stored(learned.high_JO * scales_JO, dtype), None
  zeros_JO = zeros_JO.astype(jnp.float32)
  low_JO = -learned.low_JO * zeros_JO * scales_JO
  high_JO = learned.high_JO * (top - zeros_JO) * scales_JO
  scales_JO = _as_stored((high_JO - low_JO) / top, dtype)
  return scales_JO, _limited(_whole(-low_JO / scales_JO), 0, top)


def _as_stored(scales_JO, dtype):
  """Rounds scales to their stored precision; gradients pass straight through."""
  stored_JO = formats.stored(scales_JO, dtype).astype(jnp.float32)
  return scales_JO + jax.lax.stop_gradient(stored_JO - scales_JO)


def _whole(x):
  """Rounds half to even; gradients pass straight through."""
  return x + jax.lax.stop_gradient(jnp.round(x) - x)


def _limited(codes, low, high):
  """Clips, with whole gradients at the ends, where many codes of few bits lie."""
  return jnp.where(codes < low, low, jnp.where(codes > high, high, codes))


@functools.partial(jax.jit, static_argnums=3)
def _stored(plain, learned, grids, spec) -> dict[str, QuantizedTensor]:
  def codes(own) -> QuantizedTensor:
    w_IO, learned, grid = own
    values_IO, scales_JO, zeros_JO = rounded(w_IO, learned, grid, spec.format)
    if zeros_JO is not None:
      zeros_JO = zeros_JO.astype(jnp.uint8)
    found = quantized.encode(values_IO, scales_JO.astype(grid[0].dtype), zeros_JO, spec.format)
    return dataclasses.replace(found, dtype=w_IO.dtype)

  return {path: _each(codes, (w, learned[path], grids[path])) for path, w in plain.items()}


def _events(site, layer, spec, better) -> dict[str, int]:
  inputs = core(site.parameters[f'{layer}.weight']).shape[-2]
  usual, size = FORMATS[spec.format].default_group, spec.group_size
  events = {} if better else {NOT_BETTER: 1}
  if size is None:
    group = quantized.resolve_group(spec.format, inputs, size)
    events |= other_group(usual, group, inputs)
  return events
