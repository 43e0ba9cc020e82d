"""The keys of adapter_config.json: those that are honoured, and those that are refused.

A key that changes the meaning of the tensors and is not honoured is an error, because the adapter
would otherwise silently be another one.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

# Keys that change the meaning of the tensors in a way that is not read, with harmless values.
_REFUSED = {
  'peft_type': ('LORA',),
  'bias': ('none', None),
  'lora_bias': (False, None),
  'layer_replication': (None, []),
  'target_parameters': (None, []),
  'trainable_token_indices': (None, [], {}),
  'alora_invocation_tokens': (None, []),
  'use_qalora': (False, None),
  'use_bdlora': (None, False),
  'arrow_config': (None, {}),
  'kasa_config': (None, {}),
  'monteclora_config': (None, {}),
  'velora_config': (None, {}),
}
# Starts that leave the correction as it is meant for the base model; others change the base.
_PLAIN_STARTS = (True, False, None, 'gaussian', 'eva', 'orthogonal', 'loftq')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
  """The part of adapter_config.json that says what the tensors mean.

  rank, alpha: the defaults of modules that no key of `ranks` or `alphas` matches; these keys are
    regular expressions on the ends of module names.
  saved: modules that are stored whole.
  """

  rank: int = 8
  alpha: float = 8
  ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
  alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
  rslora: bool = False
  dora: bool = False
  saved: tuple[str, ...] = ()
  base: str = ''  # name of the model that the adapter was trained on

  def rank_of(self, module: str) -> int:
    """The rank of a module of theirs, such as 'model.layers.0.self_attn.q_proj'."""
    return _first_match(self.ranks, module, self.rank)

  def scale_of(self, module: str) -> float:
    """The factor of the product of the two sides."""
    rank, alpha = self.rank_of(module), _first_match(self.alphas, module, self.alpha)
    return alpha / (math.sqrt(rank) if self.rslora else rank)


def from_json(data: dict) -> PeftConfig:
  """Reads the contents of adapter_config.json.

  Raises ValueError that names a key whose meaning is not supported.
  """
  problems = [
    f'{key} = {data[key]!r}'
    for key, harmless in _REFUSED.items()
    if key in data and data[key] not in harmless
  ]
  if problems:
    raise ValueError(f'adapter_config.json asks for what is not supported: {", ".join(problems)}')
  start = data.get('init_lora_weights', True)
  if not (
    start in _PLAIN_STARTS if isinstance(start, bool | None) else str(start) in _PLAIN_STARTS
  ):
    raise ValueError(
      f'init_lora_weights is {start!r}, whose adapter belongs to a changed base. Convert it first '
      'to an adapter for the original base, by `path_initial_model_for_weight_conversion` of '
      "PEFT's save_pretrained"
    )
  try:
    return PeftConfig(
      rank=int(data.get('r', 8)),
      alpha=data.get('lora_alpha', 8),
      ranks=dict(data.get('rank_pattern') or {}),
      alphas=dict(data.get('alpha_pattern') or {}),
      rslora=bool(data.get('use_rslora', False)),
      dora=bool(data.get('use_dora', False)),
      saved=tuple(data.get('modules_to_save') or ()),
      base=data.get('base_model_name_or_path') or '',
    )
  except (TypeError, ValueError) as error:
    raise ValueError(f'adapter_config.json has a value of the wrong type: {error}') from None


def to_json(config: PeftConfig, modules: list[str], *, transposed: bool) -> dict:
  """The contents of adapter_config.json for adapters in these modules.

  `transposed`: the modules store their matrices as (inputs, outputs), as those of GPT-2 do.
  """
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': config.base,
    'r': config.rank,
    'lora_alpha': config.alpha,
    'rank_pattern': dict(config.ranks),
    'alpha_pattern': dict(config.alphas),
    'use_rslora': config.rslora,
    'use_dora': config.dora,
    'target_modules': modules,
    'modules_to_save': list(config.saved) or None,
    'fan_in_fan_out': transposed,
    'bias': 'none',
    'lora_dropout': 0.0,
    'init_lora_weights': True,
    'inference_mode': True,
  }


def _first_match(values: Mapping, module: str, default):
  for pattern, value in values.items():
    if re.match(rf'(.*\.)?({pattern})$', module):
      return value
  return default
