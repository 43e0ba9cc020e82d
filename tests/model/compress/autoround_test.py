"""AutoRound against torch's autograd: grids, steps, what is stored, and that it is never worse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from model import native
from model.compress import autoround, calibrate, pipeline, recipe
from model.compress.autoround import NOT_BETTER, AutoRoundSpec
from model.transformer import matrices
from ops.linear import core, dense
from ops.quantized import QuantizedTensor, quantize
from ops.rotated import RotatedTensor

FORMATS = [('int8', True), ('int4', False), ('int3', True), ('int2', True), ('int2', False)]
QUICK = ('int4', 'int2')
FLOAT32 = 1e-5  # sums of a few dozen float32 products


to_dense = jax.jit(dense)
to_nearest = jax.jit(quantize, static_argnames=('format', 'group_size', 'symmetric'))


def _parse(*steps):
  return recipe.parse({'name': 'x', 'steps': list(steps)})


def _spec(**options):
  return AutoRoundSpec(**{'format': 'int3', 'group_size': 16, 'steps': 12, 'batch': 4} | options)


def _step(**options):
  return {'autoround': {'format': 'int3', 'group_size': 16, 'steps': 3, 'batch': 4} | options}


def _starts_at_the_nearest(rng, **options):
  w_IO = jnp.asarray(rng.standard_t(3, (32, 6)), jnp.float32).at[16:, 2].set(0)
  spec = _spec(**options)
  grids = autoround._grids({'w': w_IO}, spec)
  expected = quantize(w_IO, group_size=16, **options)
  start = {'w': autoround._start(w_IO, grids['w'])}
  found = autoround._stored({'w': w_IO}, start, grids, spec)['w']
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  return found


@pytest.mark.parametrize('format, symmetric', FORMATS)
@pytest.mark.quick(format=QUICK, symmetric=(False,))
def test_learning_starts_at_rounding_to_nearest(rng, format, symmetric):
  _starts_at_the_nearest(rng, format=format, symmetric=symmetric)


def test_scales_keep_their_signs(rng):
  found = _starts_at_the_nearest(rng, format='int4', clip='signed')
  assert 0 < (np.asarray(found.scales) < 0).mean() < 1


def _torch_rounded(w_IO, offset_IO, low_JO, high_JO, grid, bits):
  """The same in torch, which rounds with straight-through gradients; groups of 16."""
  through = lambda x, exact: x + (exact - x).detach()
  whole = lambda x: through(x, torch.round(x))
  half = torch.float32 if bits == 8 else torch.float16  # as scales of groups are stored
  stored = lambda x: through(x, x.to(half).to(x.dtype))
  scale_JO, zero_JO = grid
  if zero_JO is None:
    scale_JO, zero_JO = stored(high_JO * scale_JO), 0 * scale_JO
    bottom = -(2 ** (bits - 1))
  else:
    low = zero_JO * scale_JO * low_JO
    top = (2**bits - 1 - zero_JO) * scale_JO * high_JO
    scale_JO, bottom = stored((top + low) / (2**bits - 1)), 0
    zero_JO = torch.clamp(whole(low / scale_JO), 0, 2**bits - 1)
  scale_IO, zero_IO = (x.repeat_interleave(16, 0) for x in (scale_JO, zero_JO))
  codes_IO = whole(w_IO / scale_IO + offset_IO) + zero_IO
  return (torch.clamp(codes_IO, bottom, bottom + 2**bits - 1) - zero_IO) * scale_IO


@pytest.mark.parametrize('format, symmetric', FORMATS)
@pytest.mark.quick(format=('int8', 'int2'))
def test_steps_are_those_that_torch_takes(rng, format, symmetric):
  w_IO, x_TI = rng.standard_t(3, (32, 6)), rng.standard_normal((40, 32))
  w_IO, x_TI = w_IO.astype(np.float32), x_TI.astype(np.float32)
  spec, bits, rates = _spec(format=format, symmetric=symmetric), int(format[3:]), (0.2, 0.15, 0.1)
  grid = autoround._grids({'w': jnp.asarray(w_IO)}, spec)['w']

  @jax.jit
  def step(ours, rate):
    values_IO = lambda ours: autoround.rounded(jnp.asarray(w_IO), ours, grid, format)[0]
    error = lambda ours: jnp.square(x_TI @ values_IO(ours) - x_TI @ w_IO).mean()
    slopes, one = jax.grad(error)(ours), {'w': ours}
    return autoround.follow(one, {'w': slopes}, rate)['w'], slopes, values_IO(ours)

  ours = autoround._start(jnp.asarray(w_IO), grid)
  theirs = [torch.tensor(np.array(leaf), requires_grad=True) for leaf in jax.tree.leaves(ours)]
  torch_grid = [None if a is None else torch.tensor(np.asarray(a, np.float32)) for a in grid]
  for rate in rates:
    arrays = torch.from_numpy(w_IO), *theirs, torch_grid, bits
    value_IO = _torch_rounded(*arrays)
    loss = (torch.from_numpy(x_TI) @ (value_IO - torch.from_numpy(w_IO))).square().mean()
    slopes = torch.autograd.grad(loss, theirs, allow_unused=True)
    after, found, found_IO = step(ours, rate)
    np.testing.assert_allclose(found_IO, value_IO.detach().numpy(), rtol=FLOAT32, atol=1e-6)
    for slope, expected in zip(jax.tree.leaves(found), slopes, strict=True):
      expected = 0 if expected is None else expected.numpy()
      size = np.abs(expected).max() + 1e-6
      np.testing.assert_allclose(slope, np.broadcast_to(expected, slope.shape), atol=1e-3 * size)
    # Both go on from here, for the sign of a slope that is nearly zero may differ.
    bounds = ((-0.5, 0.5), (0.5, 1), (0.5, 1))
    for before, slope, now, limits in zip(*map(jax.tree.leaves, (ours, found, after)), bounds):
      expected = np.clip(np.asarray(before) - np.float32(rate) * np.sign(slope), *limits)
      np.testing.assert_allclose(now, expected, atol=1e-6)
    ours = after
    theirs = [torch.tensor(np.array(leaf), requires_grad=True) for leaf in jax.tree.leaves(ours)]


def _error(site, changes):
  return site.errors(_Given(), changes.parameters, 1)[0]


@dataclasses.dataclass(frozen=True)
class _Given:
  """A candidate that is given the values to put in."""

  def __call__(self, parameters, arrays, k):
    return arrays


def _nearest_error(site, spec):
  """That of rounding all targets to nearest."""
  options = {'group_size': spec.group_size, 'symmetric': spec.symmetric}
  paths = [f'{layer}.weight' for layer in site.targets]
  plain = {path: to_nearest(site.parameters[path], spec.format, **options) for path in paths}
  return site.errors(_Given(), plain, 1)[0]


@pytest.mark.parametrize(
  'format, symmetric', [('int3', True), pytest.param('int2', False, marks=pytest.mark.slow)]
)
def test_what_is_stored_is_what_was_optimised_and_far_better_than_the_nearest(
  tiny, tokens_BT, site_of, format, symmetric
):
  site, seen = site_of(tiny(), tokens_BT), []

  def descend(descent, learned, grids):
    learned = site.descend(descent, learned, grids)
    seen.append((descent.candidate, (learned, grids)))
    return learned

  spec = _spec(format=format, symmetric=symmetric, steps=40)
  changes = autoround.autoround(dataclasses.replace(site, descend=descend), spec)
  ((candidate, arrays),) = seen
  optimised = jax.jit(candidate)(site.parameters, arrays, 0)
  for path, stored in changes.parameters.items():
    assert isinstance(stored, QuantizedTensor) and (stored.zeros is None) == symmetric
    np.testing.assert_array_equal(to_dense(stored), optimised[path])
  error = _error(site, changes)
  assert error == pytest.approx(site.errors(candidate, arrays, 1)[0], rel=1e-4)
  assert 0 < error < 0.6 * _nearest_error(site, spec)
  assert changes.events == {layer: {} for layer in site.targets}


def test_it_is_never_worse_than_rounding_to_nearest(tiny, tokens_BT):
  # One step of 1 moves every offset and every range to its bound.
  compressed, ledger = pipeline.compress(tiny(), _parse(_step(steps=1)), tokens_BT)
  nearest = {'round_to_nearest': {'format': 'int3', 'group_size': 16}}
  plain, _ = pipeline.compress(tiny(), _parse(nearest))
  assert _arrays(compressed) == _arrays(plain)
  assert [event.event for event in ledger.events] == [NOT_BETTER] * 14


def _arrays(model):
  return {name: np.asarray(a).tobytes() for name, a in native.flatten(model)[0].items()}


class Killed(Exception):
  """Stands for a kill."""


def _stopping(parts):
  for i, part in enumerate(parts):
    if i == 2:
      raise Killed
    yield part


def test_blocks_share_a_compilation_and_a_killed_run_goes_on(tiny, tokens_BT, tmp_path):
  one, before = _parse(_step(steps=12)), calibrate._descend._cache_size()
  whole, ledger = pipeline.compress(tiny(), one, tokens_BT)
  assert calibrate._descend._cache_size() - before <= 1
  assert sum(row.stored.startswith('QuantizedTensor int3') for row in ledger.layers) == 14
  assert not ledger.events
  with pytest.raises(Killed):
    pipeline.compress(tiny(), one, tokens_BT, resume=tmp_path / 'kept', progress=_stopping)
  again, _ = pipeline.compress(tiny(), one, tokens_BT, resume=tmp_path / 'kept')
  assert _arrays(again) == _arrays(whole)
  other, _ = pipeline.compress(tiny(), _parse(_step(steps=12, seed=1)), tokens_BT)
  assert _arrays(other) != _arrays(whole)


@pytest.mark.slow
def test_targets_alone_change_zeros_stay_and_another_group_is_an_event(tiny, tokens_BT):
  model, only = tiny(layers=1), ['*.down', '*.key']
  steps = [
    {'magnitude': {'sparsity': 0.4}},
    _step(symmetric=False, group_size=None) | {'only': only},
  ]
  compressed, ledger = pipeline.compress(model, _parse(*steps), tokens_BT)
  expected = matrices(pipeline.compress(model, _parse(steps[0]))[0])
  for path, w in matrices(compressed).items():
    if path.endswith(('.down', '.key')):
      assert isinstance(w, QuantizedTensor) and not np.asarray(dense(w))[expected[path] == 0].any()
    else:
      np.testing.assert_array_equal(w, expected[path])
  found = [(event.layer, event.event, event.detail) for event in ledger.events]
  assert ('layers.0.ffn.down', 'group size, because 128 does not divide 80 inputs', '16') in found


@pytest.mark.slow
def test_weights_behind_a_rotation_are_rounded(tiny, tokens_BT):
  one = _parse({'rotate': {}}, _step() | {'only': ['*.down']})
  compressed, _ = pipeline.compress(tiny(layers=1, width=64), one, tokens_BT)
  w = matrices(compressed)['layers.0.ffn.down']
  assert isinstance(w, RotatedTensor) and isinstance(core(w), QuantizedTensor)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'format': 'nf4'}, 'of integers, int8, int4, int3, int2, not of nf4'),
    ({'steps': 0}, 'at least one step'),
    ({'batch': 0}, 'at least one step on at least one row'),
    ({'clip': 'some'}, 'clip'),
    ({'group_size': 0}, 'group size'),
  ],
)
def test_options_that_make_no_sense_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    _parse({'autoround': options})


def test_matrices_that_cannot_be_rounded_are_refused_before_any_work(tiny, tokens_BT):
  twice = _parse({'round_to_nearest': {}}, {'autoround': {}})
  with pytest.raises(ValueError, match='autoround rounds plain matrices, not a QuantizedTensor'):
    pipeline.check(tiny(), twice, tokens_BT)
  with pytest.raises(ValueError, match='does not divide'):
    pipeline.check(tiny(), _parse({'autoround': {'group_size': 7}}), tokens_BT)
  with pytest.raises(ValueError, match='needs calibration text'):
    pipeline.check(tiny(), _parse({'autoround': {}}))
