"""Mixtral: Mistral with routed feed-forward layers, whose experts are stored one by one.

transformers: models/mixtral (5.23). The coefficient of its balance loss and the noise of its router
matter to training alone, and are not read.
"""

import dataclasses

from model.hf_names import fields, llama, rope
from model.hf_names.family import TRANSPOSE, Family, Row
from model.layers.attention import AttentionConfig
from model.layers.routed import RoutedConfig
from ops.moe import Router

DEFAULTS = dataclasses.replace(llama.MISTRAL_DEFAULTS, eps=1e-5)
THETA = 1e6
MOE = 'model.layers.{l}.block_sparse_moe'
ROWS = (
  *(row for row in llama.ROWS if '.mlp.' not in row.theirs),
  Row(f'{MOE}.gate', ('layers.{l}.ffn.router',), TRANSPOSE),
  Row(f'{MOE}.experts.{{e}}.w1', ('layers.{l}.ffn.gate',), TRANSPOSE),
  Row(f'{MOE}.experts.{{e}}.w3', ('layers.{l}.ffn.up',), TRANSPOSE),
  Row(f'{MOE}.experts.{{e}}.w2', ('layers.{l}.ffn.down',), TRANSPOSE),
)


def _from_hf(hf):
  llama.only_whole_heads(hf)
  window = fields.size_or_null(hf, 'sliding_window', None)
  layers = llama.blocks(hf, DEFAULTS, mixer={'window': window})
  dense = layers[0].ffn
  routed = RoutedConfig(
    experts=fields.size(hf, 'num_local_experts', 8),
    width=dense.width,
    router=Router(choices=fields.size(hf, 'num_experts_per_tok', 2), renormalize=True),
    activation=dense.activation,
  )
  layers = tuple(dataclasses.replace(layer, ffn=routed) for layer in layers)
  return llama.decoder({'rope_theta': THETA, **hf}, 'mixtral', DEFAULTS, layers)


def _to_hf(config):
  layer = config.layers[0]
  return {
    **llama.decoder_to_hf(config),
    **rope.to_hf(config.rope),
    'sliding_window': layer.mixer.window,
    'num_local_experts': layer.ffn.experts,
    'num_experts_per_tok': layer.ffn.router.choices,
  }


MIXTRAL = Family(
  model_type='mixtral',
  architecture='MixtralForCausalLM',
  prefix='model.',
  rows=ROWS,
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
  kinds=(AttentionConfig, RoutedConfig),
)
