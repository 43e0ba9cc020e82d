"""What blocks say of their wiring, against pictures and against the built blocks."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from model import presets, transformer
from model.compress import calibrate, statistics
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.wiring import Activated, Attended, Edge, Gated, Normed, Streamed, Write

LLAMA = LayerConfig(
  mixer=AttentionConfig(query_heads=6, kv_heads=2, head_width=4), ffn=FeedForwardConfig(width=24)
)
QUERY, KEY, VALUE = (f'attention.{name}' for name in ('query', 'key', 'value'))


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


@pytest.mark.parametrize('name', [name for name in presets.names() if name.startswith('tiny-')])
def test_the_wiring_has_every_linear_layer_in_running_order(name, rng):
  model = transformer.Transformer(presets.preset(name), rngs=nnx.Rngs(0))
  ran, block = [], model.layers[0]
  layers, params = transformer.linears(block), transformer.parameters(block)
  function, values = calibrate.split(model.config, block)
  for layer in layers:
    weight = values[f'{layer}.weight']
    values[f'{layer}.weight'] = statistics.Recorder(weight, _Notes(layer, ran))
  tokens_BT = rng.integers(0, model.config.vocab_size, (1, 5))
  function(values, tokens_BT, np.asarray(model.embed(tokens_BT)))
  wiring = block.layer.wiring
  assert ran == [layer for stage in wiring.stages for layer in stage]
  assert sorted(ran) == sorted(layers)
  assert all(f'{norm}.scale' in params for norm in wiring.norms)
  writers = {layer for layer, linear in layers.items() if linear.axes[-1] == 'D'}
  assert writers == {write.layer for write in wiring.writes}
  norms = {write.norm for write in wiring.writes} - {None}
  assert norms == {path.split('.')[0] for path in params if 'post_norm' in path}
