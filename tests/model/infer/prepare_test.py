"""Preparing a model packs its matrices, changes no prediction beyond rounding, and happens once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.infer.prepare import prepare
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.routed import RoutedConfig
from model.transformer import Transformer, linears, matrices
from ops import quantized
from ops.kernels import cpu
from ops.kernels.cpu.packed import PackedTensor
from ops.kernels.fused import FusedTensor
from ops.moe import Router

LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=16), ffn=FeedForwardConfig(width=64)
)
CONFIG = ModelConfig(family='llama', vocab_size=71, width=32, layers=(LAYER,) * 2, max_positions=64)
FLOAT32 = 1e-5
# Activations are rounded to 2^-14 of the largest of a block, in seven products a layer.
INT16_ACTIVATIONS = 4e-4

native = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or 'available')


def _model(fn):
  model = Transformer(CONFIG, rngs=nnx.Rngs(0))
  change = jax.jit(fn)
  for linear in linears(model).values():
    linear.weight.set_value(change(linear.weight.get_value()))
  return model


def _logits(model):
  graphdef, state = nnx.split(model)
  return np.asarray(_run(graphdef, state, jnp.arange(12, dtype=jnp.int32)[None]))


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


@native
@pytest.mark.parametrize('format', ['int8', 'int4', 'bfloat16'])
@pytest.mark.parametrize('activations', ['int16', 'float'])
def test_predictions_stay_and_the_model_does_too(format, activations):
  model = _model(
    lambda w: w.astype(format) if format == 'bfloat16' else quantized.quantize(w, format)
  )
  before = {path: type(w) for path, w in matrices(model).items()}
  fast = prepare(model, activations=activations)
  assert all(isinstance(w, PackedTensor) for w in matrices(fast).values())
  assert {path: type(w) for path, w in matrices(model).items()} == before
  expected = _logits(model)
  rounded = activations == 'int16' and format != 'bfloat16'
  tolerance = (INT16_ACTIVATIONS if rounded else FLOAT32) * np.abs(expected).max()
  np.testing.assert_allclose(_logits(fast), expected, atol=tolerance, rtol=0)
  assert prepare(fast) is fast


def test_plain_float32_and_other_platforms_stay(monkeypatch):
  model = _model(lambda w: w)
  assert prepare(model) is model
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  compressed = _model(lambda w: quantized.quantize(w, 'int8'))
  assert prepare(compressed) is compressed


@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
def test_on_an_accelerator_codes_are_multiplied_without_widening_them(monkeypatch, platform):
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  model = _model(lambda w: quantized.quantize(w, 'int4', group_size=32))
  fast = prepare(model)
  assert all(isinstance(w, FusedTensor) for w in matrices(fast).values())
  expected = _logits(model)
  np.testing.assert_allclose(_logits(fast), expected, atol=FLOAT32 * np.abs(expected).max(), rtol=0)
  assert prepare(fast) is fast


@native
@pytest.mark.parametrize('format', ['int4', 'bfloat16'])
@pytest.mark.quick(format=('int4',))
def test_a_token_reads_the_experts_that_it_chooses_and_no_others(format):
  routed = RoutedConfig(experts=8, width=64, router=Router(choices=2))
  config = CONFIG.replace(layers=(dataclasses.replace(LAYER, ffn=routed),))
  model = Transformer(config, rngs=nnx.Rngs(0))
  quantize = jax.jit(jax.vmap(lambda w_IO: quantized.quantize(w_IO, 'int4')))
  for linear in linears(model).values():
    w = linear.weight.get_value()
    if w.ndim == 3:
      linear.weight.set_value(w.astype(format) if format == 'bfloat16' else quantize(w))
  fast = prepare(model)
  ffn = fast.layers[0].ffn
  packed = [linear.weight.get_value() for linear in (ffn.gate, ffn.up, ffn.down)]
  assert all(isinstance(w, PackedTensor) and w.shape[0] == 8 for w in packed)
  graph, state = nnx.split(fast)
  run = jax.jit(lambda state: nnx.merge(graph, state)(jnp.array([[5]], jnp.int32)))
  dense, own = nnx.split(model)
  expected = jax.jit(lambda state: nnx.merge(dense, state)(jnp.array([[5]], jnp.int32)))(own)
  expected = np.asarray(expected)
  tolerance = (INT16_ACTIVATIONS if format == 'int4' else FLOAT32) * np.abs(expected).max()
  np.testing.assert_allclose(run(state), expected, atol=tolerance, rtol=0)

  def spoiled(e):
    spoil = lambda a: a.at[e].set(jnp.nan) if jnp.issubdtype(a.dtype, jnp.floating) else a
    for linear, w in zip((ffn.gate, ffn.up, ffn.down), packed):
      linear.weight.set_value(jax.tree.map(spoil, w))
    return np.isnan(run(nnx.state(fast))).all()

  assert sum(map(spoiled, range(8))) == 2
