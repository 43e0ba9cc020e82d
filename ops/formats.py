"""Number formats: how groups of weights become codes of few bits, and codes weights again.

Weights come as [J, g, O]: J groups of g inputs, each with one scale, and a zero point if it is
asymmetric. `fit` finds them, `to_codes` rounds half to even and clips; `levels` and `scaled` go
back. ops/quantized.py says what the formats are, and stores them.

The largest magnitude of a symmetric group of integers is halfway between two codes (7.5 in int4). A
negative one has a code on either side, a positive one only the lower. If the rounding of the scale
decided between the two, most would move inwards, all outputs would shrink, and a model of 30 layers
would lose several per cent of perplexity. So a stored scale is never above amax / top, which sends
the negative ones outwards.

A group's range may be clipped: fewer values at its ends are reached, and all others are nearer. The
search is that of GPTQ's reference code (Frantar et al. 2022, https://arxiv.org/abs/2210.17323): of
`CLIP_STEPS` ranges down to a fifth the one of the least error in a norm of 2.4, at the cost of 81
roundings. Here the candidates' scales are rounded to their stored precision first.

The scale of a symmetric group of integers may have a sign ('signed'), as in llama.cpp's Q4_0: the
value of largest magnitude divided by -2**(bits-1). That value is then exactly the lowest code
whatever its own sign is, and a step of int4 is amax / 8 in place of amax / 7.5; values near amax on
the other side are clipped to 7/8 of it. 'signed_mse' searches the range under both signs.

Microscaling formats (OCP Microscaling Formats Specification 1.0, 2023,
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf; Rouhani et
al. 2023, https://arxiv.org/abs/2310.10537) have blocks of 32 and powers of two as scales. The scale
is 2**(floor(log2(amax)) - emax), where 2**emax is the largest power of two of the elements. A block
whose largest weight is above 6 (fp4) or 448 (fp8) scales saturates there, as the specification
says. Other tools double such scales: compressed-tensors where amax is from 7/4 of a power of two
on; torchao in some modes ('floor' is the rule here, 'rceil' doubles where weights would saturate,
'ceil' wherever amax is above a power of two, 'even' where amax would be rounded to the next one).
"""

import dataclasses
import functools
import math
import typing
from typing import Literal

import jax
import jax.numpy as jnp

FormatName = Literal['int8', 'int4', 'int3', 'int2', 'nf4', 'fp8_e4m3', 'mxfp4', 'mxfp8', 'nvfp4']
Clip = Literal['none', 'mse', 'signed', 'signed_mse']
ScaleForm = Literal['floating', 'e8m0', 'e4m3']

NF4_CODEBOOK = (
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
)
E2M1_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_CODEBOOK = (*E2M1_SIZES, *(-size for size in E2M1_SIZES))  # the fourth bit is the sign
E2M1_MAX, FP8_MAX = 6.0, 448.0
TINY = 1e-30  # the least scale that is divided by
CLIP_GRID, CLIP_STEPS = 100, 80  # ranges are shrunk by a hundredth, 80 times
CLIP_NORM = 2.4
SEARCHED, SIGNED = ('mse', 'signed_mse'), ('signed', 'signed_mse')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """How numbers become codes. `bits` a code, and the group size when none is asked for.

  Formats of floating levels have a `top`, the largest level, and those of up to 4 bits a
  `codebook`. scales: floating numbers of any type; powers of two (e8m0); or e4m3 numbers with one
  float32 scale for the whole matrix. The last two have no other group than `block`.
  """

  name: FormatName
  bits: int
  default_group: int | None  # None: one group, the whole column
  top: float | None = None
  codebook: tuple[float, ...] | None = None
  scales: ScaleForm = 'floating'

  @property
  def integer(self) -> bool:
    return self.top is None

  @property
  def block(self) -> int | None:
    """The only group size of a format that fixes it."""
    return None if self.scales == 'floating' else self.default_group


FORMATS = {
  f.name: f
  for f in (
    Format(name='int8', bits=8, default_group=None),
    Format(name='int4', bits=4, default_group=128),
    Format(name='int3', bits=3, default_group=128),
    Format(name='int2', bits=2, default_group=128),
    Format(name='nf4', bits=4, default_group=64, top=1.0, codebook=NF4_CODEBOOK),
    Format(name='fp8_e4m3', bits=8, default_group=None, top=FP8_MAX),
    Format(
      name='mxfp4', bits=4, default_group=32, top=E2M1_MAX, codebook=E2M1_CODEBOOK, scales='e8m0'
    ),
    Format(name='mxfp8', bits=8, default_group=32, top=FP8_MAX, scales='e8m0'),
    Format(
      name='nvfp4', bits=4, default_group=16, top=E2M1_MAX, codebook=E2M1_CODEBOOK, scales='e4m3'
    ),
  )
}


