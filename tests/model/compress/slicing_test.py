"""Slicing: nothing changes without it, and with it the principal axes stay."""

import jax.numpy as jnp
import numpy as np
import pytest

from model import hf, units
from model.compress import norms, pipeline, recipe, slicing
from model.compress.measurements import Measurements
from model.transformer import parameters

# Weights are rounded to float32 once, after they are turned; logits are of order 1.
TOLERANCE = 1e-5


def _recipe(**options):
  return recipe.parse({'name': 'x', 'steps': [{'slice': options}]})


def _tokens(model, rows=4):
  return np.random.default_rng(1).integers(0, model.config.vocab_size, (rows, 11), np.int32)


def _near(found, expected, tolerance):
  return np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize('name', ['llama', 'qwen3', 'gpt2', 'neox'])
@pytest.mark.quick(name=('qwen3', 'gpt2'))
def test_merging_the_norms_does_not_change_the_logits(tiny_of, logits_of, name):
  model = tiny_of(name)
  values = {path: jnp.float32(v) for path, v in slicing.merge_norms(model).items()}
  merged = units.build(slicing.merged_config(model.config), values)
  assert merged.config.norm == 'rms' and not merged.config.tied
  scales = [v for path, v in values.items() if path.endswith('_norm.scale') and len(v) == 64]
  assert len(scales) == 5 and all((scale == 1).all() for scale in scales)
  tokens_BT = _tokens(model)
  assert _near(logits_of(merged, tokens_BT), logits_of(model, tokens_BT), TOLERANCE)


@pytest.mark.parametrize('name', ['phi3', 'gpt2'])
def test_nothing_is_lost_where_nothing_is_sliced(tiny_of, logits_of, name):
  """Computational invariance: the stream is turned, and all of its axes stay."""
  model = tiny_of(name)
  tokens_BT = _tokens(model)
  full = slicing.slice_width(model, Measurements(model, tokens_BT), slicing.SliceSpec(megabytes=9))
  turned = units.build(full.config, full.parameters)
  assert turned.config.width == 64
  up = 'layers.0.ffn.up.weight'
  assert np.abs(parameters(turned)[up].get_value() - parameters(model)[up].get_value()).max() > 0.1
  assert _near(logits_of(turned, tokens_BT), logits_of(model, tokens_BT), 2 * TOLERANCE)


def test_a_stream_of_low_rank_loses_nothing(tiny_of, logits_of):
  """All that is written to the stream lies in 40 dimensions, none of which is a coordinate."""
  model = tiny_of('llama', norm_eps=1e-12)
  basis_DR = np.linalg.qr(np.random.default_rng(5).normal(size=(64, 40)))[0]
  project = lambda w: jnp.asarray(np.asarray(w, np.float64) @ basis_DR @ basis_DR.T, w.dtype)
  for path, param in parameters(model).items():
    letters = units.letters(model)[path]
    if len(letters) == 2 and letters[-1] == 'D':
      param.set_value(project(param.get_value()))
  tokens_BT = _tokens(model, rows=16)
  sliced, ledger = pipeline.compress(model, _recipe(ratio=0.375, multiple=8), tokens_BT)
  assert sliced.config.width == 40
  assert _near(logits_of(sliced, tokens_BT), logits_of(model, tokens_BT), 1e-4)
  (row,) = ledger.to_rows()
  assert (row['layer'], row['technique'], row['detail']) == ('model', 'slice', '24')


def test_the_share_of_the_squares_gives_the_factor():
  energy_D = np.array([4.0, 1, 3, 0])
  assert norms.factor(energy_D, np.array([0, 2])) == pytest.approx((7 / 8 * 2) ** 0.5)
  assert norms.factor(energy_D, np.array([0, 1, 2])) == pytest.approx((4 / 3) ** 0.5)


def test_what_cannot_be_sliced_is_refused(tiny_of):
  for family in ('gemma2', 'olmo2'):
    model = tiny_of(family)
    with pytest.raises(ValueError, match='recipe x: slice: the scales of norms after attention'):
      pipeline.check(model, _recipe(), _tokens(model))
  model = tiny_of('llama')
  with pytest.raises(ValueError, match='recipe x: slice needs calibration text'):
    pipeline.check(model, _recipe())
  with pytest.raises(ValueError, match='slicing takes a ratio'):
    _recipe(latency=0.5)


def test_a_target_counts_the_head_that_slicing_unties(tiny_of, tmp_path):
  model = tiny_of('qwen3')
  tokens_BT = _tokens(model)
  sliced, ledger = pipeline.compress(model, _recipe(parameters=0.9, multiple=1), tokens_BT)
  size = lambda m: sum(p.get_value().size for p in parameters(m).values())
  width = sliced.config.width
  assert size(sliced) <= 0.9 * size(model) < size(sliced) * (width + 1) / width
  assert any('tied head' in row.event for row in ledger.events)
  hf.save_pretrained(sliced, None, tmp_path / 'sliced')
  assert hf.load_pretrained(tmp_path / 'sliced')[0].config == sliced.config
