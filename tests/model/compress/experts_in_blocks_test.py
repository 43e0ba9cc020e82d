"""Techniques on whole blocks with experts: what must cancel out, and what each expert gets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import learned, units
from model.compress import calibrate, pipeline, recipe, registry, slicing
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import RoutedConfig
from model.learned import QatConfig
from model.transformer import Transformer, matrices, parameters
from ops import experts
from ops.linear import dense
from ops.moe import Router

# Logits of order 1 after scales or rotations that cancel out, in float32.
CANCELLED = 1e-4
FFN = RoutedConfig(
  experts=3,
  width=32,
  router=Router(choices=2, renormalize=True),
  router_bias=True,
  shared_width=16,
  shared_gate=True,
)
MIXER = AttentionConfig(query_heads=2, kv_heads=1, head_width=16)
TOKENS_BT = np.random.default_rng(1).integers(0, 40, (8, 24), np.int32)
INT4 = {'format': 'int4', 'group_size': 16}


def _model(**changes) -> Transformer:
  layer = LayerConfig(mixer=MIXER, ffn=FFN)
  config = ModelConfig(
    family='llama', vocab_size=40, width=32, layers=(layer,), max_positions=32, **changes
  )
  model, rng = Transformer(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for path, param in parameters(model).items():
    value = param.get_value()
    spread = np.exp(rng.normal(size=value.shape[-1])) if 'norm' in path else 0.25
    param.set_value(jnp.asarray(spread * rng.standard_normal(value.shape), value.dtype))
  return model


@pytest.fixture(scope='module')
def model():
  """A routed model, and its logits."""
  one = _model()
  return one, _logits(one)


def _logits(model):
  return np.asarray(_run(*nnx.split(model), TOKENS_BT))


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)
to_dense = jax.jit(dense)


def _compress(model, *steps):
  return pipeline.compress(model, recipe.parse({'name': 'x', 'steps': list(steps)}), TOKENS_BT)


def _value(model, path):
  return np.float64(to_dense(parameters(model)[f'layers.0.ffn.{path}'].get_value()))


def test_rotations_leave_the_choice_and_the_outputs(model):
  rotated, _ = _compress(model[0], {'rotate': {}})
  assert type(matrices(rotated)['layers.0.ffn.down']).__name__ == 'RotatedTensor'
  assert not np.allclose(_value(rotated, 'router.weight'), _value(model[0], 'router.weight'))
  np.testing.assert_allclose(_logits(rotated), model[1], atol=CANCELLED)


def test_layer_norms_are_merged_into_experts_before_slicing():
  model = _model(norm='layer')
  values = slicing.merge_norms(model)
  stored = {path: jnp.asarray(value, jnp.float32) for path, value in values.items()}
  merged = units.build(slicing.merged_config(model.config), stored)
  np.testing.assert_allclose(_logits(merged), _logits(model), atol=CANCELLED)


@pytest.mark.slow
def test_slicing_nothing_away_changes_nothing():
  """The last dimension of the stream is zero wherever it is written, so it can go."""
  model = _model(norm_eps=1e-12)
  for path, param in parameters(model).items():
    if units.letters(model)[path][-1] == 'D' and 'norm' not in path:
      param.set_value(param.get_value().at[..., -8:].set(0))
  sliced, _ = _compress(model, {'slice': {'ratio': 0.25, 'multiple': 8}})
  assert sliced.config.width == 24
  assert sliced.layers[0].ffn.up.weight.shape == (3, 24, 32)
  np.testing.assert_allclose(_logits(sliced), _logits(model), atol=CANCELLED)


def test_scales_of_awq_cancel_out_and_are_a_power_of_what_each_expert_sees(model):
  scaled, ledger = _compress(model[0], {'awq': {'quantize': False, 'grid': 5, 'group_size': 16}})
  np.testing.assert_allclose(_logits(scaled), model[1], atol=CANCELLED)
  assert not any('up' in event.layer for event in ledger.events)
  stream = calibrate.Stream(model[0], [TOKENS_BT])
  seen_EI = stream.observe(model[0].layers[0], ('input_absmean',))['ffn.down']['input_absmean']
  rows_EI = _value(scaled, 'down.weight')[:, :, 0] / _value(model[0], 'down.weight')[:, :, 0]
  for seen_I, scale_I in zip(np.log(np.float64(seen_EI)), np.log(rows_EI), strict=True):
    alpha, start = np.polyfit(seen_I, scale_I, 1)
    np.testing.assert_allclose(alpha * seen_I + start, scale_I, atol=1e-3)
    assert 5 * alpha == pytest.approx(round(5 * alpha), abs=0.01)


@pytest.mark.slow
def test_smoothing_cancels_out_and_each_expert_has_a_scale_of_its_inputs(model):
  smooth = {'fold': 'all', 'activations': 'static'}
  smoothed, _ = _compress(model[0], {'smoothquant': {**smooth, 'quantize': False}})
  np.testing.assert_allclose(_logits(smoothed), model[1], atol=CANCELLED)
  by_EI = _value(smoothed, 'down.weight')[:, :, 0] / _value(model[0], 'down.weight')[:, :, 0]
  assert by_EI.max() / by_EI.min() > 1.5
  stream = calibrate.Stream(model[0], [TOKENS_BT])
  seen_EI = stream.observe(model[0].layers[0], ('input_absmax',))['ffn.down']['input_absmax']
  quantized, _ = _compress(model[0], {'smoothquant': smooth})
  w = matrices(quantized)['layers.0.ffn.down']
  assert w.shape == (3, 32, 32)
  expected_E = (np.float64(seen_EI) / by_EI).max(1) / 127
  np.testing.assert_allclose(w.scale, expected_E, rtol=1e-3)


@dataclasses.dataclass(frozen=True)
class _Other:
  """The parameters of another block, as a candidate."""

  def __call__(self, parameters, arrays, k):
    del parameters, k
    return arrays


@pytest.mark.slow
def test_each_technique_moves_the_block_less_than_rounding(model):
  stream = calibrate.Stream(model[0], [TOKENS_BT])

  def error(*steps):
    result, _ = _compress(model[0], *steps)
    values = {p: to_dense(v.get_value()) for p, v in parameters(result.layers[0]).items()}
    return stream.errors(model[0].layers[0], _Other(), values, 1)[0]

  nearest = error({'round_to_nearest': {**INT4, 'symmetric': False}})
  awq = error({'awq': {**INT4, 'grid': 5, 'rows': None}})
  learned_ = error({'autoround': {**INT4, 'symmetric': False, 'steps': 40}})
  assert awq < 0.97 * nearest and learned_ < 0.8 * nearest


@pytest.mark.slow
def test_a_starved_expert_is_rounded_without_statistics_and_named(model):
  model = nnx.clone(model[0])
  bias = model.layers[0].ffn.router.bias
  bias.set_value(bias.get_value().at[1].set(-60.0))
  result, ledger = _compress(model, {'gptq': {**INT4, 'act_order': False}})
  starved = {(e.layer, e.detail) for e in ledger.events if 'without statistics' in e.event}
  assert starved == {(f'layers.0.ffn.{name}.1', '0') for name in ('gate', 'up', 'down')}
  step = recipe.parse({'name': 'x', 'steps': [{'round_to_nearest': INT4}]}).steps[0]
  rounded = jax.jit(lambda w_IO: dense(step.row(w_IO, {}, step.spec).weight))
  for name in ('up', 'down'):
    w_EIO = parameters(model)[f'layers.0.ffn.{name}.weight'].get_value()
    found = matrices(result)[f'layers.0.ffn.{name}']
    for e in range(3):
      one = np.asarray(to_dense(experts.take(found, e)))
      same = np.abs(one - rounded(w_EIO[e])).max() < 1e-5
      assert same == (e == 1), (name, e)


def test_channels_without_an_effect_go_from_all_experts():
  model = _model()
  gone = np.array([0, 3, 4, 9, 17, 20, 30, 31])
  down = model.layers[0].ffn.down.weight
  down.set_value(down.get_value().at[:, gone].set(0))
  step = {'prune_ffn': {'ratio': 0.25, 'multiple': 8, 'refit': True}}
  smaller, _ = _compress(model, step)
  kept = np.setdiff1d(np.arange(32), gone)
  np.testing.assert_array_equal(
    _value(smaller, 'gate.weight'), _value(model, 'gate.weight')[:, :, kept]
  )
  np.testing.assert_allclose(_logits(smaller), _logits(model), atol=CANCELLED)


@pytest.mark.slow
def test_owl_shares_a_sparsity_out_among_blocks_with_experts(model):
  result, _ = _compress(model[0], {'owl': {'sparsity': 0.5}})
  assert (_value(result, 'up.weight') == 0).mean() == pytest.approx(0.5, abs=0.02)


def test_experts_that_learned_to_be_quantized_are_stored_as_rounded(model):
  learning = learned.attach(model[0], QatConfig(group_size=16))
  result = learned.finish(learning)
  row = registry.lookup('round_to_nearest')
  w_EIO = parameters(model[0])['layers.0.ffn.up.weight'].get_value()
  rounded = jax.jit(lambda w_EIO: dense(row(w_EIO, {}, row.spec(**INT4)).weight))
  np.testing.assert_array_equal(_value(result, 'up.weight'), rounded(w_EIO))
  np.testing.assert_allclose(_logits(learning), _logits(result), atol=CANCELLED)
