"""What families with experts share: keys of `config.json` and names of tensors.

The experts of a checkpoint lie one by one, `experts.3.up_proj.weight`, or all in one tensor without
the ending: `experts.gate_up_proj` [E, 2 I, D], gate before up, and `experts.down_proj` [E, D, I].
transformers writes the former, which the hub has, and holds the latter in memory (5.24).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.hf_names import fields
from model.hf_names.family import BARE, TRANSPOSE, Row
from model.layers.block import LayerConfig
from model.layers.routed import RoutedConfig
from ops.moe import Router

GATE, UP, DOWN = (f'layers.{{l}}.ffn.{name}' for name in ('gate', 'up', 'down'))
ROUTER = ('layers.{l}.ffn.router',)
# The number of experts; transformers saves some families under another key than the hub has.
COUNTS = ('num_local_experts', 'num_experts', 'n_routed_experts')
# What routers of other families have, and the values that mean its absence.
ABSENT = {
  'scoring_func': ('softmax', None),
  'topk_method': ('greedy', None),
  'n_group': (1, None),
  'topk_group': (1, None),
  'routed_scaling_factor': (1, None),
  'n_shared_experts': (0, None),
  'first_k_dense_replace': (0, None),
}


def one_by_one(experts: str, names: tuple[str, str, str]) -> tuple[Row, ...]:
  """The rows of experts that lie one by one; `names` are those of gate, up and down."""
  return tuple(
    Row(f'{experts}.{{e}}.{theirs}', (ours,), TRANSPOSE)
    for theirs, ours in zip(names, (GATE, UP, DOWN))
  )


def fused(experts: str) -> tuple[Row, ...]:
  """The rows of experts that are all in one tensor."""
  return (
    Row(f'{experts}.gate_up_proj', (GATE, UP), TRANSPOSE, BARE, stacked=True),
    Row(f'{experts}.down_proj', (DOWN,), TRANSPOSE, BARE, stacked=True),
  )


def without_dense(rows: tuple[Row, ...]) -> tuple[Row, ...]:
  """The rows without those of dense feed-forward layers."""
  return tuple(row for row in rows if not {GATE, UP, DOWN} & set(row.ours))


def routed(
  hf: dict, *, experts: int, choices: int, router: Mapping[str, Any], **traits
) -> RoutedConfig:
  """The experts of a config.json: `experts` and `choices` are defaults, the rest further fields.

  Raises ValueError, naming the key, for a router that the family does not have.
  """
  for key, harmless in ABSENT.items():
    fields.refuse(hf, key, *harmless)
  count = _count(hf, experts)
  choices = fields.size(hf, 'num_experts_per_tok', choices)
  if choices > count:
    raise ValueError(
      f'num_experts_per_tok in config.json: a token cannot choose {choices} experts of {count}'
    )
  return RoutedConfig(
    experts=count,
    router=Router(choices=choices, **router),
    **{'activation': fields.activation(hf, 'hidden_act', 'silu'), **traits},
  )


def _count(hf, default):
  found = {key: fields.size(hf, key, default) for key in COUNTS if hf.get(key) is not None}
  if len(set(found.values())) > 1:
    keys = ', '.join(f'{key} = {value}' for key, value in found.items())
    raise ValueError(f'config.json has more than one number of experts: {keys}; keep one')
  return next(iter(found.values()), default)


def first(config: ModelConfig) -> RoutedConfig:
  """The config of the first layer with experts. Raises ValueError if there is none."""
  for layer in config.layers:
    if isinstance(layer.ffn, RoutedConfig):
      return layer.ffn
  raise ValueError(
    f'config.json of the family {config.family} describes layers with experts, and there are none'
  )


def everywhere(layers: tuple[LayerConfig, ...], experts: RoutedConfig) -> tuple[LayerConfig, ...]:
  """The layers, each with these experts."""
  return tuple(dataclasses.replace(layer, ffn=experts) for layer in layers)


def sparse(
  hf: dict, layers: tuple[LayerConfig, ...], experts: RoutedConfig
) -> tuple[LayerConfig, ...]:
  """The layers of a Qwen: with these experts, but for those that config.json leaves dense."""
  step, dense = fields.size(hf, 'decoder_sparse_step', 1), hf.get('mlp_only_layers') or []
  if not isinstance(dense, list) or not all(type(l) is int for l in dense):
    raise ValueError(f'mlp_only_layers in config.json must be numbers of layers, not {dense!r}')
  is_dense = lambda l: l in dense or (l + 1) % step
  return tuple(
    layer if is_dense(l) else dataclasses.replace(layer, ffn=experts)
    for l, layer in enumerate(layers)
  )


def sparse_to_hf(config: ModelConfig, dense_width: int) -> dict:
  """The keys that `sparse` reads; `dense_width` is written where no layer is dense."""
  dense = [l for l, layer in enumerate(config.layers) if not isinstance(layer.ffn, RoutedConfig)]
  return {
    'intermediate_size': config.layers[dense[0]].ffn.width if dense else dense_width,
    'decoder_sparse_step': 1,
    'mlp_only_layers': dense,
  }
