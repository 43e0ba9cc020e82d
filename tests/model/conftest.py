"""An oracle that knows what a decoder block is made of without building one."""

import pytest


@pytest.fixture(scope='session')
def shapes_by_hand():
  """A function (config) -> {path: shape} of every parameter, by arithmetic on the config."""
  return _shapes


def _shapes(config):
  vocabulary, width = config.vocab_size, config.width
  shapes = {'embedding.table': (vocabulary, width)}
  if config.rope is None:
    shapes['positions.table'] = (config.max_positions, width)
  for l, layer in enumerate(config.layers):
    kinds = {'value_heads': _delta, 'rank': _latent}
    mixer = next((one for name, one in kinds.items() if hasattr(layer.mixer, name)), _attention)
    own = mixer(config, layer) | _feed_forward(config, layer)
    shapes |= {f'layers.{l}.{path}': shape for path, shape in own.items()}
  shapes |= _norm('final_norm', config)
  if not config.tied:
    shapes |= _linear('head', width, vocabulary, config.head_bias)
  return shapes


def _attention(config, layer):
  mixer, width = layer.mixer, config.width
  queries, keys = mixer.query_heads * mixer.head_width, mixer.kv_heads * mixer.head_width
  shapes = _norm('attention_norm', config) if layer.pre_norms else {}
  shapes |= _linear('attention.query', width, queries, mixer.qkv_bias)
  shapes |= _linear('attention.key', width, keys, mixer.qkv_bias)
  shapes |= _linear('attention.value', width, keys, mixer.qkv_bias)
  shapes |= _linear('attention.output', queries, width, mixer.output_bias)
  if mixer.gated:
    shapes |= _linear('attention.gate', width, queries, mixer.qkv_bias)
  if mixer.qk_norm:
    whole = mixer.qk_norm_over == 'all'
    shapes['attention.query_norm.scale'] = (queries if whole else mixer.head_width,)
    shapes['attention.key_norm.scale'] = (keys if whole else mixer.head_width,)
  return shapes | (_norm('attention_post_norm', config) if layer.post_norms else {})


def _delta(config, layer):
  mixer, width = layer.mixer, config.width
  keys, values = mixer.key_heads * mixer.key_width, mixer.value_heads * mixer.value_width
  channels = {'query': keys, 'key': keys, 'value': values}
  shapes = _norm('attention_norm', config)
  for name, outputs in (channels | {'gate': values, 'decay': mixer.value_heads}).items():
    shapes |= _linear(f'attention.{name}', width, outputs, name == 'decay')
  shapes |= _linear('attention.strength', width, mixer.value_heads, False)
  for name, outputs in channels.items():
    shapes[f'attention.{name}_conv.kernel'] = (mixer.conv_width, outputs)
  shapes['attention.rates.log_rate'] = (mixer.value_heads,)
  shapes['attention.head_norm.scale'] = (mixer.value_width,)
  return shapes | _linear('attention.output', values, width, False)


def _latent(config, layer):
  """With the norms before it and of its latents, without biases."""
  mixer, width = layer.mixer, config.width
  queries = mixer.query_heads * (mixer.still_width + mixer.rotary_width)
  shapes = _norm('attention_norm', config) | {'attention.kv_norm.scale': (mixer.rank,)}
  if mixer.query_rank is None:
    shapes |= _linear('attention.query', width, queries, False)
  else:
    shapes['attention.query_norm.scale'] = (mixer.query_rank,)
    shapes |= _linear('attention.query_down', width, mixer.query_rank, False)
    shapes |= _linear('attention.query_up', mixer.query_rank, queries, False)
  shapes |= _linear('attention.kv_down', width, mixer.rank, False)
  shapes |= _linear('attention.rotary_key', width, mixer.rotary_width, False)
  shapes |= _linear('attention.key_up', mixer.rank, mixer.kv_heads * mixer.still_width, False)
  values = mixer.kv_heads * mixer.value_width
  shapes |= _linear('attention.value_up', mixer.rank, values, False)
  return shapes | _linear('attention.output', values, width, False)


def _feed_forward(config, layer):
  ffn, width = layer.ffn, config.width
  shapes = _norm('ffn_norm', config) if layer.pre_norms else {}
  for name in ('gate', 'up') if ffn.gated else ('up',):
    shapes |= _linear(f'ffn.{name}', width, ffn.width, ffn.bias)
  shapes |= _linear('ffn.down', ffn.width, width, ffn.bias)
  if hasattr(ffn, 'experts'):
    shapes = {p: s if 'norm' in p else (ffn.experts, *s) for p, s in shapes.items()}
    shapes |= _linear('ffn.router', width, ffn.experts, ffn.router_bias)
    shapes |= {'ffn.choice_bias': (ffn.experts,)} if ffn.choice_bias else {}
    if ffn.shared_width:
      for name in ('gate', 'up'):
        shapes |= _linear(f'ffn.shared.{name}', width, ffn.shared_width, ffn.bias)
      shapes |= _linear('ffn.shared.down', ffn.shared_width, width, ffn.bias)
    if ffn.shared_gate:
      shapes |= _linear('ffn.shared_gate', width, 1, False)
  return shapes | (_norm('ffn_post_norm', config) if layer.post_norms else {})


def _norm(path, config):
  fields = ('scale', 'bias') if config.norm == 'layer' else ('scale',)
  return {f'{path}.{field}': (config.width,) for field in fields}


def _linear(path, inputs, outputs, bias):
  return {f'{path}.weight': (inputs, outputs)} | ({f'{path}.bias': (outputs,)} if bias else {})