def check_form(
  format: str,
  *,
  symmetric: bool = True,
  clip: str = 'none',
  double: bool = False,
  group_size: int | None = None,
) -> None:
  """Raises ValueError for an unknown format, or an option that it does not have."""
  if format not in FORMATS:
    raise ValueError(f'format {format!r} is not one of {", ".join(FORMATS)}')
  if not symmetric and not FORMATS[format].integer:
    raise ValueError(f'{format} has no asymmetric form; only the integer formats have one')
  if clip not in typing.get_args(Clip):
    raise ValueError(f'clip {clip!r} is not one of {", ".join(typing.get_args(Clip))}')
  if clip in SIGNED and (not symmetric or not FORMATS[format].integer or double):
    form = 'double quantization' if double else format if symmetric else 'asymmetric groups'
    raise ValueError(
      f'clip {clip!r} is for symmetric integers with plain scales, not for {form}; use none or mse'
    )
  block = FORMATS[format].block
  if block and group_size not in (None, block):
    raise ValueError(f'{format} has blocks of {block} inputs, not of {group_size}')
  if block and (clip != 'none' or double):
    option = 'double quantization' if double else f'the clip {clip!r}'
    raise ValueError(f'the scales of {format} follow from its definition; leave {option} out')


def fit(w_JgO: jax.Array, format: FormatName, symmetric: bool, clip: Clip, dtype: jnp.dtype):
  """The scales [J, O] in `dtype`, and zero points or None, that span each group's range."""
  low_JO, high_JO = jnp.minimum(w_JgO.min(1), 0), jnp.maximum(w_JgO.max(1), 0)
  if clip in SIGNED:
    spans = [
      functools.partial(_signed_span, low_JO, high_JO, FORMATS[format].bits, dtype, exact)
      for exact in (True, False)
    ]
  else:
    if symmetric:
      high_JO = jnp.maximum(-low_JO, high_JO)
    spans = [functools.partial(_span, low_JO, high_JO, format, symmetric, dtype)]
  return _least_error(w_JgO, spans, format) if clip in SEARCHED else spans[0](1.0)


def _signed_span(low_JO, high_JO, bits, dtype, exact, share):
  """The scales that send this share of the largest value to the lowest code, or to the highest."""
  half = 2 ** (bits - 1)
  scales_JO = share / half * jnp.where(high_JO > -low_JO, -high_JO, -low_JO)
  return stored(scales_JO if exact else -half / (half - 1) * scales_JO, dtype), None


def _span(low_JO, high_JO, format, symmetric, dtype, share):
  """The scales and zero points whose grid reaches over this share of the range."""
  low_JO, high_JO, spec = share * low_JO, share * high_JO, FORMATS[format]
  if not symmetric:
    scales_JO = stored((high_JO - low_JO) / (2**spec.bits - 1), dtype)
    return scales_JO, zero_points(low_JO, scales_JO.astype(jnp.float32), spec.bits)
  if spec.integer:
    return _not_above(high_JO, (2**spec.bits - 1) / 2, dtype), None
  if spec.scales == 'e8m0':
    emax = math.floor(math.log2(spec.top))
    return stored(_power_of_two(high_JO) * 2.0**-emax, dtype), None
  return stored(high_JO / spec.top, dtype), None


def _power_of_two(x: jax.Array) -> jax.Array:
  """The largest power of two up to x, which is float32 and not negative: its exponent alone."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _not_above(high_JO, top, dtype):
  """The scales at which `high_JO` is at least `top` steps away from zero, as it is divided."""
  if dtype == jnp.float32:  # XLA's quotients are off by a bit or two
    return stored(high_JO * ((1 - 2.0**-22) / top), dtype)
  scales_JO = stored(high_JO / top, dtype)
  short_JO = high_JO / scales_JO.astype(jnp.float32) < top
  lower_JO = jnp.nextafter(scales_JO, jnp.zeros_like(scales_JO))
  return jnp.where(short_JO & (lower_JO >= _smallest(dtype)), lower_JO, scales_JO)


def stored(scale_JO: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Rounds scales to the nearest of `dtype`, within its range and never to zero; signs stay."""
  size_JO = jnp.clip(jnp.abs(scale_JO), _smallest(dtype), float(jnp.finfo(dtype).max))
  return jnp.where(scale_JO < 0, -size_JO, size_JO).astype(dtype)


def _smallest(dtype) -> float:
  return max(float(jnp.finfo(dtype).smallest_subnormal), TINY)


def zero_points(low_JO: jax.Array, scale_JO: jax.Array, bits: int) -> jax.Array:
  """The codes of 0, uint8 [J, O], where the grid begins at `low_JO`."""
  codes_JO = jnp.round(-low_JO / jnp.where(_dead(scale_JO), 1, scale_JO))
  return jnp.clip(codes_JO, 0, 2**bits - 1).astype(jnp.uint8)


