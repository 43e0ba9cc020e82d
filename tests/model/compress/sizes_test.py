"""Sizes under a target, against the parameters of configs that are counted one by one."""

import jax.numpy as jnp
import numpy as np
import pytest

from model import presets, units
from model.compress import sizes
from model.compress.sizes import SizeSpec
from model.transformer import Transformer, abstract, parameters


def _count(config) -> int:
  return sum(np.prod(p.get_value().shape) for p in parameters(abstract(config)).values())


def _model(name, dtype=jnp.float32, **changes) -> Transformer:
  return abstract(presets.preset(f'tiny-{name}').replace(**changes), dtype)


def _with(model, unit, count):
  kept = units.keep(unit, [np.arange(count)] * len(units.sizes(model.config, unit)))
  return units.resized(model.config, kept)


@pytest.mark.parametrize('name', ['llama', 'gemma2', 'gpt2'])
@pytest.mark.parametrize('unit, multiple', [('F', 8), ('K', 1), ('D', 4)])
def test_the_most_units_within_a_share_of_the_parameters(name, unit, multiple):
  model = _model(name)
  for share in (0.7, 0.83, 0.95) if unit != 'K' else (0.93, 0.97):
    found = sizes.uniform(model, SizeSpec(parameters=share, multiple=multiple), unit)
    assert found % multiple == 0
    limit = share * _count(model.config)
    more = min(found + multiple, units.sizes(model.config, unit)[0])
    assert _count(_with(model, unit, found)) <= limit
    assert more == found or _count(_with(model, unit, more)) > limit


def test_megabytes_are_those_of_the_stored_type():
  for dtype, itemsize in ((jnp.float32, 4), (jnp.bfloat16, 2)):
    model = _model('llama', dtype)
    limit = 0.8 * itemsize * _count(model.config)
    found = sizes.uniform(model, SizeSpec(megabytes=limit / 1e6, multiple=1), 'F')
    assert itemsize * _count(_with(model, 'F', found)) <= limit
    assert itemsize * _count(_with(model, 'F', found + 1)) > limit
  assert sizes.uniform(_model('llama'), SizeSpec(megabytes=100, multiple=1), 'F') == 152


@pytest.mark.parametrize(
  'unit, ratio, multiple, expected',
  [
    ('F', 0.25, 1, 114),
    ('F', 0.25, 16, 112),
    ('F', 0.5, 1, 76),
    ('K', 0.4, 1, 1),
    ('D', 0.2, 16, 48),
  ],
)
def test_at_least_the_ratio_goes(unit, ratio, multiple, expected):
  assert sizes.uniform(_model('llama'), SizeSpec(ratio=ratio, multiple=multiple), unit) == expected
  if ratio == 0.25:
    assert sizes.uniform(_model('llama'), SizeSpec(multiple=multiple), unit) == expected


def test_layers_go_until_the_target_is_met():
  layers = presets.preset('tiny-llama').layers * 3
  model = _model('llama', layers=layers)
  for share in (0.35, 0.5, 0.81, 0.9):
    gone = sizes.dropped_layers(model, SizeSpec(parameters=share, multiple=1))
    size = lambda n: _count(model.config.replace(layers=layers[n:]))
    assert size(gone) <= share * _count(model.config) < size(gone - 1)
  for ratio, expected in ((0.2, 2), (0.5, 3), (1 / 3, 2), (0.7, 5)):
    assert sizes.dropped_layers(model, SizeSpec(ratio=ratio, multiple=1)) == expected
  with pytest.raises(ValueError, match='all 6 layers would have to go'):
    sizes.dropped_layers(model, SizeSpec(parameters=0.01))
  assert sizes.dropped_layers(model, SizeSpec(megabytes=100)) == 0


@pytest.fixture
def clock(monkeypatch):
  """Times that grow with the numbers of the calls, as 10 ms and 0.1 ms for each."""
  tried = []

  def sample(calls, warmup, rounds):
    tried.extend(calls)
    return {n: np.full(rounds, 1e-2 + 1e-4 * n) for n in calls}

  monkeypatch.setattr(sizes.rounds, 'sample', sample)
  return tried


def test_the_widest_layer_within_the_latency_is_taken(clock):
  # 152 channels take 25.2 ms, 96 take 19.6 and 112 take 21.2; candidates are multiples of 16.
  model = _model('llama')
  found, events = sizes.within_latency(model, SizeSpec(latency=0.8), 'F')
  assert clock == [16, 32, 48, 64, 80, 112, 128, 152]
  assert found == 80
  assert events['microseconds of a layer with 80 feed-forward channels'] == 18_000
  assert len(events) == 8
  assert sizes.within_latency(model, SizeSpec(latency=0.85), 'F')[0] == 112
  with pytest.raises(
    ValueError, match=r'no width runs in 0\.3 of the time of 152; measured 16: 0\.46'
  ):
    sizes.within_latency(model, SizeSpec(latency=0.3), 'F')


@pytest.mark.parametrize('unit, multiple', [('F', 64), ('D', 32), ('K', 1)])
def test_layers_are_really_timed(unit, multiple, monkeypatch):
  monkeypatch.setattr(sizes, 'CANDIDATES', 2)
  spec = SizeSpec(latency=0.999, multiple=multiple)
  seen = {}
  real = sizes.rounds.sample

  def sample(calls, **options):
    seen.update({n: call().shape for n, call in calls.items()})
    return real(calls, **options)

  monkeypatch.setattr(sizes.rounds, 'sample', sample)
  try:
    _, events = sizes.within_latency(_model('qwen3'), spec, unit)
    assert all(0 < us < 1e7 for us in events.values())
  except ValueError as error:  # tiny layers may all take equally long
    assert 'no width runs in 0.999' in str(error)
  full = {'F': 152, 'D': 64, 'K': 2}[unit]
  assert set(seen) == {full, full // 2 // multiple * multiple}
  assert all(shape == (1, 128, n if unit == 'D' else 64) for n, shape in seen.items())


@pytest.mark.parametrize(
  'options, message',
  [
    ({'ratio': 0.5, 'parameters': 0.5}, 'give one of ratio, .* not ratio and parameters'),
    ({'ratio': 0.0}, 'ratio is a share between 0 and 1, not 0.0'),
    ({'parameters': 1.0}, 'parameters is a share between 0 and 1'),
    ({'latency': 2.0}, 'latency is a share'),
    ({'megabytes': -1.0}, 'megabytes must be above 0'),
    ({'multiple': 0}, 'multiple must be at least 1'),
  ],
)
def test_wrong_targets_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    SizeSpec(**options)


def test_targets_that_leave_nothing_are_refused():
  with pytest.raises(
    ValueError, match=r'7\.6 feed-forward channels may stay, below the multiple of 16'
  ):
    sizes.uniform(_model('llama'), SizeSpec(ratio=0.95), 'F')
  with pytest.raises(ValueError, match='ask for less'):
    sizes.uniform(_model('llama'), SizeSpec(parameters=0.05), 'F')
  first, second = presets.preset('tiny-llama').layers
  uneven = units.resized(_model('llama').config, units.Kept(channels={0: np.arange(64)}))
  assert uneven.layers[1] == second and first.ffn.width == 152
  with pytest.raises(ValueError, match=r'different numbers of feed-forward channels: \[64, 152\]'):
    sizes.uniform(abstract(uneven), SizeSpec(), 'F')
