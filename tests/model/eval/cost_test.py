"""Costs against counts by hand and by brute force."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from model import adapters, kv_cache
from model.adapters import AdapterConfig
from model.config import ModelConfig
from model.eval import cost
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.presets import names, preset
from model.train.partition import Selection, partition
from model.transformer import Transformer
from ops.losses import label_nll
from ops.quantized import quantize

LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=4, kv_heads=2, head_width=8), ffn=FeedForwardConfig(width=24)
)
CONFIG = ModelConfig(family='llama', vocab_size=50, width=16, layers=(LAYER,) * 3, max_positions=64)
# query 16x32, key and value 16x16, output 32x16, gate and up 16x24, down 24x16
LINEAR = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 3 * 16 * 24


def _weights(config, dtype=jnp.float32):
  return {path: jnp.zeros(shape, dtype) for path, shape in cost.parameter_shapes(config).items()}


def test_parameters_by_hand():
  counts = cost.parameters(CONFIG)
  assert counts.non_embedding == 3 * (LINEAR + 2 * 16) + 16
  assert counts.total == counts.non_embedding + 2 * 50 * 16
  assert cost.parameters(CONFIG.replace(tied=True)).total == counts.total - 50 * 16
  assert cost.parameters(CONFIG.replace(rope=None)).total == counts.total + 64 * 16


def test_every_bias_and_norm_is_counted():
  layer = LAYER.with_mixer(qkv_bias=True, output_bias=True, qk_norm=True).with_ffn(
    bias=True, gated=False
  )
  config = CONFIG.replace(layers=(layer,), norm='layer', head_bias=True)
  shapes = cost.parameter_shapes(config)
  assert sum(math.prod(s) for p, s in shapes.items() if p.endswith('.bias')) == (
    32 + 16 + 16 + 16 + 24 + 16 + 3 * 16 + 50
  )
  assert shapes['layers.0.attention.query_norm.scale'] == (8,)
  assert 'layers.0.ffn.gate.weight' not in shapes


def test_layers_of_different_widths():
  thin = LAYER.with_ffn(width=10)
  config = CONFIG.replace(layers=(LAYER, thin, LAYER))
  saved = cost.parameters(CONFIG).total - cost.parameters(config).total
  assert saved == 3 * 16 * (24 - 10)


@pytest.mark.parametrize('window', [None, 1, 5, 12, 99])
def test_prefill_flops_by_brute_force(window):
  """Every query-key pair that the mask lets through costs 2 products of 2 H FLOPs a head."""
  length = 12
  layers = (LAYER, LAYER.with_mixer(window=window), LAYER)
  pairs = lambda w: sum(0 <= t - s < (w or length) for t in range(length) for s in range(length))
  flops = cost.prefill_flops_per_token(CONFIG.replace(layers=layers), length)
  expected = 4 * 4 * 8 * (2 * pairs(None) + pairs(window)) / length
  assert flops.attention == pytest.approx(expected, rel=1e-12)
  assert flops.linear == 2 * 3 * LINEAR
  assert flops.head == 2 * 16 * 50
  assert flops.total == flops.linear + flops.attention + flops.head


def test_causal_prefill_is_half_of_the_square():
  full = 4 * 3 * 4 * 8 * 1000
  assert cost.prefill_flops_per_token(CONFIG, 1000).attention == full * 1001 / 2000


def test_decode_flops():
  assert cost.decode_flops_per_token(CONFIG, 10).attention == 4 * 3 * 4 * 8 * 10
  windowed = CONFIG.replace(layers=(LAYER.with_mixer(window=4),) * 3)
  assert cost.decode_flops_per_token(windowed, 10).attention == 4 * 3 * 4 * 8 * 4


def test_two_flops_a_parameter_dominate_a_real_model():
  config = preset('llama-2-7b')
  flops = cost.decode_flops_per_token(config, 1)
  assert flops.total == pytest.approx(2 * cost.parameters(config).total, rel=0.03)


def test_cache_bytes():
  assert cost.kv_bytes_per_token(preset('llama-3.1-8b')) == 131_072  # 128 KiB, as is well known
  assert cost.kv_bytes_per_token(CONFIG, jnp.float32) == 3 * 2 * 2 * 8 * 4
  windowed = CONFIG.replace(layers=(LAYER, LAYER, LAYER.with_mixer(window=4)))
  assert cost.kv_cache_bytes(windowed, 10) == 2 * 2 * 8 * 2 * (10 + 10 + 4)


@pytest.mark.parametrize('format', [*kv_cache.FORMATS, 'h2o48', 'int8+pyramidkv50'])
@pytest.mark.parametrize('context', [1, 40, 64])
def test_cache_bytes_are_those_of_the_arrays(format, context):
  other = LAYER.with_mixer(kv_heads=1, head_width=48)
  config = CONFIG.replace(layers=(LAYER, other))
  for dtype in (jnp.bfloat16, jnp.float32):
    cache = kv_cache.init(config, 1, context, dtype, format)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert cost.kv_cache_bytes(config, context, dtype, format) == held


def test_a_long_quantized_cache_against_bfloat16_by_hand():
  config = preset('smollm2-135m')  # heads of width 64
  share = lambda format: (
    cost.kv_cache_bytes(config, 8192, cache_format=format) / cost.kv_cache_bytes(config, 8192)
  )
  assert share('int8') == 66 / 128
  # 64 bytes of codes a token and head, 8 of keys' scales and minima and as many of values'; and
  # exact keys and values of 32 tokens a row, with the number of their page.
  rest = (32 * 256 * 3 + 4) / (8192 * 256 * 3)
  assert share('int4') == pytest.approx(80 / 256 + rest, rel=1e-12)


def test_a_quantized_cache_is_less_to_read():
  read = lambda format: cost.decode_bytes_per_token(
    CONFIG, _weights(CONFIG), 64, cache_format=format
  )
  held = lambda format: cost.kv_cache_bytes(CONFIG, 64, cache_format=format)
  assert read('float') - read('int8') == held('float') - held('int8') > 0


def test_decode_reads_everything_but_the_looked_up_rows():
  cache = cost.kv_cache_bytes(CONFIG, 7)
  untied = cost.decode_bytes_per_token(CONFIG, _weights(CONFIG), 7)
  assert untied == 4 * (cost.parameters(CONFIG).total - 49 * 16) + cache
  tied = CONFIG.replace(tied=True, rope=None)
  read = cost.decode_bytes_per_token(tied, _weights(tied), 7)
  assert read == 4 * (cost.parameters(tied).total - 63 * 16) + cache


def test_stored_bytes_count_scales():
  quantized = quantize(jnp.ones((16, 32), jnp.bfloat16), 'int8')
  assert cost.storage({'a': quantized}).nbytes == 16 * 32 + 4 * 32
  both = cost.storage({'a': quantized, 'b': jnp.zeros((16, 32), jnp.bfloat16)})
  assert both.elements == 2 * 512
  assert both.vs_bf16 == (512 + 128 + 1024) / 2048
  assert both.bits_per_weight == 8 * (512 + 128 + 1024) / 1024


def test_storage_metrics_have_the_records_names_and_units():
  linear = {'a': jnp.zeros((16, 32), jnp.float32)}
  metrics = cost.storage_metrics(linear, linear | {'norm': jnp.zeros(16, jnp.float32)})
  assert {name: (m.value, m.unit) for name, m in metrics.items()} == {
    'linear_bytes': (2048, 'byte'),
    'linear_bytes_vs_bf16': (2, '1'),
    'bits_per_weight': (32, 'bit'),
    'stored_bytes': (2048 + 64, 'byte'),
  }


def test_bad_lengths_and_nothing():
  with pytest.raises(ValueError, match='prefill length must be at least 1, not 0'):
    cost.prefill_flops_per_token(CONFIG, 0)
  with pytest.raises(ValueError, match='context must be at least 1, not -1'):
    cost.kv_cache_bytes(CONFIG, -1)
  with pytest.raises(ValueError, match='no weights'):
    cost.storage({})


@pytest.mark.parametrize('name', names())
@pytest.mark.quick(name=[name for name in names() if name.startswith('tiny-')])
def test_the_shapes_of_a_real_model_are_those_by_hand(name, shapes_by_hand):
  config = preset(name)
  config = config.replace(layers=config.layers[:8])
  assert cost.parameter_shapes(config) == shapes_by_hand(config)


@pytest.mark.parametrize('name', [name for name in names() if name.startswith('tiny-')])
def test_non_embedding_is_what_the_layers_and_the_final_norm_hold(name):
  shapes = cost.parameter_shapes(preset(name))
  inner = sum(math.prod(s) for p, s in shapes.items() if p.startswith(('layers.', 'final_norm')))
  assert cost.parameters(preset(name)).non_embedding == inner


# Norms, rotations, the softmax and the loss, which the formula leaves out.
ELEMENTWISE = 0.06


@pytest.mark.parametrize('rank', [None, 8])
@pytest.mark.quick(rank=(8,))
def test_training_flops_are_those_that_xla_counts(rank):
  """XLA's count of a forward and a backward pass, which also multiplies the masked scores."""
  config = preset('tiny-llama').replace(vocab_size=2048)
  batch, length = 4, 64
  model, selection = Transformer(config, rngs=nnx.Rngs(0)), Selection()
  if rank is not None:
    model = adapters.attach(model, AdapterConfig(rank=rank), key=jax.random.key(0))
    selection = Selection(value=())
  structure, trained, frozen = partition(model, selection)
  tokens_BT = jnp.zeros((batch, length), jnp.int32)

  def loss(trained, frozen):
    return label_nll(structure.model({**frozen, **trained})(tokens_BT), tokens_BT).sum()

  counted = jax.jit(jax.grad(loss)).lower(trained, frozen).compile().cost_analysis()['flops']
  adapted = None if rank is None else sum(a.size for a in trained.values())
  useful = cost.training_flops_per_token(config, length, adapter_parameters=adapted)
  attention = cost.prefill_flops_per_token(config, length).attention
  masked = 3 * attention * (2 * length / (length + 1) - 1)
  expected = batch * length * (useful + masked)
  assert counted == pytest.approx(expected, rel=ELEMENTWISE)
