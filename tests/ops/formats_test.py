"""Clipped ranges against all ranges of the grid, tried in float64 numpy."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import formats
from ops.quantized import FORMATS, quantize

TIE = 1e-5  # float32 errors against float64 ones
jitted = jax.jit(quantize, static_argnames=('format', 'group_size', 'symmetric', 'clip'))


def _errors(q, w_IO, norm=2.4):
  """The sum of the errors' powers, of each group: float64 [J, O]."""
  moved = np.abs(np.asarray(q.dense(), np.float64) - np.asarray(w_IO, np.float64))
  return (moved.reshape(-1, q.group_size, w_IO.shape[1]) ** norm).sum(1)


@pytest.mark.parametrize('name', [name for name in FORMATS if FORMATS[name].block is None])
@pytest.mark.parametrize('symmetric', [True, False])
def test_clipping_loses_no_more_in_any_group(rng, name, symmetric):
  if not symmetric and not FORMATS[name].integer:
    pytest.skip('these formats have no zero points')
  w_IO = jnp.asarray(rng.standard_t(3, size=(128, 24)), jnp.float32)
  whole, clipped = (
    jitted(w_IO, name, group_size=32, symmetric=symmetric, clip=clip) for clip in ('none', 'mse')
  )
  before, after = _errors(whole, w_IO), _errors(clipped, w_IO)
  assert np.all(after <= before * (1 + TIE))
  if FORMATS[name].bits <= 4:
    assert after.sum() < 0.95 * before.sum()
  kept = np.all(np.asarray(whole.scales == clipped.scales), 0)
  np.testing.assert_array_equal(whole.dense()[:, kept], clipped.dense()[:, kept])


def _clipped(w_g, symmetric, bits):
  """The range, of 81, that loses least: by trying them in float64, as (scale, zero)."""
  low, high = min(w_g.min(), 0), max(w_g.max(), 0)
  low, high = (-max(high, -low), max(high, -low)) if symmetric else (low, high)
  found = []
  for share in 1 - np.arange(81) / 100:
    scale = np.float64(np.float16(share * (high - low) / (2**bits - 1)))
    if symmetric and share * high / scale < (2**bits - 1) / 2:
      scale = np.float64(np.nextafter(np.float16(scale), np.float16(0)))
    zero = np.clip(np.rint(-share * low / scale), 0, 2**bits - 1)
    least = -(2 ** (bits - 1)) if symmetric else -zero
    codes = np.clip(np.rint(w_g / scale), least, least + 2**bits - 1)
    found.append((np.sum(np.abs(codes * scale - w_g) ** 2.4), scale, zero))
  return min(found, key=lambda f: f[0])


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('name', ['int4', 'int3'])
def test_the_clipped_range_is_the_best_of_the_grid(rng, name, symmetric):
  w_IO = rng.standard_t(4, size=(64, 12)).astype(np.float32)
  q = jitted(jnp.asarray(w_IO), name, group_size=32, symmetric=symmetric, clip='mse')
  actual = _errors(q, w_IO)
  same = 0
  for j, o in np.ndindex(actual.shape):
    group = w_IO[j * 32 : (j + 1) * 32, o].astype(np.float64)
    error, scale, zero = _clipped(group, symmetric, FORMATS[name].bits)
    np.testing.assert_allclose(actual[j, o], error, rtol=1e-3)
    same += scale == float(q.scales[j, o]) and (symmetric or zero == int(q.zeros[j, o]))
  assert same >= actual.size - 1  # two ranges may be as good as equal


def test_a_range_that_fits_is_not_clipped():
  w_IO = jnp.arange(-8.0, 8).reshape(16, 1)
  q = jitted(w_IO, 'int4', group_size=-1, symmetric=False, clip='mse')
  assert q.scales.tolist() == [[1.0]] and q.zeros.tolist() == [[8]]
  np.testing.assert_array_equal(q.dense(), w_IO)


