"""What blocks say of their wiring, against pictures and against the built blocks."""

import dataclasses

import jax
import pytest
from flax import nnx

from model import presets, transformer
from model.compress import calibrate, statistics
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers import linear
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.delta import GatedDeltaConfig
from model.layers.wiring import (
  Activated,
  Attended,
  Edge,
  Gated,
  HeadNormed,
  Normed,
  Passed,
  Streamed,
  Write,
)

LLAMA = LayerConfig(
  mixer=AttentionConfig(query_heads=6, kv_heads=2, head_width=4), ffn=FeedForwardConfig(width=24)
)
QUERY, KEY, VALUE = (f'attention.{name}' for name in ('query', 'key', 'value'))


def test_the_picture_of_mixers_whose_heads_are_normed():
  delta = GatedDeltaConfig(key_heads=2, value_heads=6, key_width=4, value_width=5)
  names = ('query', 'key', 'value', 'gate', 'decay', 'strength')
  readers = tuple(f'attention.{name}' for name in names)
  norm, output = 'attention.head_norm', 'attention.output'
  heads = HeadNormed(head_width=5, copies=6, scores=(QUERY, KEY))
  assert dataclasses.replace(LLAMA, mixer=delta).wiring.edges[:2] == (
    Edge(producer='attention_norm', through=Normed(), consumers=readers),
    Edge(producer=norm, through=heads, consumers=(output,)),
  )
  low = ('attention.decay_in', 'attention.decay_out')
  wiring = dataclasses.replace(LLAMA, mixer=linear.gla(3, 4, 5)).wiring
  assert wiring.edges[:3] == (
    Edge(producer='attention_norm', through=Normed(), consumers=(*readers[:4], low[0])),
    Edge(producer=low[0], through=Passed(normed=False), consumers=low[1:]),
    Edge(producer=norm, through=dataclasses.replace(heads, copies=3), consumers=(output,)),
  )
  assert wiring.scores == (QUERY, KEY) and all(edge.obstacle is None for edge in wiring.edges)


def test_the_picture_of_a_llama():
  heads = Attended(head_width=4, copies=3, scores=(QUERY, KEY))
  assert LLAMA.wiring.edges == (
    Edge(producer='attention_norm', through=Normed(), consumers=(QUERY, KEY, VALUE)),
    Edge(producer=VALUE, through=heads, consumers=('attention.output',)),
    Edge(producer='ffn_norm', through=Normed(), consumers=('ffn.gate', 'ffn.up')),
    Edge(producer='ffn.up', through=Gated(gate='ffn.gate'), consumers=('ffn.down',)),
  )
  assert LLAMA.wiring.writes == (
    Write(layer='attention.output', norm=None),
    Write(layer='ffn.down', norm=None),
  )
  assert LLAMA.wiring.scores == (QUERY, KEY)
  assert all(edge.obstacle is None for edge in LLAMA.wiring.edges)


def test_without_norms_before_them_layers_read_the_stream_and_nothing_folds_into_it():
  layer = dataclasses.replace(LLAMA, pre_norms=False, post_norms=True)
  edges, stages = layer.wiring.edges, layer.wiring.stages
  assert [edge.producer for edge in edges] == [None, VALUE, None, 'ffn.up']
  assert edges[0] == Edge(producer=None, through=Streamed(), consumers=(QUERY, KEY, VALUE))
  assert edges[0].obstacle == 'no norm comes before it'
  assert stages == LLAMA.wiring.stages and layer.wiring.norms == {}


@pytest.mark.parametrize('activation', ['relu', 'silu', 'gelu'])
def test_without_a_gate_only_relu_lets_scales_pass(activation):
  *_, last = LLAMA.with_ffn(gated=False, activation=activation).wiring.edges
  assert last == Edge(
    producer='ffn.up', through=Activated(function=activation), consumers=('ffn.down',)
  )
  why = None if activation == 'relu' else f'{activation} does not commute with scales'
  assert last.obstacle == why


class _Notes(list):
  """Stands where a recorder keeps its inputs, and notes that the layer runs."""

  def __init__(self, layer, ran):
    super().__init__()
    self.layer, self.ran = layer, ran

  def append(self, x):
    del x
    self.ran.append(self.layer)


def _with_mixer(mixer):
  config = presets.preset('tiny-llama')
  return config.replace(layers=(dataclasses.replace(config.layers[0], mixer=mixer),))


CONFIGS = {name: presets.preset(name) for name in presets.names() if name.startswith('tiny-')}
CONFIGS |= {'linear': _with_mixer(linear.linear_attention(2, 8, 8))}
CONFIGS |= {'gla': _with_mixer(linear.gla(2, 8, 8))}


@pytest.mark.parametrize('name', CONFIGS)
def test_the_wiring_has_every_linear_layer_in_running_order(name, rng):
  model = transformer.Transformer(CONFIGS[name], rngs=nnx.Rngs(0))
  for block in {type(block.layer.mixer): block for block in model.layers}.values():
    _check_order(model, block, rng)


def _check_order(model, block, rng):
  ran = []
  layers, params = transformer.linears(block), transformer.parameters(block)
  function, values = calibrate.split(model.config, block)
  for layer in layers:
    weight = values[f'{layer}.weight']
    values[f'{layer}.weight'] = statistics.Recorder(weight, _Notes(layer, ran))
  tokens_BT = rng.integers(0, model.config.vocab_size, (1, 5))
  jax.eval_shape(lambda: function(values, tokens_BT, model.embed(tokens_BT)))  # runs no op
  wiring = block.layer.wiring
  # Shared experts read what the others read, but run after these.
  alone = lambda names: [name for name in names if 'shared' not in name]
  assert alone(ran) == alone(layer for stage in wiring.stages for layer in stage)
  assert sorted(ran) == sorted(layers)
  assert all(f'{norm}.scale' in params for norm in wiring.norms)
  writers = {layer for layer, linear in layers.items() if linear.axes[-1] == 'D'}
  assert writers == {write.layer for write in wiring.writes}
  norms = {write.norm for write in wiring.writes} - {None}
  assert norms == {path.split('.')[0] for path in params if 'post_norm' in path}
