"""SmolLM3: Llama in which every fourth layer rotates neither queries nor keys.

Positions reach those layers through the others; a window, if there is one, is theirs too.
transformers: models/smollm3 (5.24).
"""

from model.hf_names import fields, llama, rope
from model.hf_names.family import Family
from model.layers.block import LayerConfig

DEFAULTS = llama.Defaults(
  vocab_size=128256,
  width=2048,
  layers=36,
  heads=16,
  kv_heads=4,
  max_positions=32768,
  tied=True,
  bos=128000,
  eos=128001,
  pad=128004,
)
THETA = 2e6


def _from_hf(hf):
  llama.only_whole_heads(hf)
  biased = fields.flag(hf, 'attention_bias', False)
  mixer = {'qkv_bias': biased, 'output_bias': biased}
  mlp = {'bias': fields.flag(hf, 'mlp_bias', False)}
  layers = llama.blocks(hf, DEFAULTS, mixer=mixer, ffn=mlp)
  rotates = _rotates(hf, len(layers))
  layers = tuple(
    layer.with_mixer(rotates=rotated, window=window)
    for layer, rotated, window in zip(layers, rotates, _windows(hf, rotates))
  )
  max_positions = fields.size(hf, 'max_position_embeddings', DEFAULTS.max_positions)
  return llama.decoder(
    hf, 'smollm3', DEFAULTS, layers, rope=rope.from_hf(hf, max_positions, theta=THETA)
  )


def _rotates(hf, count: int) -> list[bool]:
  """Which layers rotate: from `no_rope_layers`, where 1 means that a layer does, or an interval."""
  flags = hf.get('no_rope_layers')
  if flags is None:
    interval = fields.size(hf, 'no_rope_layer_interval', 4)
    return [(l + 1) % interval != 0 for l in range(count)]
  if not isinstance(flags, list) or any(flag not in (0, 1) for flag in flags):
    raise ValueError(f'no_rope_layers in config.json must be a list of 0 and 1, not {flags!r}')
  if len(flags) < count:
    raise ValueError(
      f'no_rope_layers in config.json has {len(flags)} entries, but there are {count} layers'
    )
  return [bool(flag) for flag in flags[:count]]


def _windows(hf, rotates: list[bool]) -> list[int | None]:
  used = fields.flag(hf, 'use_sliding_window', False)
  window = fields.size_or_null(hf, 'sliding_window', None) if used else None
  if not used and 'sliding_attention' in (hf.get('layer_types') or ()):
    # transformers computes it with the window or without, by the kind of its attention.
    raise ValueError(
      'layer_types in config.json has sliding layers; set use_sliding_window to true'
    )
  return fields.windows(hf, [window is not None and not rotated for rotated in rotates], window)


def _to_hf(config):
  heads, window = config.layers[0].mixer, fields.first_window(config.layers)
  return {
    **llama.decoder_to_hf(config),
    **rope.to_hf(config.rope),
    'attention_bias': heads.qkv_bias,
    'mlp_bias': config.layers[0].ffn.bias,
    'no_rope_layers': no_rope_layers(config.layers),
    'use_sliding_window': window is not None,
    'sliding_window': window,
    'layer_types': fields.layer_types(config.layers),
  }


def no_rope_layers(layers: tuple[LayerConfig, ...]) -> list[int]:
  """1 for each layer that rotates."""
  return [int(layer.mixer.rotates) for layer in layers]


SMOLLM3 = Family(
  model_type='smollm3',
  architecture='SmolLM3ForCausalLM',
  prefix='model.',
  rows=llama.ROWS,
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
)