def _least_error(w_JgO, spans, format):
  """The scales and zero points of the range that loses least, each group by itself."""
  whole = spans[0](1.0)
  unit_JO = whole[0].astype(jnp.float32)  # neither tiny nor huge weights leave float32's range

  def error(scales_JO, zeros_JO):
    moved_JgO = nearest(w_JgO, scales_JO.astype(jnp.float32), zeros_JO, format) - w_JgO
    return (jnp.abs(moved_JgO / unit_JO[:, None]) ** CLIP_NORM).sum(1)

  def step(i, best):
    for span in spans:
      found = span(1 - i / CLIP_GRID)
      candidate = (error(*found), found)
      better_JO = candidate[0] < best[0]
      best = jax.tree.map(functools.partial(jnp.where, better_JO), candidate, best)
    return best

  # With a second span, its whole range is a candidate too.
  first = 2 - len(spans)
  return jax.lax.fori_loop(first, CLIP_STEPS + 1, step, (error(*whole), whole))[1]


def nearest(w_JgO: jax.Array, scale_JO: jax.Array, zeros_JO, format: FormatName) -> jax.Array:
  """The values of the grid that the codes stand for, float32 [J, g, O]."""
  codes_JgO = to_codes(w_JgO, scale_JO, zeros_JO, format)
  return scaled(levels(codes_JgO, format, zeros_JO is None), scale_JO, zeros_JO)


def to_codes(w_JgO: jax.Array, scale_JO: jax.Array, zeros_JO, format: FormatName) -> jax.Array:
  """Rounds float32 weights to codes: uint8, but int8 for symmetric int8, and fp8 for itself."""
  dead_JO = _dead(scale_JO)
  safe_JO = jnp.where(dead_JO, 1, scale_JO)
  x_JgO = jnp.where(dead_JO[:, None], 0, w_JgO / safe_JO[:, None])
  spec = FORMATS[format]
  if format == 'nf4':
    return _count_below(_middles(NF4_CODEBOOK), x_JgO)
  if spec.codebook is not None:
    return _to_e2m1(x_JgO)
  if not spec.integer:
    return jnp.clip(x_JgO, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
  bits = spec.bits
  half = 2 ** (bits - 1)
  if zeros_JO is not None:
    zeros_JgO = zeros_JO.astype(jnp.float32)[:, None]
    whole = jnp.issubdtype(zeros_JO.dtype, jnp.integer)
    codes = jnp.round(x_JgO) + zeros_JgO if whole else jnp.round(x_JgO + zeros_JgO)
    return jnp.clip(codes, 0, 2 * half - 1).astype(jnp.uint8)
  codes = jnp.clip(jnp.round(x_JgO), -half, half - 1)
  return codes.astype(jnp.int8) if bits == 8 else (codes + half).astype(jnp.uint8)


def _to_e2m1(x: jax.Array) -> jax.Array:
  """Rounds float32 numbers to e2m1 half to even, saturating at 6: uint8 codes with the sign."""
  middles = _middles(E2M1_SIZES)
  # A middle belongs to the even code beside it: that below the middles 0, 2, ..., else that above.
  upper = jnp.nextafter(middles, jnp.zeros_like(middles))
  edges = jnp.where(jnp.arange(len(middles)) % 2 == 1, upper, middles)
  negative = jnp.signbit(x).astype(jnp.uint8)
  return _count_below(edges, jnp.abs(x)) | negative << 3


def _middles(values) -> jax.Array:
  return jnp.asarray([(a + b) / 2 for a, b in zip(values, values[1:])], jnp.float32)


def _count_below(edges, x):
  return jnp.searchsorted(edges, x, method='compare_all').astype(jnp.uint8)


def levels(codes: jax.Array, format: FormatName, symmetric: bool) -> jax.Array:
  """What codes stand for before scaling: integers (signed if symmetric), or codebook values."""
  if FORMATS[format].codebook is not None:
    return jnp.asarray(FORMATS[format].codebook, jnp.float32)[codes]
  bits = FORMATS[format].bits
  return codes if bits == 8 else codes.astype(jnp.int8) - (2 ** (bits - 1) if symmetric else 0)


def scaled(levels_JgO: jax.Array, scale_JO: jax.Array, zeros_JO) -> jax.Array:
  """(level - zero) * scale, float32 [J, g, O]."""
  levels_JgO = levels_JgO.astype(jnp.float32)
  if zeros_JO is not None:
    levels_JgO = levels_JgO - zeros_JO.astype(jnp.float32)[:, None]
  return levels_JgO * scale_JO[:, None]


def _dead(scale_JO):
  # Double quantization can round a small scale down to nothing: such a group is all zeros.
  return jnp.abs(scale_JO) < TINY / 2
