"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and windows on late layers.

transformers: models/qwen2 (5.23).
"""

from model.hf_names import fields, llama, rope
from model.hf_names.family import Family
from model.layers.block import LayerConfig

DEFAULTS = llama.Defaults(
  vocab_size=151936, ffn_width=22016, kv_heads=32, max_positions=32768, bos=None, eos=None
)


def late_windows(hf: dict, layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
  """Returns `layers` with the windows of a Qwen2 or Qwen3 config."""
  window = fields.size_or_null(hf, 'sliding_window', 4096)
  window = window if fields.flag(hf, 'use_sliding_window', False) else None
  first = fields.integer(hf, 'max_window_layers', 28)
  slides = [window is not None and l >= first for l in range(len(layers))]
  return llama.windowed(layers, fields.windows(hf, slides, window))


def late_windows_to_hf(layers: tuple[LayerConfig, ...]) -> dict:
  window = fields.first_window(layers)
  # Older versions of transformers know only max_window_layers.
  first = next((l for l, layer in enumerate(layers) if layer.mixer.window is not None), len(layers))
  return {
    'use_sliding_window': window is not None,
    'sliding_window': window,
    'max_window_layers': first,
    'layer_types': fields.layer_types(layers),
  }


def _from_hf(hf):
  llama.only_whole_heads(hf)
  layers = late_windows(hf, llama.blocks(hf, DEFAULTS, mixer={'qkv_bias': True}))
  return llama.decoder(hf, 'qwen2', DEFAULTS, layers)


def _to_hf(config):
  windows = late_windows_to_hf(config.layers)
  return {**llama.decoder_to_hf(config), **rope.to_hf(config.rope), **windows}


QWEN2 = Family(
  model_type='qwen2',
  architecture='Qwen2ForCausalLM',
  prefix='model.',
  rows=llama.ROWS,
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
)
