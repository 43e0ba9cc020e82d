"""Tests that the compiled phases compute what generation computes, at every call."""

import jax
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.infer import bench
from model.infer.prepare import prepare
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, linears
from ops import quantized

LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=16), ffn=FeedForwardConfig(width=64)
)
CONFIG = ModelConfig(family='llama', vocab_size=71, width=32, layers=(LAYER,) * 2, max_positions=64)
BATCH, PROMPT, STEPS = 2, 10, 3
# Cached steps against one whole pass, in float32.
TOLERANCE = 1e-4


def _model(format=None):
  model = Transformer(CONFIG, rngs=nnx.Rngs(0))
  for i, linear in enumerate(linears(model).values()):
    w_IO = 0.3 * jax.random.normal(jax.random.key(i), linear.weight.shape)
    linear.weight.set_value(w_IO if format is None else quantized.quantize(w_IO, format))
  return prepare(model, activations='float')  # rounded activations would exceed TOLERANCE


@pytest.mark.parametrize('format', [None, 'int8'])
@pytest.mark.quick(format=('int8',))
def test_prefill_and_decode_run_the_model(format):
  model = _model(format)
  own = bench.prepare(model, batch=BATCH, prompt_length=PROMPT, steps=STEPS, seed=4)
  tokens_BT = np.random.default_rng(4).integers(0, CONFIG.vocab_size, (BATCH, PROMPT), np.int32)
  logits_BV, first_B = own.prefill(), own.decode()
  graphdef, state = nnx.split(model)
  whole = jax.jit(lambda state, t: nnx.merge(graphdef, state)(t))
  padded_BT = np.zeros((BATCH, PROMPT + 1 + STEPS), np.int32)  # decoding starts from token 0
  padded_BT[:, :PROMPT] = tokens_BT
  expected_BV = whole(state, padded_BT)[:, PROMPT - 1]
  np.testing.assert_allclose(logits_BV, expected_BV, TOLERANCE, TOLERANCE)
  for t in range(PROMPT, PROMPT + STEPS):
    padded_BT[:, t + 1] = np.asarray(whole(state, padded_BT)[:, t].argmax(-1))
  np.testing.assert_array_equal(first_B, padded_BT[:, -1])
  np.testing.assert_array_equal(own.decode(), first_B)
  np.testing.assert_array_equal(own.prefill(), logits_BV)
  np.testing.assert_array_equal(own.decode(), first_B)
  assert (own.batch, own.prompt_length, own.steps) == (BATCH, PROMPT, STEPS)


def test_peak_bytes_cover_parameters_and_cache():
  model = _model()
  small = bench.prepare(model, batch=1, prompt_length=8, steps=2)
  large = bench.prepare(model, batch=3, prompt_length=40, steps=2)
  stored = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
  cache = lambda batch, slots: 2 * 2 * batch * slots * 16 * 4
  assert small.decode_peak_bytes > stored + cache(1, 10)
  assert large.decode_peak_bytes - small.decode_peak_bytes >= cache(3, 42) - cache(1, 10)


def test_a_quantized_cache_holds_fewer_bytes_and_runs():
  model = _model()
  plain, small = (
    bench.prepare(model, batch=1, prompt_length=40, steps=2, cache_format=format)
    for format in ('float', 'int8')
  )
  assert plain.cache_bytes == 2 * 2 * 42 * 16 * 4
  assert small.cache_bytes == 2 * 2 * 42 * (16 + 2)
  exact, coded = plain.prefill(), small.prefill()
  assert 0 < np.abs(exact - coded).max() < 0.05 * np.abs(exact).max()
  assert small.decode().shape == (1,)


def test_two_benches_do_not_share_a_cache():
  model = _model()
  one, two = (bench.prepare(model, batch=1, prompt_length=6, steps=2, seed=seed) for seed in (0, 1))
  one.prefill()
  alone = np.asarray(one.decode())
  two.prefill()
  two.decode()
  np.testing.assert_array_equal(one.decode(), alone)