@pytest.mark.parametrize('group, factors', [(-1, (2.0**-70, 2.0**60)), (32, (2.0**-9, 2.0**12))])
@pytest.mark.parametrize('symmetric', [True, False])
def test_clipping_does_not_depend_on_the_unit(rng, symmetric, group, factors):
  w_IO = jnp.asarray(rng.standard_t(3, size=(64, 8)), jnp.float32)
  one = jitted(w_IO, 'int3', group_size=group, symmetric=symmetric, clip='mse')
  for factor in factors:
    other = jitted(factor * w_IO, 'int3', group_size=group, symmetric=symmetric, clip='mse')
    np.testing.assert_array_equal(one.values, other.values)


def test_signed_scales_are_those_of_llama_cpp(rng):
  w_IO = rng.standard_t(3, size=(256, 40)).astype(np.float32)
  q = jitted(jnp.asarray(w_IO), 'int4', group_size=32, clip='signed')
  rows = gguf.quants.quantize(np.ascontiguousarray(w_IO.T), gguf.GGMLQuantizationType.Q4_0)
  blocks = rows.reshape(40, -1, 18)
  scales_JO = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].T
  assert 0.3 < (scales_JO < 0).mean() < 0.7
  np.testing.assert_array_equal(q.scales, scales_JO)
  codes_IO = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1).reshape(40, 256).T
  # Its codes are those of the scale before that is rounded: a few lie near the middle of two.
  moved = np.abs(np.asarray(q.codes(), np.int32) + 8 - codes_IO)
  assert moved.max() <= 1 and moved.mean() < 2e-3


@pytest.mark.parametrize('name', ['int8', 'int4', 'int2'])
def test_the_largest_value_is_a_code_of_its_own_where_scales_have_a_sign(rng, name):
  w_IO = rng.standard_t(3, size=(64, 24)).astype(np.float32)
  w_IO[:32, 3] = 0
  q = jitted(jnp.asarray(w_IO), name, group_size=32, clip='signed')
  half = 2 ** (FORMATS[name].bits - 1)
  groups, codes = w_IO.reshape(2, 32, 24), np.asarray(q.codes(), np.int32).reshape(2, 32, 24)
  at = np.abs(groups).argmax(1)[:, None]
  largest = np.take_along_axis(groups, at, 1)[:, 0]
  scales_JO = np.asarray(q.scales, np.float64)
  live = largest != 0
  np.testing.assert_allclose(-half * scales_JO[live], largest[live], rtol=2**-10)
  np.testing.assert_array_equal(np.take_along_axis(codes, at, 1)[:, 0][live], -half)
  np.testing.assert_array_equal(np.asarray(q.dense())[:32, 3], 0)


def test_the_search_under_both_signs_finds_the_best(rng):
  w_IO = rng.standard_t(4, size=(64, 12)).astype(np.float32)
  found, exact, positive = (
    _errors(jitted(jnp.asarray(w_IO), 'int4', group_size=32, clip=clip), w_IO)
    for clip in ('signed_mse', 'signed', 'mse')
  )
  assert np.all(found <= exact * (1 + TIE)) and (found < exact).mean() > 0.5
  assert found.sum() < positive.sum()
  for j, o in np.ndindex(found.shape):
    group = w_IO[j * 32 : (j + 1) * 32, o].astype(np.float64)
    largest, tried = group[np.abs(group).argmax()], []
    for share in 1 - np.arange(81) / 100:
      for steps in (-8, 7):
        scale = np.float64(np.float16(share * largest / steps))
        codes = np.clip(np.rint(group / scale), -8, 7)
        tried.append(np.sum(np.abs(codes * scale - group) ** 2.4))
    np.testing.assert_allclose(found[j, o], min(tried), rtol=1e-3)


@pytest.mark.parametrize(
  'form, message',
  [
    ({'format': 'nf4'}, 'symmetric integers with plain scales, not for nf4'),
    ({'format': 'int4', 'symmetric': False}, 'not for asymmetric groups'),
    ({'format': 'int4', 'double': True}, 'not for double quantization'),
  ],
)
def test_a_sign_has_no_place_in_other_scales(form, message):
  with pytest.raises(ValueError, match=message):
    formats.check_form(**form, clip='signed')
  with pytest.raises(ValueError, match=message):
    quantize(jnp.ones((64, 2)), **form, clip='signed_mse')
